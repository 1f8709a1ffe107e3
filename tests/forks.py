"""Python programs in processes of their own, without the seconds of their imports.

All are forked from one process, which imports once what they need. It starts with the first of them.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")


def imported_once(*modules: str) -> None:
    """What the one process imports; to be told before the first fork."""
    _CONTEXT.set_forkserver_preload(list(modules))


imported_once(
    "accelerate",
    "clla.cli",
    "clla.convert.pipeline",
    "clla.heal.checkpoint",
    "clla.publish.push",
    "matplotlib.backends.backend_agg",
    "transformers.models.llama.modeling_llama",
)


class Fork:
    """What `python -m MODULE …` or `python FILE …` does, in a process of its own.

    Attributes:
        pid: of the process, which can be killed.
    """

    def __init__(self, *arguments: object, **variables: str) -> None:
        """Start it.

        Args:
            arguments: those of Python.
            variables: of the environment, beside what the first fork found there.
        """
        self._log = tempfile.NamedTemporaryFile(prefix="fork-", suffix=".log")  # noqa: SIM115 # closed with the object
        words = [str(argument) for argument in arguments]
        self._process = _CONTEXT.Process(target=_program, args=(self._log.name, os.getcwd(), words, variables))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def output(self) -> str:
        """What it has written so far."""
        return Path(self._log.name).read_text(errors="replace")

    def ended(self) -> bool:
        """Whether it has ended."""
        return not self._process.is_alive()

    def kill(self) -> None:
        """SIGKILL, if it is still alive."""
        self._process.kill()

    def wait(self) -> int:
        """Wait until it has ended; its exit code, negative for a signal."""
        self._process.join(400)
        code = self._process.exitcode
        if code is None:
            self.kill()
            raise TimeoutError(self.output[-3000:])
        return code


def _program(log: str, folder: str, arguments: list[str], variables: dict[str, str]) -> None:
    with open(log, "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.chdir(folder)
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code: Any = 0
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what was imported for all takes its time to go
