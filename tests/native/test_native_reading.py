"""Latents read by compiled code: the same as PyTorch reads them, for every shape and kind of number."""

from __future__ import annotations

import logging
import os
import stat
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from clla.modeling import attention_clla
from clla.modeling.attention_clla import Buckets, LatentRows
from clla.modeling.quantize_clla import RowLayout
from clla.modeling.rotary_clla import Turns
from clla.native import reading

EVERY_WIDTH = (16, 8, 8, 8, 7, 6, 5, 4, 3, 2, 1)
needs_compiler = pytest.mark.skipif(reading.compiler() is None, reason="there is no C compiler")


class Case:
    """Rows of two layers, exact tokens, and a query."""

    def __init__(
        self,
        *,
        batch: int = 1,
        heads: int = 2,
        queries: int = 3,
        tokens: int = 1,
        dim: int = 16,
        rotary: int = 16,
        count: int = 70,
        exact: int = 9,
        tiers: tuple[int, ...] = EVERY_WIDTH,
        dtype: torch.dtype = torch.float32,
        stored: torch.dtype = torch.bfloat16,
        interleaved: bool = False,
        used: int | None = None,
        bucket: int = 32,
    ) -> None:
        drawn = partial(torch.randn, generator=torch.Generator().manual_seed(count))
        self.layout = RowLayout(tiers, 8)
        decoder = drawn(2, 2 * heads * dim, self.layout.rank) / self.layout.rank**0.5
        self.codec = SimpleNamespace(decoder=decoder.to(dtype), mean=drawn(2, 2 * heads * dim).to(dtype))
        more = count + bucket
        angles = drawn(batch, more, rotary // 2) * 0.01 + torch.arange(more)[:, None] * drawn(rotary // 2) * 0.03
        every, fronts = Turns(torch.polar(torch.ones_like(angles), angles), interleaved), [0, 2][:batch]
        self.buckets = Buckets(bucket, every.means(bucket, fronts), fronts)
        self.turns = every.part(0, count)
        self.data = self.layout.pack(drawn(batch, count, self.layout.rank))
        self.query = drawn(batch, heads, queries * tokens, dim)
        self.exact = drawn(batch, 2 * heads, exact, dim).to(stored)
        self.bias = torch.where(drawn(batch, tokens, exact) > 1, float("-inf"), 0.0)
        self.hidden = torch.tensor([0, 3][:batch])
        self.used = None if used is None else torch.tensor([used])

    def rows(self, dtype: torch.dtype | None = None) -> LatentRows:
        codec = self.codec
        if dtype is not None:
            codec = SimpleNamespace(decoder=codec.decoder.to(dtype), mean=codec.mean.to(dtype))
        return LatentRows(
            self.data, self.layout, codec, self.hidden, 3, self.turns, used=self.used, buckets=self.buckets
        )

    def expected(self, **how: Any) -> Tensor:
        """By PyTorch, in fp32."""
        return self.rows(torch.float32).attended(self.query, self.exact, self.bias, 1, scaling=0.3, **how)

    def found(self, **how: Any) -> Tensor | None:
        return reading.attended(self.rows(), self.query, self.exact, self.bias, 1, scaling=0.3, **how)


@pytest.fixture(autouse=True)
def judged_by_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_clla, "JUDGING_RANK", 16)
    monkeypatch.setattr(attention_clla, "COMPILED", None)  # what is expected comes from PyTorch


SHAPES: list[dict[str, Any]] = [
    {},
    {"batch": 2, "tokens": 2},
    {"batch": 2, "used": 61},
    {"dim": 20, "rotary": 8, "interleaved": True},
    {"dim": 17, "rotary": 0},
    {"stored": torch.float32},
    {"dim": 64, "rotary": 64, "count": 700, "bucket": 16, "heads": 3, "queries": 1},
    {"count": 700, "bucket": 128, "heads": 1, "queries": 8},
    {"count": 5, "exact": 1},
    {"exact": 0},
    {"heads": 9, "queries": 8, "tokens": 2},
]


@needs_compiler
@pytest.mark.parametrize("most", [None, 5, 40])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("options", [*SHAPES, {"dtype": torch.float16, "stored": torch.float16}], ids=str)
def test_what_is_read_is_what_pytorch_reads(options: dict[str, Any], turned: bool, most: int | None) -> None:
    case = Case(**options)
    found = case.found(turned=turned, most=most)
    assert found is not None
    torch.testing.assert_close(found, case.expected(turned=turned, most=most), atol=2e-5, rtol=1e-4)


