"""Absorbed queries over packed rows of two parts, by kernel and twin, against loops in fp64 over the bits."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

import torch
from conftest import pico
from helpers import stats_of, strict_of, tokens
from packed_rows import MIXED, POISON, WIDTHS, by, check_same_answers, close, latents_of, random_rows
from torch import Tensor

from clla.modeling import rows_clla
from clla.modeling.absorbed_clla import AbsorbedRows
from clla.modeling.quantize_clla import ROPE_TIER, JoinedLayout, RowLayout


@dataclass
class Problem:
    """Rows of random bits and queries; everything that nobody may look at is poison.

    Attributes: tiers to used: what is asked for; data [B, K, N] and the rest: what is drawn.
    """

    tiers: tuple[int, ...] = (6, 5, 4, 3, 1)
    tier_size: int = 8
    rotary: tuple[int, ...] = (6, 6)
    heads: int = 4
    tokens: int = 1
    count: int = 33
    hidden: tuple[int, ...] = (0, 5)
    used: int | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    poison: int = POISON
    layout: JoinedLayout = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        parts = RowLayout(self.tiers, self.tier_size), RowLayout(self.rotary, ROPE_TIER)
        self.layout = JoinedLayout(*parts)
        batch, n = len(self.hidden), self.layout.row_bytes
        around = torch.full((batch, self.count + 3, n + 5), self.poison, dtype=torch.uint8)
        drawn = torch.cat([random_rows(part, batch, self.count) for part in parts], dim=-1)
        for own, first in zip(drawn, self.hidden, strict=True):
            own[:first] = self.poison
            own[self.stop :] = self.poison
        around[:, 1:-2, 3:-2] = drawn
        self.data = around.to(self.device)[:, 1:-2, 3:-2]
        query = torch.full((batch, self.heads + 2, self.tokens, self.layout.rank), torch.nan)
        query[:, 1:-1] = torch.randn(batch, self.heads, self.tokens, self.layout.rank)
        self.query = query.to(self.device, self.dtype)[:, 1:-1]
        self.scaling = 2 / self.layout.rank**0.5

    @property
    def stop(self) -> int:
        """Behind the last row that holds a token."""
        return self.count if self.used is None else self.used

    def rows(self) -> AbsorbedRows:
        """As a forward pass makes them."""
        hidden = torch.tensor(self.hidden, device=self.device)
        used = None if self.used is None else torch.tensor([self.used], device=self.device)
        return AbsorbedRows(self.data, self.layout, self.dtype, hidden, used)

    def naive(self) -> Tensor:
        """[B, H_q, T, r] in fp64, query by query."""
        latent = self.layout.parts[0]
        z = latents_of(self.data[..., : latent.row_bytes], self.tiers, self.tier_size)
        rows = torch.cat((z, latents_of(self.data[..., latent.row_bytes :], self.rotary, ROPE_TIER)), dim=-1)
        out = torch.zeros(len(self.hidden), self.heads, self.tokens, latent.rank, dtype=torch.float64)
        for b, first in enumerate(self.hidden):
            for t in range(self.tokens):
                own = slice(first, max(first, self.stop - self.tokens + 1 + t))
                for h in range(self.heads):
                    logits = rows[b, own] @ self.query[b, h, t].double().cpu() * self.scaling
                    out[b, h, t] = logits.softmax(0) @ z[b, own]
        return out


def check(problem: Problem, *, tolerance: float = 5e-6) -> None:
    """Sums of kernels and twin are the oracle's."""
    expected = problem.naive()
    for kernels in (True, False):
        with by(kernels):
            found = problem.rows().sums(problem.query, problem.scaling)
            assert found.dtype == torch.float32
            close(found, expected, tolerance)


@pytest.mark.parametrize("count", [1, 31, 33, 130])
def test_any_number_of_rows(count: int, kernel_device: str) -> None:
    check(Problem(count=count, hidden=(0, min(7, count)), device=kernel_device))


@pytest.mark.slow
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width_of_both_parts(bits: int, kernel_device: str) -> None:
    """48 components, so that a second block begins within the class and is not full."""
    check(Problem(tiers=(bits,) * 6, count=9, device=kernel_device))
    check(Problem(rotary=(bits,) * 6, count=9, device=kernel_device))


