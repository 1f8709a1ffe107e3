"""The benchmark of the kernels over latents, dry: its arithmetic, its checks and its report. No time is judged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

import torch

from clla.modeling import attention_clla, attention_triton_clla

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("bf16_products")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import decode_kernel

    monkeypatch.setattr(decode_kernel, "SWEPT_TILES", [(64, 8), (32, 4)])
    monkeypatch.setattr(decode_kernel, "SWEPT_COMPONENTS", (16, 32))
    monkeypatch.setattr(decode_kernel, "SWEPT_TOKENS", (32,))
    return decode_kernel


def tiny(benchmark: ModuleType) -> Any:
    return benchmark.make_shape("tiny", "6.25%", 6, CPU)


def settings() -> tuple[Any, ...]:
    return attention_triton_clla.tile_of, attention_triton_clla.COMPONENTS, attention_triton_clla.TOKENS


def test_a_dry_run_reports_every_case(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")  # by the twin, which is faster than an interpreter
    benchmark.main(["--dry-run", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [(row["context"], row["batch"]) for row in report["rows"]] == [(40, 1), (40, 3), (90, 1), (90, 3)]
    for row in report["rows"]:
        assert row["share_of_floor"] == pytest.approx(row["floor"] / row["all"])
        assert (row["chosen"] is None) == (row["context"] == 40)  # 48 are chosen
        assert all(row[key] > 0 for key in ("all", "logits", "values", "sdpa", "sdpa_folded", "absorbed"))
    assert all(0 <= error < 2e-2 for found in report["errors"]["tiny"].values() for error in found.values())
    last, fields = report["rows"][-1], benchmark.table(report, 48).splitlines()[-3].split(" | ")
    assert len(fields) == 16
    assert float(fields[11]) == pytest.approx(last["sdpa"] / last["all"], abs=0.005)
    assert float(fields[13]) == pytest.approx(last["sdpa"] / last["chosen"], abs=0.005)


@pytest.mark.slow
def test_settings_are_swept(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best first; a setting that goes wrong is named and left out."""
    launch = attention_triton_clla.packed_sums

    def sums(*arguments: Any) -> torch.Tensor:
        found = launch(*arguments)
        return found * torch.nan if attention_triton_clla.COMPONENTS == 16 else found

    monkeypatch.setattr(attention_triton_clla, "packed_sums", sums)
    before = settings()
    with torch.inference_mode(), benchmark._kernels(True):
        found = benchmark.sweep(tiny(benchmark), 40, 1, CPU)
    assert settings() == before
    logits, added = ([row for row in found if row["kernel"] == kernel] for kernel in ("logits", "sums"))
    assert {(row["tile"], row["components"]) for row in logits} == {
        ((n, w), c) for n, w in ((64, 8), (32, 4)) for c in (16, 32)
    }
    assert [row["seconds"] for row in logits] == sorted(row["seconds"] for row in logits)
    assert [(row["tokens"], row["components"]) for row in added] == [(32, 32)]
    assert "sums {'tokens': 32, 'components': 16}: wrong" in capsys.readouterr().err


@pytest.mark.slow
def test_kernels_are_checked_in_both_dtypes(benchmark: ModuleType) -> None:
    with torch.inference_mode(), benchmark._kernels(True):
        for dtype, tolerance in benchmark.TOLERANCE.items():
            assert all(0 < error < tolerance for error in benchmark.check(tiny(benchmark), dtype, CPU).values())


def test_the_floor_is_what_must_be_moved_or_multiplied(benchmark: ModuleType) -> None:
    """By hand, for 3 heads of 64 with 3 queries each: rows of N bytes and r components."""
    shape = benchmark.make_shape("smollm2-135m", "6.25%", 6, CPU)
    n, r = shape.layout.row_bytes, shape.layout.rank
    assert n == 288 and (shape.heads, shape.per_head, shape.size) == (3, 3, 64)
    nbytes = 5 * 100 * n + 2 * (2 * 192 * r + 100 * 64) + 5 * 100 * 9 * 4 * 2
    flops = 2 * 5 * 100 * r * 192 + 2 * 5 * 100 * 9 * (64 + r) + 2 * 5 * 9 * r * 64
    assert benchmark.floor(shape, 100, 5, benchmark.Ceilings(10.0, math.inf)) == (nbytes / 10, "bytes")
    assert benchmark.floor(shape, 100, 5, benchmark.Ceilings(math.inf, 10.0)) == (flops / 10, "products")


def test_the_floor_of_absorbed_queries(benchmark: ModuleType) -> None:
    """By hand, for 9 query heads; 64 components of 6 bits and one scale are 49 bytes."""
    shape = benchmark.make_shape("smollm2-135m", "6.25%", 6, CPU)
    r, flops = shape.layout.rank, 2 * 5 * 100 * 9 * (2 * shape.layout.rank + 64)
    assert shape.joined.row_bytes == 288 + 49 and shape.joined.rank == r + 64
    nbytes = 5 * 100 * (288 + 49) + 5 * 100 * 9 * 4 * 2
    assert benchmark.absorbed_floor(shape, 100, 5, benchmark.Ceilings(10.0, math.inf)) == nbytes / 10
    assert benchmark.absorbed_floor(shape, 100, 5, benchmark.Ceilings(math.inf, 10.0)) == flops / 10


def test_rows_are_random_latents(benchmark: ModuleType) -> None:
    inputs = benchmark.make_inputs(tiny(benchmark), 64, 2, CPU)
    latents = inputs.rows.layout.unpack(inputs.rows.data)
    assert len(latents.flatten(0, 1).unique(dim=0)) == 128
    assert 0.5 < float(latents.std()) < 1.5


def test_choosing_all_tokens_is_reading_all(benchmark: ModuleType) -> None:
    shape = tiny(benchmark)
    inputs = benchmark.make_inputs(shape, 64, 2, CPU, dtype=torch.float32)
    expected = benchmark.read_all(shape, inputs)
    torch.testing.assert_close(benchmark.read_chosen(shape, inputs, 64), expected)
    assert not torch.allclose(benchmark.read_chosen(shape, inputs, 8), expected, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [torch.nan, 3.0])
def test_wrong_kernels_are_not_timed(
    wrong: float, benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = attention_triton_clla.packed_sums
    monkeypatch.setattr(attention_clla, "packed_sums", lambda *a: right(*a) * wrong)
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


def test_settings_that_fail_are_undone(benchmark: ModuleType) -> None:
    before = settings()
    found = benchmark._tried("sums", {}, {"TOKENS": 0}, lambda: 1 / attention_triton_clla.TOKENS, None, CPU)
    assert found == {} and settings() == before
