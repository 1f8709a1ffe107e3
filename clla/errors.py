"""Errors that a user can act on. Each says what was got, what was expected and the remedy."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_MEMORY = re.compile(r"out of memory|(can't|cannot|unable to|failed to) allocate|bad_alloc", re.IGNORECASE)
OS_ERROR = re.compile(r"os error (\d+)")  # as safetensors and tokenizers tell of it
NOT_WRITTEN = re.compile(r"PytorchStreamWriter|unexpected pos \d+ vs \d+")  # torch, of a file that takes no more
SCRATCH = ("spill", "offload-")  # in a work directory, of no use to a later run


class CllaError(Exception):
    """A mistake in the input or a limit of the tool: what was got, what was expected, what to do.

    Args:
        got: what was found.
        expected: what would have been accepted.
        remedy: the next step for the user.
    """

    exit_code = 1

    def __init__(self, got: str, *, expected: str = "", remedy: str = "") -> None:
        self.got, self.expected, self.remedy = got, expected, remedy
        super().__init__(". ".join(part for part in (got, expected, remedy) if part))


class UsageError(CllaError):
    """A wrong option, recipe or budget; the command exits with code 2."""

    exit_code = 2


class UnsupportedModelError(CllaError):
    """The model's architecture cannot be converted."""


class DatasetError(CllaError):
    """Calibration or evaluation text is missing, empty or too short."""


class CorruptArtifactError(CllaError):
    """A saved artifact or checkpoint is damaged or was written by a newer version."""


def reason(error: BaseException) -> str:
    """What an exception says, in one line; its class where it says nothing or no more than a key."""
    text = " ".join(str(error).split()).partition(" Exception raised from ")[0][:500]  # torch adds frames in C++
    name = type(error).__name__
    return name if not text else f"{name}: {text}" if isinstance(error, KeyError) else text


def is_unicode(text: str) -> bool:
    """Whether a text can be written: names and JSON may hold halves of characters, or bytes in another encoding."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or of a GPU."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error))))


def is_safetensors(error: BaseException) -> bool:
    """Whether it is safetensors' own error, by its name: commands import no library to tell what failed."""
    return type(error).__name__ == "SafetensorError"


def system_error(error: BaseException) -> int | None:
    """The number of what the system refused, also where a library has a class of its own for it.

    0 where there is no number; None where it was not the system.
    """
    if isinstance(error, OSError):
        return error.errno or 0
    if found := OS_ERROR.search(str(error)):
        return int(found[1])
    known = is_safetensors(error) or NOT_WRITTEN.search(str(error)) or "inline_container" in str(error)
    return 0 if known else None


@contextmanager
def blamed(got: str, *, expected: str, remedy: str, kind: type[CllaError] = CllaError) -> Iterator[None]:
    """Whatever a library raises in the block is a fault of the input that it was given, unless memory ran out.

    Args:
        got: what is wrong; the reason is added.
        expected: what would have been accepted.
        remedy: the next step for the user.
        kind: of the error.
    """
    try:
        yield
    except CllaError:
        raise
    except Exception as error:
        if is_memory(error):
            raise
        raise kind(f"{got}: {reason(error)}", expected=expected, remedy=remedy) from error


@contextmanager
def generating(name: object) -> Iterator[None]:
    """Within it a model generates; what transformers makes of wrong settings says whose they are.

    Args:
        name: of the model.

    Raises:
        CllaError: the settings do not fit.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        raise CllaError(
            f"{name or 'the model'} cannot generate with these options and its generation_config.json: {reason(error)}",
            expected="settings that transformers' generate() takes",
            remedy="correct what the reason names",
        ) from error


@contextmanager
def resumable(work: Path) -> Iterator[None]:
    """Whatever ends the block, the user is told where its finished stages are; where there are none, nothing stays."""
    there = work.exists()
    try:
        yield
    except BaseException as error:
        if any(path.is_file() and _is_finished(path.relative_to(work)) for path in work.rglob("*")):
            error.add_note(f"what is finished is kept in {work}: the same command with --resume goes on from there")
        elif not there:
            shutil.rmtree(work, ignore_errors=True)
        raise


def _is_finished(file: Path) -> bool:
    """Whether a file of a work directory, named within it, is a result that a later run takes up."""
    return file.suffix != ".partial" and not file.parts[0].startswith(SCRATCH)
