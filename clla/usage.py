"""What the user called, a command or a function: messages name its options as the user spells them.

Messages are written with the command line's names; `checked` of `clla.arguments` turns them into a function's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from clla.errors import CllaError

_called: ContextVar[str] = ContextVar("called", default="")


@contextmanager
def called(name: str) -> Iterator[bool]:
    """Within it the user has called `name` ('clla convert', 'clla.convert_model'); true unless it is called by another.

    Args:
        name: of a command or function.
    """
    outermost = not _called.get()
    token = _called.set(_called.get() or name)
    try:
        yield outermost
    finally:
        _called.reset(token)


def verb() -> str:
    """What is done: 'convert' of 'clla convert' and of 'clla.convert_model'; empty where nothing was called."""
    return re.sub(r"^clla[ .]|_.*", "", _called.get())


def help_of_it() -> str:
    """Where the options of what was called are explained."""
    name = _called.get()
    return f"help({name})" if name.startswith("clla.") else f"{name or 'clla'} --help"


@contextmanager
def renamed(spell: Callable[[str], str]) -> Iterator[None]:
    """Errors of the block name options as `spell` turns them, in all their parts and notes."""
    try:
        yield
    except CllaError as error:
        error.got, error.expected, error.remedy = map(spell, (error.got, error.expected, error.remedy))
        error.args = (". ".join(part for part in (error.got, error.expected, error.remedy) if part),)
        if notes := getattr(error, "__notes__", None):
            error.__notes__ = list(map(spell, notes))
        raise


def as_arguments(text: str, *, names: Callable[[], dict[str, bool]]) -> str:
    """A message with the arguments of a function in place of options.

    Args:
        text: the message; commands in it, such as `clla convert MODEL --dry-run`, stay.
        names: the function's arguments, and whether each is true or false.
    """
    known = names() if "--" in text else {}

    def argument(found: re.Match[str]) -> str:
        option = found[0]
        if not option.startswith("--"):
            return option
        name = option[2:].replace("-", "_")
        name, value = (name[3:], "=False") if name.startswith("no_") else (name, "=True")
        name = "evaluate" if name == "eval" else name
        return option if name not in known else name + value if known[name] else name

    return re.sub(r"\b(?:clla|accelerate|pip) [a-z]+[^,;:()\n]*|--[a-z][a-z-]*[a-z]", argument, text)