@pytest.mark.slow
@pytest.mark.parametrize("tier_size", [8, 24])
def test_parts_have_tiers_and_scales_of_their_own(tier_size: int, kernel_device: str) -> None:
    check(Problem(tiers=MIXED, tier_size=tier_size, rotary=(8, 8, 8, 5, 2), count=5, device=kernel_device))
    check(Problem(tiers=(3, 2), tier_size=tier_size, rotary=MIXED, count=5, device=kernel_device))


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "new"), [(1, 1), (9, 1), (3, 5), (5, 4), (33, 1), (9, 15)])
def test_any_number_of_queries(heads: int, new: int, kernel_device: str) -> None:
    """135 are more than one program takes."""
    check(Problem(heads=heads, tokens=new, device=kernel_device))


@pytest.mark.parametrize("new", [2, 7, 33])
def test_new_tokens_see_themselves_and_what_was_before(new: int, kernel_device: str) -> None:
    """Of all 33 tokens the first sees one row; where rows are hidden from it, none, which sums to zero."""
    problem = Problem(tokens=new, hidden=(0, 3, 30), device=kernel_device)
    check(problem)
    assert bool((problem.naive()[2, :, 0] == 0).all()) == (new > 3)


@pytest.mark.parametrize("used", [0, 1, 20, 33])
@pytest.mark.parametrize("new", [1, 3])
def test_rows_that_are_not_in_use_yet(used: int, new: int, kernel_device: str) -> None:
    check(Problem(used=used, tokens=new, device=kernel_device))


def test_what_nobody_may_see_changes_nothing(kernel_device: str) -> None:
    """Whatever bytes are there, to the last bit; also the largest scales."""
    found: dict[bool, list[Tensor]] = {True: [], False: []}
    for poison in (0, POISON, 0xFF):
        problem = Problem(poison=poison, used=29, tokens=2, hidden=(3, 0, 29), device=kernel_device)
        for kernels, sums in found.items():
            with by(kernels):
                sums.append(problem.rows().sums(problem.query, problem.scaling))
    for sums in found.values():
        assert sums[0].isfinite().all() and sums[0][:2].abs().min() > 0 and not sums[0][2].any()
        assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])


def test_rows_beyond_32_bits(kernel_device: str) -> None:
    """The third row begins behind 2 GiB of a buffer that is mostly never touched."""
    problem = Problem(count=3, hidden=(0,), device=kernel_device)
    around = torch.empty(1, 3, 2**30 + 64, dtype=torch.uint8, device=kernel_device)
    around[..., : problem.layout.row_bytes] = problem.data
    problem.data = around[..., : problem.layout.row_bytes]
    check(problem)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("bf16_products")
def test_queries_of_half_precision(dtype: torch.dtype, kernel_device: str) -> None:
    tolerance = {torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    check(Problem(tokens=2, dtype=dtype, device=kernel_device), tolerance=tolerance)


@pytest.mark.parametrize("held", [0, 1 << 26], ids=["read anew", "kept"])
@pytest.mark.parametrize("block", [1, 10, 33])
def test_the_twin_in_blocks(block: int, held: int, kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_clla, "BLOCK", block)
    monkeypatch.setattr(rows_clla, "HELD_BYTES", held)
    problem = Problem(tokens=3, hidden=(0, 25), device=kernel_device)
    with by(False):
        rows = problem.rows()
        assert len(list(rows.blocks())) == (1 if held else -(-33 // block))
        for _ in range(2):  # the second layer finds what the first left
            close(rows.sums(problem.query, problem.scaling), problem.naive(), 5e-6)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "twin"])
def test_compilers_follow_whole(kernels: bool, kernel_device: str) -> None:
    """Into one graph, without a break; kernels are single operations in it."""
    problem = Problem(tokens=2, used=30, device=kernel_device)
    torch.compiler.reset()
    with by(kernels), torch.no_grad():
        compiled = torch.compile(
            lambda query: problem.rows().sums(query, problem.scaling), fullgraph=True, backend="aot_eager"
        )
        close(compiled(problem.query), problem.naive(), 5e-6)


@pytest.mark.slow
def test_models_read_rows_by_kernels(kernel_device: str) -> None:
    """A padded batch, with a prompt of few tokens: by kernels and by the twin alike, and not by neither."""
    model = pico()
    converted, _ = strict_of(
        model, stats_of(model, with_queries=True), groups=((0, 1), (2, 3)), components=16, bits=4, rope_bits=6, rank=48
    )
    converted, ids = converted.to(kernel_device), tokens(2, 7).to(kernel_device)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    check_same_answers(converted, ids, mask, converted.new_cache, 4 * 2)  # once per call for all layers of a group
