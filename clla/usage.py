"""What the user called, a command or a function: messages name its options as the user spells them.

Messages are written with the command line's names; `checked` of `clla.arguments` turns them into a function's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, get_args, get_origin, get_type_hints

from typing_extensions import Unpack

from clla.errors import CllaError

_called: ContextVar[str] = ContextVar("called", default="clla")


@contextmanager
def called(name: str) -> Iterator[None]:
    """Within it the user has called `name` ('clla convert', 'clla.convert_model'), unless something called that."""
    token = _called.set(name if _called.get() == "clla" else _called.get())
    try:
        yield
    finally:
        _called.reset(token)


def verb() -> str:
    """What is done: 'convert' of 'clla convert' and of 'clla.convert_model'; 'clla' where nothing was called."""
    return re.sub(r"^clla[ .]|_.*", "", _called.get())


def option(name: str) -> str:
    """An argument of what was called, as the user spells it."""
    return name if "." in _called.get() else f"--{name.replace('_', '-')}"


def help_of_it() -> str:
    """Where the options of what was called are explained."""
    return f"help({_called.get()})" if "." in _called.get() else f"{_called.get()} --help"


@contextmanager
def renamed(spell: Callable[[str], str]) -> Iterator[None]:
    """Errors of the block name options as `spell` turns them, in all their parts and notes."""
    try:
        yield
    except CllaError as error:
        CllaError.__init__(error, spell(error.got), expected=spell(error.expected), remedy=spell(error.remedy))
        if hasattr(error, "__notes__"):
            error.__notes__ = [spell(note) for note in error.__notes__]
        raise


def as_arguments(function: Callable[..., Any], text: str) -> str:
    """A message with the arguments of a function in place of options, where it is what the user called.

    Commands in the message, such as `clla convert MODEL --dry-run`, stay as they are.
    """
    if "--" not in text or _called.get() != f"clla.{function.__name__}":
        return text
    kinds = get_type_hints(function)
    for many in [kind for kind in kinds.values() if get_origin(kind) is Unpack]:
        kinds |= get_type_hints(get_args(many)[0])

    def argument(found: re.Match[str]) -> str:
        off, name = found["off"], (found["name"] or "").replace("-", "_")
        name = "evaluate" if name == "eval" else name
        if name not in kinds:
            return found[0]
        return f"{name}={not off}" if kinds[name] is bool else name

    return re.sub(r"\b(?:clla|accelerate|pip) [a-z]+[^,;:()\n]*|--(?P<off>no-)?(?P<name>[a-z-]+[a-z])", argument, text)
