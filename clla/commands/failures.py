"""Every exception as a message: what failed, whether the input or clla is at fault, and what to do."""

from __future__ import annotations

import errno
import os
import platform
import re
import tempfile
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from clla.errors import CllaError, is_memory, is_safetensors, reason

VARIABLE = "CLLA_TRACEBACK"  # set to 1, it prints the traceback of any error
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as safetensors and tokenizers tell of it
NOT_WRITTEN = re.compile(r"PytorchStreamWriter|unexpected pos \d+ vs \d+")  # torch, of a disk that is full


class InternalError(CllaError):
    """Nothing that clla foresaw: it should have worked, or told what is wrong with the input."""


def explained(error: Exception) -> CllaError:
    """Any exception as one that a user can act on."""
    if isinstance(error, CllaError):
        return error
    if is_memory(error):
        return CllaError(
            f"out of memory: {reason(error)}",
            expected="a machine, or a GPU, on which the model and what is computed with it have room",
            remedy="lower the numbers of tokens, contexts or sequences, pass --dtype bfloat16, or use a larger machine",
        )
    number = _os_error(error)
    if number in FULL or NOT_WRITTEN.search(str(error)):
        return CllaError(
            f"what was made could not be written: {reason(error)}",
            expected="room on the disk, and no limit on the size of files below what is written",
            remedy="free some space, raise the quota, or choose a place on another disk",
        )
    if isinstance(error, OSError):
        return CllaError(
            reason(error),
            expected="a path that exists and may be read, or written to",
            remedy="check the path, and who may read and write there",
        )
    if is_safetensors(error):
        return CllaError(
            f"a file of weights cannot be read or written: {reason(error)}",
            expected="a whole .safetensors file",
            remedy="copy or download the model again, or remove the work directory",
        )
    if isinstance(error, UnicodeError):
        return CllaError(
            f"text that is no Unicode: {reason(error)}",
            expected="UTF-8 in files, names and options",
            remedy="convert it to UTF-8, or rename the file",
        )
    if isinstance(error, RecursionError):
        return CllaError(
            f"something is nested too deep to be read: {reason(error)}",
            expected="files as models and recipes have them",
            remedy="look for a file with thousands of brackets within each other",
        )
    if isinstance(error, ImportError):
        return CllaError(
            f"a package is missing or broken: {reason(error)}",
            expected="packages that can be imported; clla doctor looks at them",
            remedy=f"pip install --force-reinstall {(error.name or 'clla').partition('.')[0]}",
        )
    return InternalError(
        f"internal error: {type(error).__name__}: {' '.join(str(error).split())[:500]} (raised in {_raised_in(error)})",
        expected="a result, or a message that says what is wrong with the input",
        remedy=f"if clla doctor finds nothing wrong with machine and model, open an issue with these versions: "
        f"{_versions()}. {_keep_traceback(error)}",
    )


def wants_traceback() -> bool:
    return os.environ.get(VARIABLE, "") not in ("", "0")


def _os_error(error: Exception) -> int | None:
    """Its number, also of one that a library in Rust wraps in a class of its own."""
    if isinstance(error, OSError):
        return error.errno
    found = OS_ERROR.search(str(error))
    return int(found[1]) if found else None


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
