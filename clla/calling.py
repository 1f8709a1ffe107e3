"""Modules that can be called.

`clla.convert` is a package of the pipeline's stages and also what a user calls; so are `heal`, `evaluate` and `load`.
Importing `clla.convert.pipeline` sets the attribute `convert` of `clla` to the package, whatever was there before.
So the package itself takes calls, and it does not matter what was imported first.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module that runs the function of `clla.api` with its own last name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    @property
    def _function(self) -> Any:
        from clla import api

        return getattr(api, self.__name__.rpartition(".")[2])

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function)


def make_callable(name: str) -> None:
    """Let an imported module be called."""
    sys.modules[name].__class__ = CallableModule
