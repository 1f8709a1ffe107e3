"""Where commands write: one run at a time, nothing deleted that is not ours, and places are checked before the work."""

from __future__ import annotations

import os
import resource
import signal
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import torch
import typer
from helpers import clla

from clla import api
from clla.artifacts.plan import KVShape, Plan
from clla.checkpoint.write import OLD, PARTIAL, check_output, finished_directory, tidy
from clla.cli import COMMANDS
from clla.commands.options import path
from clla.convert.stages import stats_bytes
from clla.errors import CllaError, UsageError, resumable
from clla.recipe import Recipe
from clla.source.model import open_source
from clla.storage.files import save_verified
from clla.storage.places import LOCK, check_file, check_writable, expanded, holding, writing

SMALL = ["--calibration-tokens", "1024", "--sequence-length", "128", "--kv-budget", "25%", "--exact-window", "8"]
SMALL += ["--budget-context", "0", "--no-eval"]


def test_a_place_is_held_by_one_run(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    with holding(out, work, out):
        for other in (out, work):
            with pytest.raises(CllaError, match=f"{other.name} is in use by process {os.getpid()} on") as caught:
                holding(other).__enter__()
            assert "wait" in caught.value.remedy
        with holding(tmp_path / "other"):
            pass
    assert not list(tmp_path.iterdir())
    with holding(out):
        pass


def test_a_killed_run_holds_nothing(tmp_path: Path) -> None:
    reading, telling = os.pipe()
    if (child := os.fork()) == 0:
        with holding(tmp_path / "out"):
            os.write(telling, b".")
            time.sleep(600)
    os.read(reading, 1)
    with pytest.raises(CllaError, match=f"process {child}"):
        holding(tmp_path / "out").__enter__()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / f"out{LOCK}").exists()
    with holding(tmp_path / "out"):
        pass
    assert not (tmp_path / f"out{LOCK}").exists()


@pytest.mark.parametrize("option", ["-o", "--work-dir"])
def test_the_second_run_is_told_before_a_model_is_opened(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*args: Any) -> None:
        raise AssertionError("the model was opened")

    monkeypatch.setattr("clla.convert.pipeline.open_source", opened)
    monkeypatch.setattr("clla.heal.checkpoint.checkpoint_folder", opened)
    with holding(tmp_path / "shared"):
        for command in ("convert", "heal"):
            places = (
                ["-o", tmp_path / "shared"] if option == "-o" else ["-o", tmp_path / "own", option, tmp_path / "shared"]
            )
            done = clla(command, "model", *places)
            assert done.exit_code == 1 and f"in use by process {os.getpid()}" in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())


