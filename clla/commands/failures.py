"""Every exception as a message: what failed, whether the input or clla is at fault, and what to do."""

from __future__ import annotations

import errno
import os
import platform
import tempfile
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from clla.errors import NOT_WRITTEN, CllaError, is_memory, is_safetensors, reason, system_error

VARIABLE = "CLLA_TRACEBACK"  # set to 1, it prints the traceback of any error
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InternalError(CllaError):
    """Nothing that clla foresaw: it should have worked, or told what is wrong with the input."""


def explained(error: Exception) -> CllaError:
    """Any exception as one that a user can act on."""
    if isinstance(error, CllaError):
        return error
    for applies, got, expected, remedy in KINDS:
        if applies(error):
            package = (getattr(error, "name", None) or "clla").partition(".")[0]
            return CllaError(f"{got}{reason(error)}", expected=expected, remedy=remedy.format(package=package))
    return InternalError(
        f"internal error: {type(error).__name__}: {' '.join(str(error).split())[:500]} (raised in {_raised_in(error)})",
        expected="a result, or a message that says what is wrong with the input",
        remedy=f"if clla doctor finds nothing wrong with machine and model, open an issue with these versions: "
        f"{_versions()}. {_keep_traceback(error)}",
    )


def _is(*classes: type[Exception]) -> Callable[[Exception], bool]:
    return lambda error: isinstance(error, classes)


def _is_full(error: Exception) -> bool:
    """Whether a disk is full; torch tells of it in words of its own."""
    return system_error(error) in FULL or NOT_WRITTEN.search(str(error)) is not None


# Which exceptions, what was got (before the exception's reason), what was expected, the remedy; the first that applies.
KINDS: tuple[tuple[Callable[[Exception], bool], str, str, str], ...] = (
    (
        is_memory,
        "out of memory: ",
        "a machine, or a GPU, on which the model and what is computed with it have room",
        "lower the numbers of tokens, contexts or sequences, pass --dtype bfloat16, or use a larger machine",
    ),
    (
        _is_full,
        "what was made could not be written: ",
        "room on the disk, and no limit on the size of files below what is written",
        "free some space, raise the quota, or choose a place on another disk",
    ),
    (
        _is(OSError),
        "",
        "a path that exists and may be read, or written to",
        "check the path, and who may read and write there",
    ),
    (
        is_safetensors,
        "a file of weights cannot be read or written: ",
        "a whole .safetensors file",
        "copy or download the model again, or remove the work directory",
    ),
    (
        _is(UnicodeError),
        "text that is no Unicode: ",
        "UTF-8 in files, names and options",
        "convert it to UTF-8, or rename the file",
    ),
    (
        _is(RecursionError),
        "something is nested too deep to be read: ",
        "files as models and recipes have them",
        "look for a file with thousands of brackets within each other",
    ),
    (
        _is(ImportError),
        "a package is missing or broken: ",
        "packages that can be imported; clla doctor looks at them",
        "pip install --force-reinstall {package}",
    ),
)


def wants_traceback() -> bool:
    return os.environ.get(VARIABLE, "") not in ("", "0")


def _raised_in(error: Exception) -> str:
    """The package of the innermost frame, and its version."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    package = str(frames[-1].f_globals.get("__name__", "?")).partition(".")[0] if frames else "clla"
    return f"{package} {_version(package)}".strip()


def _versions() -> str:
    names = ("clla", "torch", "transformers")
    return ", ".join([*(f"{name} {_version(name)}" for name in names), f"Python {platform.python_version()}"])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _keep_traceback(error: Exception) -> str:
    """Where the traceback was written, or how to see it."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="clla-traceback-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(text)
    except OSError:
        return f"{VARIABLE}=1 prints the traceback"
    return f"The traceback is in {Path(file.name)}; {VARIABLE}=1 prints it"
