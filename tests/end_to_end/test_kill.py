"""Conversions that are killed at any moment: nothing half-written is left, and --resume ends with the same bytes."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import Fork
from typer.testing import CliRunner

from clla.checkpoint.checksums import check_files
from clla.cli import app

OPTIONS = ["--calibration-tokens", "2048", "--sequence-length", "256", "--budget-context", "512",
           "--exact-window", "16", "--kv-budget", "25%"]  # fmt: skip
KILLS = 6
PARTIAL = re.compile(r"\.[0-9a-f]{8}\.partial")  # names of their own, which no other run repeats

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="watches processes through /proc")


def command_of(model: Path, text: Path, folder: Path, *more: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    return ["-m", "clla", "convert", str(model), "-o", str(folder / "out"), "--dataset", str(text), *OPTIONS, *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def paths(folder: Path) -> set[str]:
    """All that lies in a folder at this moment, while others move it about."""
    found, waiting = set(), [folder]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except OSError:
            continue
        found |= {os.path.relpath(entry.path, folder) for entry in entries}
        waiting += [Path(entry.path) for entry in entries if entry.is_dir()]
    return {PARTIAL.sub(".partial", name) for name in found}


def watch(pid: int, folder: Path) -> Iterator[tuple[float, set[str]]]:
    """Seconds that the process has computed, and the paths that were not there before, as long as it has not ended."""
    seen = paths(folder)
    while (seconds := computed(pid)) is not None:
        now = paths(folder)
        yield seconds, now - seen
        seen |= now
        time.sleep(0.0005)


def computed(pid: int) -> float | None:
    """Processor time of a process, which other load on the machine does not stretch; None once it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    except OSError:
        return None
    return None if state == "Z" else (int(fields[10]) + int(fields[11])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def unbroken(
    pico_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, bytes], float, list[str]]:
    """Files of an unbroken run, the seconds it computes, and the paths that appeared on the way, in order."""
    folder = tmp_path_factory.mktemp("unbroken")
    run, seconds, appeared = Fork(*command_of(pico_dir, text_file, folder)), 0.0, []
    for seconds, new in watch(run.pid, folder):  # noqa: B007
        appeared += sorted(new)
    assert run.wait() == 0, run.output
    return contents(folder / "out"), seconds, appeared


@pytest.mark.slow
def test_kills_at_any_moment(
    unbroken: tuple[dict[str, bytes], float, list[str]], pico_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """Half of them spread over the time of a run, half when some file or directory has just appeared."""
    expected, seconds, appeared = unbroken
    dice = random.Random(0)
    moments: list[float | str] = [(i + dice.random()) / (KILLS // 2) * 0.95 * seconds for i in range(KILLS // 2)]
    moments += ["out", *dice.sample(sorted(set(appeared) - {"out"}), KILLS - len(moments) - 1)]
    killed = 0
    for number, moment in enumerate(moments):
        folder = tmp_path / str(number)
        command = command_of(pico_dir, text_file, folder)
        run = Fork(*command)
        for now, new in watch(run.pid, folder):
            if now >= moment if isinstance(moment, float) else moment in new:
                run.kill()
                break
        killed += run.wait() == -signal.SIGKILL
        if (folder / "out").exists():  # what has its final name is complete
            assert contents(folder / "out") == expected, moment
        ended = (folder / "out").exists() and not (folder / "out.work").exists()  # nothing was left but to exit
        again = Fork(*command, "--resume")
        assert again.wait() == (2 if ended else 0), (moment, again.output)
        assert contents(folder / "out") == expected, moment
        left = {path.name for path in folder.iterdir()}
        assert left == {"out"}, (moment, left)
    assert killed >= KILLS - 2, "most of them must hit a living process"


@pytest.mark.slow
def test_a_command_that_is_killed(
    unbroken: tuple[dict[str, bytes], float, list[str]], pico_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """As a user would see it: `python -m clla`, killed while it calibrates or later, and again with --resume."""
    command = [sys.executable, *command_of(pico_dir, text_file, tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "out.work").exists():
        assert process.poll() is None
        time.sleep(0.001)
    began = computed(process.pid) or 0.0
    while (computed(process.pid) or 0.0) < began + 0.4 * unbroken[1]:
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "out").exists()
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Resuming" in done.stderr, done.stderr
    assert contents(tmp_path / "out") == unbroken[0]


@pytest.mark.slow
def test_an_earlier_checkpoint_survives_until_the_new_one_is_complete(
    unbroken: tuple[dict[str, bytes], float, list[str]], pico_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """With --overwrite: killed while the new one is written, the old one is whole."""
    command = command_of(pico_dir, text_file, tmp_path, "--overwrite")
    for name, data in unbroken[0].items():
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_bytes(data)
    (tmp_path / "out" / "README.md").write_text("the old one")
    run = Fork(*command)
    for _, new in watch(run.pid, tmp_path):
        if any(name.startswith("out.partial/model") for name in new):
            run.kill()
            break
    assert run.wait() == -signal.SIGKILL
    assert (tmp_path / "out" / "README.md").read_text() == "the old one" and check_files(tmp_path / "out")
    assert Fork(*command, "--resume").wait() == 0
    assert contents(tmp_path / "out") == unbroken[0]


class _Stop(Exception):
    pass


def _stop(*args: object, **kwargs: object) -> None:
    raise _Stop


def test_killed_after_the_last_rename(
    pico_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is complete but its work is still there: --resume ends in peace, and only for the same run."""
    short = [*command_of(pico_dir, text_file, tmp_path, "--no-eval")[2:], "--calibration-tokens", "1024"]
    run = CliRunner()
    with monkeypatch.context() as patch:
        own = shutil.rmtree
        patch.setattr("shutil.rmtree", lambda path, *a, **k: _stop() if path.suffix == ".work" else own(path, *a, **k))
        assert "_Stop" in run.invoke(app, short).stderr
    expected = contents(tmp_path / "out")
    assert expected and (tmp_path / "out.work").exists()
    other = run.invoke(app, [*short, "--kv-budget", "20%", "--resume"])
    assert other.exit_code == 2 and "--overwrite" in other.stderr
    again = run.invoke(app, [*short, "--resume"])
    assert again.exit_code == 0, again.stderr
    assert contents(tmp_path / "out") == expected and not (tmp_path / "out.work").exists()
    finished = run.invoke(app, [*short, "--resume"])
    assert finished.exit_code == 2 and "nothing to resume" in finished.stderr
    assert contents(tmp_path / "out") == expected
