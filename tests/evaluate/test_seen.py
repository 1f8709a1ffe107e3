"""What is said of a text that a model is measured on: only what the checkpoint's own record tells."""

from __future__ import annotations

import gzip
import json
import lzma
import shutil
from pathlib import Path

import pytest
from helpers import clla

from clla.evaluate.report import UNSEEN
from clla.evaluate.report_file import ReportFile
from clla.evaluate.seen import FittedText, fitted_text, unseen
from clla.text.reading import bundled_path

SHORT, LONG = "a few words of text\n" * 20, "a line of a longer text, with a number\n" * 10_000


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for name, text in (("short.txt", SHORT), ("copy of it.txt", SHORT), ("long.txt", LONG)):
        (tmp_path / name).write_text(text)
    (tmp_path / "packed.txt.gz").write_bytes(gzip.compress(SHORT.encode()))
    shutil.copy(bundled_path(), tmp_path / "own name.txt.xz")
    return tmp_path


def test_a_calibration_text_is_known_by_its_contents(texts: Path) -> None:
    fitted = [fitted_text(str(texts / "short.txt"))]
    assert not fitted[0].held_out
    for name in ("short.txt", "copy of it.txt", "packed.txt.gz"):
        assert unseen(str(texts / name), fitted, left_out=False) is False
        assert unseen(str(texts / name), fitted, left_out=True) is False  # it is too short to keep anything back
    assert unseen(str(texts / "long.txt"), fitted, left_out=False) is True
    assert unseen("bundled", fitted, left_out=True) is True


def test_blocks_that_were_kept_back_are_unseen(texts: Path) -> None:
    fitted = [fitted_text(str(texts / "long.txt"))]
    assert fitted[0].held_out
    assert unseen(str(texts / "long.txt"), fitted, left_out=True) is True
    assert unseen(str(texts / "long.txt"), fitted, left_out=False) is False
    everything = [fitted_text(str(texts / "long.txt"), held_out=False)]
    assert unseen(str(texts / "long.txt"), everything, left_out=True) is False
    assert unseen(str(texts / "short.txt"), [*fitted, fitted_text(str(texts / "short.txt"))], left_out=False) is False


@pytest.mark.parametrize("sha", ["as recorded", None])
def test_the_bundled_text(sha: str | None, texts: Path) -> None:
    fitted = [fitted_text("bundled") if sha else FittedText("bundled", None, True)]
    assert unseen("bundled", fitted, left_out=True) is True
    assert unseen("bundled", fitted, left_out=False) is False
    assert unseen(str(texts / "own name.txt.xz"), fitted, left_out=False) is False
    assert unseen("bundled", [fitted_text(str(texts / "own name.txt.xz"))], left_out=True) is True
    assert unseen("bundled", [FittedText("bundled", fitted[0].sha256, False)], left_out=True) is False


def test_excerpts_and_other_forms_are_known(texts: Path) -> None:
    lines = [f"line {number} tells of the number {number * 7919}" for number in range(2000)]
    (texts / "own.txt").write_text("\n".join(lines))
    (texts / "excerpt.txt").write_text("\r\n".join(lines[500:700]))
    (texts / "rows.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    (texts / "more.txt").write_text("\n".join(["And then something else happened", *lines]))
    fitted = [fitted_text(str(texts / "own.txt"))]
    for name in ("excerpt.txt", "rows.jsonl", "more.txt"):
        assert unseen(str(texts / name), fitted, left_out=False) is False, name
    (texts / "own.txt").unlink()
    assert unseen(str(texts / "excerpt.txt"), fitted, left_out=False) is None
    with lzma.open(bundled_path(), "rt", encoding="utf-8") as stream:
        begun = stream.read(300_000)
    (texts / "start.txt").write_text(begun[:200_000])  # without a block that is kept back
    (texts / "more of it.txt").write_text(begun[200_000:])
    assert unseen(str(texts / "start.txt"), [fitted_text("bundled")], left_out=False) is False
    assert unseen("bundled", [fitted_text(str(texts / "start.txt"))], left_out=True) is True
    assert unseen("bundled", [fitted_text(str(texts / "more of it.txt"))], left_out=True) is False


def test_what_cannot_be_known_is_not_claimed(texts: Path) -> None:
    assert unseen("bundled", None, left_out=True) is None
    older = [FittedText("mine.txt", None, True)]
    assert unseen("bundled", older, left_out=True) is None and unseen("mine.txt", older, left_out=False) is None
    hub = [FittedText("maker/texts:train", "", True)]
    assert unseen(str(texts / "short.txt"), hub, left_out=False) is None
    assert unseen("maker/texts", hub, left_out=False) is False
    assert unseen("maker/texts:validation", hub, left_out=False) is True
    for other in ("maker/texts/large", "maker/texts@main", "other/copy"):
        assert unseen(other, hub, left_out=False) is None
    assert unseen("bundled", [FittedText("self", "", True)], left_out=True) is True


@pytest.fixture(scope="module")
def own(pico_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seen") / "out"
    done = clla("convert", pico_dir, "-o", folder, "--dataset", text_file, "--calibration-tokens", "1024",
                "--sequence-length", "128", "--exact-window", "8", "--kv-budget", "25%", "--budget-context", "0",
                "--no-eval")  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder


def test_commands_say_what_is_known(own: Path, text_file: Path, tmp_path: Path) -> None:
    copy, other = tmp_path / "copy.txt", tmp_path / "other.txt"
    shutil.copy(text_file, copy)
    other.write_text(LONG)
    options = ["--num-samples", "1", "--sequence-length", "64", "--contexts", "64", "--no-retrieval"]
    for text, said in ((copy, False), (other, True)):
        found = clla("eval", own, "--text", text, *options, "--json")
        assert json.loads(found.stdout)["unseen"] is said
    assert UNSEEN[False] in " ".join(clla("eval", own, "--text", text_file, *options).stdout.split())
    page = tmp_path / "page.html"
    clla(
        "report", own, "-o", page, "--text", copy, "--num-prompts", "0", "--num-samples", "1", "--sequence-length", "64"
    )
    assert page.read_text().count(UNSEEN[False]) == 2
    older = Path(shutil.copytree(own, tmp_path / "older"))
    report = older / "clla_report.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | {"fitted": None}))
    plan = ReportFile.load(older).plan
    assert ReportFile.of(older, plan).fitted == [FittedText(str(text_file), None, True)]  # as of an older checkpoint


@pytest.mark.parametrize("command", ["eval", "report", "compare"])
def test_a_text_to_measure_on_is_not_self(command: str) -> None:
    """Said before a model is looked for."""
    done = clla(command, "no-such-model", "--text", "self")
    assert done.exit_code == 1 and "the model writes" in " ".join(done.stderr.split())
