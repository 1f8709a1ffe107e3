"""The benchmark of reading latents, dry: its arithmetic, its checks and its report. No time is judged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from clla.modeling import attention_clla, rows_clla

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("usual_rotations")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import reading

    return reading


def tiny(benchmark: ModuleType) -> Any:
    return benchmark.make_shape("tiny", "6.25%", 6, CPU)


def test_a_dry_run_reports_every_case(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--dry-run", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [(row["context"], row["batch"]) for row in report["rows"]] == [(40, 1), (40, 3), (90, 1), (90, 3)]
    layers = tiny(benchmark).layers
    for row in report["rows"]:
        assert row["best"] == 16 and all(row[key] > 0 for key in ("sdpa", "sdpa_folded", "absorbed"))
        for own in (row["full"], row["selected"]):
            assert own["share"] == pytest.approx(own["floor"] / own["layer"])
            assert own["layer"] > own["unpack"] / layers > 0
    errors = report["errors"]["tiny"]
    assert all(
        0 <= error < benchmark.TOLERANCE[torch.bfloat16] for found in errors.values() for error in found.values()
    )
    last, fields = report["rows"][-1], benchmark.table(report).splitlines()[-1].split(" | ")
    assert len(fields) == 12 and fields[3] == "best 16"
    assert float(fields[10]) == pytest.approx(last["sdpa"] / last["selected"]["layer"], abs=0.005)


def test_reading_is_attention_to_all_tokens(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of all is all; the best of a few is something else; rows stay unpacked for the group's other layers."""
    shape, opened, unpacked = tiny(benchmark), [], rows_clla.unpacked
    monkeypatch.setattr(attention_clla, "COMPILED", None)
    monkeypatch.setattr(rows_clla, "unpacked", lambda *a, **k: opened.append(1) or unpacked(*a, **k))
    inputs = benchmark.make_inputs(shape, 64, 2, CPU, dtype=torch.float32)
    expected = benchmark.read(shape, inputs, None)
    assert expected.shape == inputs.query.shape and expected.isfinite().all()
    assert torch.equal(benchmark.read(shape, inputs, 64), expected) and len(opened) == 1
    assert not torch.allclose(benchmark.read(shape, inputs, 8), expected, atol=1e-3)


def test_the_floor_is_what_must_be_moved_or_multiplied(benchmark: ModuleType) -> None:
    """By hand, for 3 heads of 64 with 3 queries each, 5 sequences of 96 rows of N bytes and r components."""
    shape = benchmark.make_shape("smollm2-135m", "6.25%", 6, CPU)
    n, r, b = shape.layout.row_bytes, shape.layout.rank, shape.bucket
    assert n == 288 and (shape.heads, shape.per_head, shape.size, b, shape.layers) == (3, 3, 64, 32, 6)
    rows, buckets = 5 * 96, 5 * 3
    stages = {  # products, bytes
        "unpack": (0, (rows * n + rows * r * 2) / 6),
        "absorb": (2 * 9 * 64 * r * buckets, 192 * r * 2 + buckets * 9 * r * 2),
        "logits": (2 * 9 * r * rows, rows * r * 2 + buckets * 9 * r * 2 + rows * 9 * 4),
        "softmax": (0, 2 * rows * 9 * 4),
        "sums": (2 * 9 * r * rows, rows * r * 2 + rows * 9 * 4),
        "values": (2 * 5 * 9 * 64 * r, 192 * r * 2),
    }
    products, moved = (sum(stage[i] for stage in stages.values()) for i in (0, 1))
    assert benchmark.floor(shape, 96, 5, None, benchmark.Ceilings(10.0, math.inf)) == pytest.approx(moved / 10)
    assert benchmark.floor(shape, 96, 5, None, benchmark.Ceilings(math.inf, 10.0)) == pytest.approx(products / 10)
    assert benchmark.floor(shape, 96, 5, 8, benchmark.Ceilings(10.0, math.inf)) < moved / 10


def test_rows_are_random_latents(benchmark: ModuleType) -> None:
    inputs = benchmark.make_inputs(tiny(benchmark), 64, 2, CPU)
    latents = inputs.rows.layout.unpack(inputs.rows.data)
    assert len(latents.flatten(0, 1).unique(dim=0)) == 128
    assert 0.5 < float(latents.std()) < 1.5


@pytest.mark.parametrize("wrong", [torch.nan, 3.0])
def test_what_is_wrong_is_not_timed(
    wrong: float, benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first of two readings that are compared is the device's."""
    right, number = benchmark.read, iter(range(1000))
    monkeypatch.setattr(benchmark, "read", lambda *a: right(*a) * (1.0 if next(number) % 2 else wrong))
    with pytest.raises(SystemExit, match=r"tiny in torch\.float32: errors"):
        benchmark.main(["--dry-run"])
    assert not capsys.readouterr().out


def test_mistakes(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        benchmark.main([])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--batch-sizes", "many"])
    assert stopped.value.code == 2


def test_nothing_but_numbers_passes(benchmark: ModuleType) -> None:
    right, infinite = torch.ones(3), torch.tensor([1.0, -torch.inf, 1.0])
    assert benchmark._error(right * 1.5, right) == 0.5 and benchmark._error(infinite, infinite) == 0
    for found, expected in ((right * torch.nan, right), (right, infinite), (infinite, right)):
        assert math.isnan(benchmark._error(found, expected))
