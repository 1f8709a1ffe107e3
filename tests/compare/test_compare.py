"""The comparison of methods: every one runs, bytes are measured, and the advice follows from the table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from clla.cli import app
from clla.compare.comparison import Row, pareto, recommend
from clla.compare.methods import METHODS

SMALL = [
    "--sequence-length",
    "256",
    "--long-context",
    "512",
    "--chunk",
    "32",
    "--calibration-tokens",
    "2048",
    "--num-samples",
    "1",
]


def row(share: float, kl: float) -> Row:
    return Row("m", f"{share} {kl}", 100 * share, 100 * share, share, 10.0, kl, None, None, False)


ROWS = st.lists(st.builds(row, st.floats(0.01, 1), st.floats(0, 5)), min_size=1, max_size=12)


@given(ROWS)
def test_nothing_on_the_front_is_beaten(rows: list[Row]) -> None:
    front = pareto(rows)
    for one in front:
        assert not any(r.bytes_per_token <= one.bytes_per_token and r.kl < one.kl for r in rows)
    for other in rows:
        assert any(one.bytes_per_token <= other.bytes_per_token and one.kl <= other.kl for one in front)


@given(ROWS, st.floats(0.01, 1))
def test_advice_is_the_best_that_fits(rows: list[Row], budget: float) -> None:
    best = recommend(rows, budget)
    fitting = [r.kl for r in rows if r.share <= budget * 1.001]
    assert (best is None) == (not fitting)
    if best is not None:
        assert best.share <= budget * 1.001 and best.kl == min(fitting)


def test_a_few_bytes_of_lengths_do_not_break_a_budget() -> None:
    assert recommend([row(0.25001, 0.01), row(0.0625, 0.02)], 0.25) == row(0.25001, 0.01)
    assert recommend([row(0.2510, 0.01), row(0.0625, 0.02)], 0.25) == row(0.0625, 0.02)


@pytest.fixture(scope="module")
def folder(pico_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("comparison") / "out"
    arguments = ["compare", pico_dir, "--budgets", "50%,25%", "--dataset", text_file, "--text", text_file]
    result = CliRunner().invoke(app, [str(a) for a in (*arguments, *SMALL, "--retrieval-trials", "1", "-o", out)])
    assert result.exit_code == 0, result.output + result.stderr
    assert "Recommendation" in result.stdout
    return out


@pytest.mark.slow
def test_every_method_is_in_the_table(folder: Path) -> None:
    data = json.loads((folder / "comparison.json").read_text())
    rows = data["rows"]
    assert rows[0]["method"] == "source" and rows[0]["share"] == 1 and rows[0]["kl"] == 0
    assert {r["method"] for r in rows} == {"source", *METHODS}
    assert {entry["method"] for entry in data["left_out"]} >= {"palu"} and all(e["why"] for e in data["left_out"])
    for r in rows[1:]:  # with heads of 16, lengths and indices may outweigh what they save
        assert 0 < r["share"] < 1.1 and r["kl"] >= 0 and r["retrieval_nll"] > 0
    with (folder / "comparison.csv").open() as stream:
        assert [line["setting"] for line in csv.DictReader(stream)] == [r["setting"] for r in rows]
    assert (folder / "comparison.png").stat().st_size > 10_000 and (folder / "comparison.svg").stat().st_size > 10_000


@pytest.mark.slow
def test_quick_leaves_variants_out(pico_dir: Path, text_file: Path, tmp_path: Path, folder: Path) -> None:
    arguments = ["compare", pico_dir, "--quick", "--methods", "kivi,minicache", "--dataset", text_file]
    arguments += ["--text", text_file, *SMALL, "--retrieval-trials", "0", "-o", tmp_path]
    assert CliRunner().invoke(app, [str(a) for a in arguments]).exit_code == 0
    everything = json.loads((folder / "comparison.json").read_text())["rows"]
    quick = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    names = {(r["method"], r["setting"]) for r in everything}
    assert {(r["method"], r["setting"]) for r in quick} <= names
    for method in ("kivi", "minicache"):
        assert 0 < sum(r["method"] == method for r in quick) < sum(r["method"] == method for r in everything)


@pytest.mark.slow
def test_dialled_methods_keep_to_their_budget(folder: Path) -> None:
    """Measured bytes at the context, with what buffers hold at that moment."""
    rows = json.loads((folder / "comparison.json").read_text())["rows"]
    for name in ("clla", "cskv", "weight-svd", "xkv", "palu", "pyramidkv"):
        shares = [r["share"] for r in rows if r["method"] == name]
        assert shares and max(shares) <= 0.51, (name, shares)


@pytest.mark.slow
def test_advice_is_that_of_the_table(folder: Path) -> None:
    data = json.loads((folder / "comparison.json").read_text())
    for budget, advice in data["recommended"].items():
        fitting = [r for r in data["rows"][1:] if r["share"] <= 1.001 * float(budget.rstrip("%")) / 100]
        least = min(fitting, key=lambda r: (r["kl"], r["bytes_per_token"]))
        assert advice == f"{least['method']}: {least['setting']}"


def test_an_unknown_method_is_refused(pico_dir: Path) -> None:
    result = CliRunner().invoke(app, ["compare", str(pico_dir), "--methods", "kivi,magic"])
    assert result.exit_code == 2 and "magic" in result.stderr and "pyramidkv" in result.stderr