@needs_compiler
@pytest.mark.parametrize("most", [None, 5, 40])
@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_with_a_codec_in_bf16_no_more_is_rounded_than_by_pytorch(options: dict[str, Any], most: int | None) -> None:
    """Where the processor has tiles, products are of bf16 numbers, as PyTorch's are."""
    case = Case(dtype=torch.bfloat16, **options)
    expected, found = case.expected(turned=True, most=most), case.found(turned=True, most=most)
    by_pytorch = case.rows().attended(case.query, case.exact, case.bias, 1, scaling=0.3, turned=True, most=most)
    assert found is not None
    assert (found - expected).square().mean() <= 1.5 * (by_pytorch - expected).square().mean()


@needs_compiler
def test_tensors_may_lie_anyhow() -> None:
    case = Case(batch=2, tokens=2)
    expected = case.expected(turned=True, most=None)
    wide = torch.zeros(*case.query.shape[:3], 40)
    wide[..., 5:21] = case.query
    case.query, case.exact = wide[..., 5:21], case.exact.transpose(2, 3).contiguous().transpose(2, 3)
    case.data = torch.cat((case.data, case.data), dim=-1)[..., : case.data.shape[-1]]
    case.codec.decoder = case.codec.decoder.mT.contiguous().mT
    found = case.found(turned=True, most=None)
    assert found is not None
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@needs_compiler
@pytest.mark.parametrize("threads", [2, 3], ids=["one for each sequence", "all for each sequence"])
def test_several_threads_read_the_same(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case, coarse = Case(count=700, batch=2), Case(count=700, batch=2, dtype=torch.bfloat16)
    expected, alone = case.expected(turned=True, most=40), coarse.found(turned=True, most=None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found, together = case.found(turned=True, most=40), coarse.found(turned=True, most=None)
    assert found is not None and together is not None
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(together, alone, atol=2e-2, rtol=1e-2)


@needs_compiler
@pytest.mark.parametrize("tiers", [(8, 8, 4), (3, 3), (16, 1)], ids=str)
def test_nothing_is_read_beyond_the_rows(tiers: tuple[int, ...]) -> None:
    """The last row ends where memory that may not be read begins."""
    import ctypes
    import mmap

    case = Case(tiers=tiers, count=64)
    page, size = mmap.PAGESIZE, case.data.numel()
    pages = -(-size // page)
    area = mmap.mmap(-1, (pages + 1) * page)
    view = torch.frombuffer(area, dtype=torch.uint8)
    start = pages * page - size
    view[start : start + size] = case.data.flatten()
    expected = case.expected(turned=True, most=None)
    case.data = view[start : start + size].view_as(case.data)
    guard = ctypes.c_void_p(view.data_ptr() + pages * page)
    libc = ctypes.CDLL(None)
    assert libc.mprotect(guard, page, 0) == 0
    try:
        found = case.found(turned=True, most=None)
    finally:
        assert libc.mprotect(guard, page, mmap.PROT_READ | mmap.PROT_WRITE) == 0
    assert found is not None
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@needs_compiler
@pytest.mark.parametrize(("larger", "most"), [(20, 40), (400, None)])
def test_rows_of_zeros_and_large_logits_are_numbers(larger: float, most: int | None) -> None:
    case = Case(count=300)
    case.data[:, 7] = 0
    case.query *= larger
    found = case.found(turned=True, most=most)
    assert found is not None
    torch.testing.assert_close(found, case.expected(turned=True, most=most), atol=2e-3, rtol=2e-3)


def test_what_the_code_does_not_know_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Case(bucket=1).found(turned=True, most=None) is None
    assert Case(dtype=torch.float64).found(turned=True, most=None) is None
    monkeypatch.setattr(reading, "library", lambda: None)
    assert Case().found(turned=True, most=None) is None


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    reading.library.cache_clear()
    yield tmp_path / "clla"
    reading.library.cache_clear()


@needs_compiler
def test_it_is_compiled_once(fresh: Path) -> None:
    assert reading.library() is not None
    (made,) = fresh.iterdir()
    written = made.stat().st_mtime_ns
    assert not stat.S_IMODE(fresh.stat().st_mode) & 0o077, "nobody else may write what is run"
    reading.library.cache_clear()
    assert reading.library() is not None
    assert [path.stat().st_mtime_ns for path in fresh.iterdir()] == [written]


def test_without_a_compiler_or_by_wish_pytorch_reads(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="clla")
    monkeypatch.setenv(reading.OFF, "0")
    assert reading.library() is None and not fresh.exists()
    monkeypatch.delenv(reading.OFF)
    monkeypatch.setattr(reading, "compiler", lambda: None)
    reading.library.cache_clear()
    assert reading.library() is None and "no C compiler" in caplog.text
    broken = fresh.parent / "cc"
    broken.write_text("#!/bin/sh\necho cannot >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(reading, "compiler", lambda: str(broken))
    reading.library.cache_clear()
    assert reading.library() is None and "does not compile" in caplog.text
    assert os.listdir(fresh.parent) == ["cc"] or not list(fresh.iterdir())
