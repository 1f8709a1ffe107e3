"""Places that commands write to: paths as users write them, whether they can be written to, who is writing there."""

from __future__ import annotations

import errno
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from clla.errors import CllaError, UsageError, system_error

LOCK = ".clla-lock"
PICTURES = (".png", ".svg", ".pdf")
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of file systems that have none


def expanded(path: str | Path) -> Path:
    """A path with `~` taken for the home directory.

    Raises:
        UsageError: there is no such user, or no home directory.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"{path}: whose home that is is not known", expected="a path", remedy="write it out, or ./~ for such a name"
        ) from error


def check_writable(path: Path, option: str) -> None:
    """Refuse a file or directory that could not be written, before any work is done for it.

    Args:
        path: to write; directories that are lacking would be made.
        option: that names it.

    Raises:
        UsageError: something is in its way, or its place cannot be written to.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UsageError(
            f"{path} is a device, a pipe or a socket, which would be replaced",
            expected="a file or a directory",
            remedy=f"choose another {option}",
        )
    parent = next(place for place in path.absolute().parents if place.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
        if path.is_file() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror or error}",
            expected="a place that may be written to",
            remedy=f"choose another {option}",
        ) from error


def check_file(path: Path, option: str, suffixes: tuple[str, ...] = ()) -> None:
    """`check_writable` of what is going to be a file.

    Args:
        path: of the file.
        option: that names it.
        suffixes: that it may have; empty for any.

    Raises:
        UsageError: it is a directory, has another suffix, or its place cannot be written to.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a directory", expected="a file to write to", remedy=f"choose another {option}")
    if suffixes and path.suffix not in suffixes:
        raise UsageError(f"{option} {path}", expected="a file that ends in " + ", ".join(suffixes), remedy="name it so")
    if not path.parent.is_dir():
        raise UsageError(f"{option} {path}", expected="a file in a directory that exists", remedy="make the directory")
    check_writable(path, option)


@contextmanager
def holding(*paths: Path, needed: bool = True) -> Iterator[None]:
    """Keep other runs from writing to the same places meanwhile.

    A file beside each is locked by the system, which lets go of it however the process ends, and says who holds it.

    Args:
        paths: of outputs and work directories.
        needed: refuse where no such file can be made; else nobody is kept out there.

    Raises:
        CllaError: another run holds one of them.
    """
    with ExitStack() as stack:
        for path in dict.fromkeys(path.resolve() for path in paths):
            stack.enter_context(_holding(path, needed))
        yield


@contextmanager
def _holding(path: Path, needed: bool) -> Iterator[None]:
    if not path.name:
        raise UsageError(f"{path} is a whole disk", expected="a directory in it", remedy="choose another")
    file = path.with_name(path.name + LOCK)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = _locked(file)
    except OSError as error:
        if needed:
            raise UsageError(
                f"{path} cannot be written: {error.strerror or error}",
                expected="a place that may be written to",
                remedy="choose another",
            ) from error
        yield
        return
    if stream is None:
        raise CllaError(
            f"{path} is in use by {_holder(file)}",
            expected="one run at a time for an output and for a work directory",
            remedy="wait until it has ended or stop it, or choose another --output and --work-dir",
        )
    try:
        stream.truncate(0)
        now = datetime.now().astimezone().strftime("%d %b %H:%M:%S")
        stream.write(json.dumps({"process": os.getpid(), "machine": socket.gethostname(), "since": now}))
        stream.flush()
        yield
    finally:
        with suppress(OSError):
            file.unlink()
        stream.close()


def _locked(file: Path) -> IO[str] | None:
    """The file, opened and locked; None where someone else has it."""
    while True:
        stream = file.open("a+", encoding="utf-8")
        try:
            _lock(stream.fileno())
            if os.path.samestat(os.fstat(stream.fileno()), file.stat()):
                return stream
        except FileNotFoundError:
            pass  # whoever had it has just removed it
        except (BlockingIOError, PermissionError):
            stream.close()
            return None
        except OSError as error:
            if error.errno in NO_LOCKS:
                return stream
            stream.close()
            raise
        stream.close()


def _lock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _holder(file: Path) -> str:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return f"process {found['process']} on {found['machine']} since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"


@contextmanager
def writing(path: Path, *, needed: int | None = None) -> Iterator[None]:
    """Say of a write that fails what could not be written, and how much room it takes.

    Args:
        path: of the file or directory.
        needed: bytes in all, where known.

    Raises:
        CllaError: the system refused: no space, a quota, a limit of file sizes, no right to write.
    """
    try:
        yield
    except CllaError:
        raise
    except Exception as error:  # safetensors, tokenizers and torch have classes of their own for what is an OSError
        if system_error(error) is None:
            raise
        room = f"about {needed / 1e9:.2f} GB free" if needed else "enough free space"
        raise CllaError(
            f"{path} cannot be written: {str(error).splitlines()[0]}",
            expected=f"{room} in {path.parent}, within quotas and limits, and the right to write there",
            remedy="free some space or lift the limit; a run goes on with --resume",
        ) from error