def test_what_killed_runs_left_goes_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    out = tmp_path / "out[1]"
    for name in ("out[1].partial", "out[1].old", "out1.01234567.partial", "out[1].mine.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / f"out[1].01234567{PARTIAL}").mkdir()
    (tmp_path / f"out[1].89abcdef{OLD}").mkdir()
    (tmp_path / f"out[1].89abcdef{OLD}" / "kept").touch()
    with finished_directory(out) as folder:
        (folder / "new").touch()
    tidy(out)
    assert (out / "new").is_file()
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left == {"out[1]", "out[1].partial", "out[1].old", "out1.01234567.partial", "out[1].mine.partial"}
    os.replace(out, tmp_path / f"out[1].89abcdef{OLD}")  # killed between the two renames
    tidy(out)
    assert (out / "new").is_file()


def test_only_what_is_finished_can_be_resumed(tmp_path: Path) -> None:
    work = tmp_path / "out.work"
    for name, kept in (("spill/hidden-0-0", False), ("stats-1.safetensors.ab.partial", False), ("plan-1.json", True)):
        with pytest.raises(ValueError) as caught, resumable(work):
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_text("x")
            raise ValueError
        assert (hasattr(caught.value, "__notes__"), work.exists()) == (kept, kept)


def test_a_dry_run_deletes_nothing_that_it_did_not_make(
    pico_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []

    def stages(*args: Any) -> None:
        (args[-1] / "stats-0").touch()
        kept.append(sorted(file.name for file in args[-1].iterdir()))

    monkeypatch.setattr("clla.convert.pipeline._convert", stages)
    options: dict[str, Any] = {"output": tmp_path / "out", "dataset": str(text_file)}
    api.convert_model(pico_dir, **options, dry_run=True)
    assert not list(tmp_path.iterdir()) and kept == [["stats-0"]]
    work = tmp_path / "out.work"
    (work / "heal").mkdir(parents=True)
    api.convert_model(pico_dir, **options, dry_run=True)
    assert (work / "heal").is_dir()
    (work / "thesis.tex").touch()
    for more in ({}, {"resume": True}, {"dry_run": True}):
        with pytest.raises(UsageError, match=r"did not write: thesis\.tex"):
            api.convert_model(pico_dir, **options, **more)
    (work / "thesis.tex").unlink()
    api.convert_model(pico_dir, **options)
    assert kept[-1] == ["stats-0"]  # begun afresh


def test_outputs_are_refused_only_where_something_would_be_lost(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.touch()
    check_output(tmp_path / "out", model, overwrite=False)
    check_output(tmp_path / "folder" / "out", tmp_path / "folder", overwrite=False)
    with pytest.raises(UsageError, match="holds the source"):
        check_output(tmp_path, model, overwrite=True)
    with pytest.raises(UsageError, match="disk is mounted"):
        check_output(Path("/proc"), model, overwrite=True)


@pytest.mark.parametrize("bad", ["work", "output"])
def test_paths_are_checked_before_a_model_is_opened(bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clla.convert.pipeline.open_source", lambda name: pytest.fail("the model was opened"))
    out = tmp_path / "out"
    options = {"work": ["-o", out, "--work-dir", out / "work"], "output": ["-o", "/proc/none/out"]}[bad]
    done = clla("convert", "model.gguf", *options)
    said = {"work": "lies in the output", "output": "cannot be written"}[bad]
    assert done.exit_code == 2 and said in " ".join(done.stderr.split())


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    """A pipe stands for devices, too."""
    os.mkfifo(tmp_path / "pipe")
    for command in (["convert", "nothing", "-o"], ["plan", "nothing", "--save"], ["report", "nothing", "-o"]):
        done = clla(*command, tmp_path / "pipe")
        assert done.exit_code == 2 and "a device, a pipe or a socket" in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"] and (tmp_path / "pipe").is_fifo()
    with pytest.raises(UsageError, match="whole disk"), holding(Path("/")):
        pass


def test_the_home_directory_is_meant_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    seen: dict[str, Any] = {}
    monkeypatch.setattr("clla.api.run_conversion", lambda name, recipe, options: seen.update(vars(options)))
    api.convert_model("model", output="~/out", work_dir="~/work")
    assert seen["output"] == tmp_path / "out" and seen["work_dir"] == tmp_path / "work"
    assert expanded("a~b") == Path("a~b")
    with pytest.raises(UsageError, match="home"):
        expanded("~nobody-of-this-name/x")


def test_path_options_take_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option and argument that the commands have for a path."""
    monkeypatch.setenv("HOME", str(tmp_path))
    found = []
    called = [getattr(import_module(f"clla.commands.{file}"), file) for file in COMMANDS.values()]
    groups = [one for one in called if isinstance(one, typer.Typer)]
    assert groups, "clla recipes is one"
    callbacks = [one for one in called if one not in groups]
    for callback in (*callbacks, *(command.callback for group in groups for command in group.registered_commands)):
        for name, kind in get_type_hints(callback, include_extras=True).items():
            if "pathlib" in str(get_args(kind)[:1]):
                assert get_args(kind)[1].parser is path, name
                found.append(name)
    assert len(found) >= 14 and path("~/x") == tmp_path / "x"
    with pytest.raises(typer.BadParameter):
        path("~nobody-of-this-name/x")


def test_a_write_that_fails_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(300_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CllaError, match=r"x\.safetensors cannot be written") as caught:
            save_verified(tmp_path / "x.safetensors", tensors)
        with pytest.raises(CllaError, match="out cannot be written"), finished_directory(tmp_path / "out") as folder:
            (folder / "weights").write_bytes(bytes(300_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "0.00 GB" in caught.value.expected and not list(tmp_path.iterdir())


def test_only_the_system_s_refusals_are_taken_for_such(tmp_path: Path) -> None:
    with pytest.raises(CllaError, match="cannot be written"), writing(tmp_path / "x"):
        raise RuntimeError("File too large (os error 27)")
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "x"):
        raise ZeroDivisionError


def test_places_are_checked_by_writing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b" / "c", "--output")
    check_file(tmp_path / "x.png", "--plot", (".png",))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for place in ("/proc/x", tmp_path / "file" / "x"):
        with pytest.raises(UsageError, match="cannot be written") as caught:
            check_writable(Path(place), "--save")
        assert "--save" in caught.value.remedy
    for name, what in (("x.docx", "ends in"), ("no/x.png", "exists"), ("", "is a directory")):
        with pytest.raises(UsageError, match=what):
            check_file(tmp_path / name, "--plot", (".png",))


@pytest.mark.parametrize(
    "command",
    [
        ["report", "model", "-o", "/proc/x.html"],
        ["compare", "model", "-o", "/proc/x"],
        ["bench", "model", "--plot", "/proc/x.png"],
        ["plan", "work", "--plot", "/proc/x.png"],
        ["plan", "work", "--save", "/proc/x.json"],
        ["plan", "work", "--plot", "x.docx"],
        ["heal", "model", "-o", "/proc/x"],
        ["export", "model", "-o", "/proc/x"],
    ],
    ids=" ".join,
)
def test_commands_check_first_where_they_write_last(command: list[str]) -> None:
    """None of these models is there: the place is what is found wrong."""
    done = clla(*command)
    said = " ".join(done.stderr.split())
    assert done.exit_code == 2 and command[-1] in said and ("cannot be written" in said or "ends in" in said)


def test_disk_space_asked_for_is_what_is_written(pico_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """Of a wide model moments are kept in fewer coordinates: 8 GB for the shape of Llama 2 7B, and not 69."""
    wide: Any = SimpleNamespace(layers=tuple(range(32)), kv=KVShape(32, 128))
    recipe = Recipe().override({"plan": {"max_layers_per_group": 6}})
    assert 8.0e9 < stats_bytes(wide, recipe) < 8.1e9
    done = clla("convert", pico_dir, "-o", tmp_path / "out", "--dataset", text_file, *SMALL, "--dry-run",
                "--work-dir", tmp_path / "work")  # fmt: skip
    assert done.exit_code == 0
    (stats,) = (tmp_path / "work").glob("stats-*")
    assert stats_bytes(open_source(str(pico_dir)), recipe) == pytest.approx(stats.stat().st_size, rel=0.05)
    assert Plan.load(tmp_path / "out-plan.json")
