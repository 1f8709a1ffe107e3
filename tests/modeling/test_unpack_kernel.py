"""Packed latents unpacked by the kernel and read, against loops in fp64 over the bits of rows and against the twin."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

import torch
from conftest import pico
from helpers import converted_of, mostly_slow, plan_of, stats_of, tokens
from kernel_compile import Case, check_fits, compile_all, launched
from packed_rows import MIXED, POISON, WIDTHS, by, check_same_answers, close, latents_of, random_rows
from torch import Tensor

from clla.bench.shapes import random_plan, shape_config
from clla.modeling import rows_clla, unpack_triton_clla
from clla.modeling.attention_clla import Buckets, LatentRows, judging_rank
from clla.modeling.quantize_clla import ROPE_TIER, JoinedLayout, RowLayout
from clla.modeling.rotary_clla import Turns
from clla.modeling.rows_clla import PackedRows
from clla.modeling.unpack_triton_clla import unpacked

SCALING = 0.3


@dataclass
class Problem:
    """Rows of random bits under a random codec; everything that nobody may look at is poison.

    Attributes: tiers to used: what is asked for; data [B, K, N] and the rest: what is drawn.
    """

    tiers: tuple[int, ...] = (6, 5, 4, 3, 1)
    tier_size: int = 8
    heads: int = 2
    per_head: int = 2
    size: int = 16
    pairs: int = 8
    interleaved: bool = False
    count: int = 33
    hidden: tuple[int, ...] = (0, 5)
    own_turns: bool = False  # of each sequence, rather than one rotation for all
    used: int | None = None
    rank: int | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    layer: int = 1
    layout: RowLayout = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.layout = RowLayout(self.tiers, self.tier_size)
        batch, n = len(self.hidden), self.layout.row_bytes
        around = torch.full((batch, self.count + 3, n + 5), POISON, dtype=torch.uint8)
        drawn = random_rows(self.layout, batch, self.count)
        if self.used is not None:
            drawn[:, self.used :] = POISON
        around[:, 1:-2, 3:-2] = drawn
        self.data = around.to(self.device)[:, 1:-2, 3:-2]
        channels = 2 * self.heads * self.size
        decoder = torch.full((3, channels, self.layout.rank), torch.nan)
        mean = torch.full((3, channels), torch.nan)
        decoder[self.layer] = torch.randn(channels, self.layout.rank) / self.layout.rank**0.5
        mean[self.layer] = torch.randn(channels)
        if self.rank is not None:
            decoder[self.layer, : channels // 2, self.rank :] = torch.nan
        self.codec = SimpleNamespace(decoder=decoder.to(self.device, self.dtype), mean=mean.to(self.device, self.dtype))
        angles = torch.rand(batch if self.own_turns else 1, self.count, self.pairs) * 6.28
        size = 1 + 0.2 * torch.rand(angles.shape)  # yarn scales what it rotates
        self.turns = Turns(torch.polar(size, angles).to(self.device), self.interleaved) if self.pairs else None
        query = torch.full((batch, self.heads, self.per_head + 2, self.size), torch.nan)
        query[:, :, 1:-1] = torch.randn(batch, self.heads, self.per_head, self.size)
        self.query = query.to(self.device, self.dtype)[:, :, 1:-1]

    def rows(self, buckets: Buckets | None = None) -> LatentRows:
        """As a forward pass makes them."""
        hidden = torch.tensor(self.hidden, device=self.device)
        used = None if self.used is None else torch.tensor([self.used], device=self.device)
        return LatentRows(
            self.data, self.layout, self.codec, hidden, max(self.hidden), self.turns, used=used, buckets=buckets
        )

    def latents(self) -> Tensor:
        """[B, K, r] in fp64."""
        return latents_of(self.data, self.tiers, self.tier_size)

    def decoded(self, *, values: bool, turned: bool = True) -> Tensor:
        """Keys after rotation, or values, [B, K, H, d] in fp64."""
        half, rank = self.heads * self.size, self.layout.rank if values else self.rank
        own = slice(half, None) if values else slice(half)
        decoder, mean = self.codec.decoder[self.layer, own].double().cpu(), self.codec.mean[self.layer, own]
        both = torch.einsum("bkr,cr->bkc", self.latents()[..., :rank], decoder[:, :rank]) + mean.double().cpu()
        both = both.unflatten(-1, (self.heads, self.size))
        if values or self.turns is None or not turned:
            return both
        factors, keys = self.turns.factors.cpu().to(torch.complex128), both.clone()
        for i in range(self.pairs):
            first, second = (2 * i, 2 * i + 1) if self.interleaved else (i, i + self.pairs)
            cos, sin = factors.real[:, :, i, None], factors.imag[:, :, i, None]
            keys[..., first] = both[..., first] * cos - both[..., second] * sin
            keys[..., second] = both[..., second] * cos + both[..., first] * sin
        return keys

    def naive_logits(self, index: Tensor | None = None, *, turned: bool = True) -> Tensor:
        """[B, H, M, K] in fp64."""
        keys = self.decoded(values=False, turned=turned)
        logits = torch.einsum("bhmd,bkhd->bhmk", self.query.double().cpu(), keys) * SCALING
        for b, hidden in enumerate(self.hidden):
            for k in range(self.count):
                if k < hidden or (self.used is not None and k >= self.used):
                    logits[b, :, :, k] = -torch.inf
        if index is None:
            return logits
        return torch.stack([logits[b, :, :, own] for b, own in enumerate(index.cpu())])

    def weights(self, count: int | None = None) -> Tensor:
        """[B, H, M, K] fp32 between weights that are not numbers."""
        shape = (len(self.hidden), self.heads, self.per_head, count or self.count)
        around = torch.full((*shape[:3], shape[3] + 4), torch.nan)
        around[..., 1:-3] = torch.randn(shape).mul(2).softmax(-1)
        return around.to(self.device)[..., 1:-3]


def written(problem: Problem, rows: LatentRows, *, turned: bool = True) -> Tensor:
    """Logits that were written into a part of a larger tensor, whose rest is seen to stay."""
    shape = (len(problem.hidden), problem.heads, problem.per_head, rows.count)
    around = torch.full((shape[0], shape[1] + 1, shape[2] + 1, shape[3] + 9), 7.0, device=problem.device)
    out = around[:, :-1, 1:, 4:-5]
    out.fill_(torch.nan)
    rows.logits(problem.query, problem.layer, out, scaling=SCALING, turned=turned, rank=problem.rank)
    found = out.clone()
    out.fill_(7.0)
    assert bool((around == 7.0).all())
    return found


def check(problem: Problem, *, index: Tensor | None = None, turned: bool = True, tolerance: float = 3e-6) -> None:
    """Logits, sums and values of kernels and twin are the oracle's."""
    expected = problem.naive_logits(index, turned=turned)
    weights = problem.weights(expected.shape[-1])
    latents, values = problem.latents(), problem.decoded(values=True)
    if index is not None:
        latents, values = (torch.stack([x[b, own] for b, own in enumerate(index.cpu())]) for x in (latents, values))
    exact = weights.double().cpu()
    sums = torch.einsum("bhmk,bkr->bhmr", exact, latents).flatten(1, 2)
    attended = torch.einsum("bhmk,bkhd->bhmd", exact, values)
    for kernels in (True, False):
        with by(kernels):
            rows = problem.rows() if index is None else problem.rows().chosen(index.to(problem.device))
            close(written(problem, rows, turned=turned), expected, tolerance)
            close(rows.values(weights, problem.layer), attended, tolerance)
            close(rows._sums(weights.flatten(1, 2)), sums, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 31, 33, 130])
def test_any_number_of_rows(count: int, kernel_device: str) -> None:
    check(Problem(count=count, hidden=(0, min(7, count)), device=kernel_device))


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width(bits: int, kernel_device: str) -> None:
    """48 components, so that a second block begins within the class and is not full."""
    check(Problem(tiers=(bits,) * 6, count=9, device=kernel_device))


@pytest.mark.parametrize("tier_size", [8, 24])
def test_scales_of_one_row_do_not_touch_each_other(tier_size: int, kernel_device: str) -> None:
    check(Problem(tiers=MIXED, tier_size=tier_size, count=5, device=kernel_device))


GEOMETRIES: dict[str, dict[str, Any]] = {
    "SmolLM2": {"heads": 3, "per_head": 3, "size": 64, "pairs": 32},
    "Llama": {"heads": 3, "per_head": 4, "size": 128, "pairs": 64},
    "MHA": {"heads": 8, "per_head": 1},
    "MQA": {"heads": 1, "per_head": 24, "size": 64, "pairs": 32},
    "several queries": {"heads": 3, "per_head": 9},
    "many queries": {"heads": 5, "per_head": 20, "size": 24, "pairs": 12},
    "more query rows than a program adds up": {"heads": 9, "per_head": 15},
    "five heads, four a program": {"heads": 5, "size": 64, "pairs": 32},
    "head of 8": {"size": 8, "pairs": 4},
    "head of 40": {"size": 40, "pairs": 20},
    "head of 80": {"size": 80, "pairs": 40},
    "wider than a program": {"heads": 2, "size": 272, "pairs": 136},
    "a quarter rotary": {"heads": 3, "size": 80, "pairs": 10},
    "nearly all rotary": {"heads": 3, "size": 40, "pairs": 19},
    "neighbours": {"size": 40, "pairs": 20, "interleaved": True},
    "neighbours, half rotary": {"size": 64, "pairs": 16, "interleaved": True},
    "no rotation": {"heads": 3, "size": 40, "pairs": 0},
}


@pytest.mark.parametrize("name", mostly_slow(GEOMETRIES, *list(GEOMETRIES)[:2]))
def test_heads_and_rotations(name: str, kernel_device: str) -> None:
    check(Problem(**GEOMETRIES[name], device=kernel_device))


def test_layers_without_rotation(kernel_device: str) -> None:
    check(Problem(device=kernel_device), turned=False)


@pytest.mark.parametrize("size", [16, 40])
def test_a_rotation_of_each_sequence(size: int, kernel_device: str) -> None:
    check(Problem(size=size, pairs=size // 2, own_turns=True, hidden=(0, 3, 33), device=kernel_device))


def test_rotations_in_any_order_of_memory(kernel_device: str) -> None:
    problem = Problem(own_turns=True, device=kernel_device)
    assert problem.turns is not None
    problem.turns = Turns(problem.turns.factors.mT.contiguous().mT, False)
    check(problem)


@pytest.mark.parametrize("used", [0, 1, 20, 33])
def test_rows_that_are_not_in_use_yet(used: int, kernel_device: str) -> None:
    check(Problem(used=used, device=kernel_device))


@pytest.mark.slow
@pytest.mark.parametrize("used", [None, 20])
@pytest.mark.parametrize("own_turns", [False, True])
def test_chosen_rows_in_any_order(used: int | None, own_turns: bool, kernel_device: str) -> None:
    problem = Problem(used=used, own_turns=own_turns, hidden=(0, 5, 2), device=kernel_device)
    index = torch.stack([torch.randperm(33)[:32] for _ in range(3)])
    check(problem, index=index[:, 3:])  # a view, as of a larger choice
    check(problem, index=index[:, :1])


def test_chosen_rows_take_over_what_was_read_before(kernel_device: str) -> None:
    problem = Problem(own_turns=True, device=kernel_device)
    index = torch.stack([torch.randperm(33)[:20] for _ in range(2)]).to(kernel_device)
    for kernels in (True, False):
        with by(kernels):
            rows = problem.rows()
            close(written(problem, rows), problem.naive_logits(), 3e-6)
            close(written(problem, rows.chosen(index)), problem.naive_logits(index), 3e-6)
            close(written(problem, rows), problem.naive_logits(), 3e-6)


@pytest.mark.parametrize("rank", [8, 16, 24, 40, 56, 72, 96])
def test_first_components_alone(rank: int, kernel_device: str) -> None:
    """Classes end at 16, 48 and 80; the decoders of other components are not numbers."""
    check(Problem(tiers=(5, 5, *(3,) * 4, *(2,) * 4, 1, 1), rank=rank, count=9, device=kernel_device))


@pytest.mark.parametrize("count", [1, 8, 33, 70])
@pytest.mark.parametrize("own", [None, 24])
def test_zeros_behind_the_last_row(own: int | None, count: int, kernel_device: str) -> None:
    """Rows are filled up; nothing of what lies behind them in memory is read, and nothing beside `out` is written."""
    layout = RowLayout((6, 5, 4, 3, 1), 8)
    around = torch.full((2, count + 3, layout.row_bytes + 5), POISON, dtype=torch.uint8)
    around[:, 1:-2, 3:-2] = random_rows(layout, 2, count)
    data, rank = around.to(kernel_device)[:, 1:-2, 3:-2], own or layout.rank
    expected = latents_of(data, (6, 5, 4, 3, 1), 8)[..., :rank]
    for kernels in (True, False):
        held = torch.full((2, count + 9, rank + 6), 7.0, device=kernel_device)
        out = held[:, 1 : count + 6, 2:-4]
        with by(kernels):
            assert unpacked(data, layout, out.dtype, rank=own, out=out) is out
        close(out[:, :count], expected, 1e-6)
        assert not out[:, count:].any()
        out.fill_(7.0)
        assert bool((held == 7.0).all())


@pytest.mark.parametrize("tier_size", [8, 24])
@pytest.mark.parametrize("bits", [(8, 3, 2), (5, 1)], ids=str)
def test_rows_of_two_parts(bits: tuple[int, ...], tier_size: int, kernel_device: str) -> None:
    """Each part has scales of its own in front of its own codes."""
    parts = RowLayout(bits, tier_size), RowLayout((6,) * 9, ROPE_TIER)
    data = torch.cat([random_rows(part, 2, 40) for part in parts], dim=-1)
    ends = data.split([part.row_bytes for part in parts], dim=-1)
    expected = torch.cat([latents_of(ends[0], bits, tier_size), latents_of(ends[1], (6,) * 9, ROPE_TIER)], dim=-1)
    for kernels in (True, False):
        with by(kernels):
            close(unpacked(data.to(kernel_device), JoinedLayout(*parts), torch.float32), expected, 1e-6)


@pytest.mark.parametrize("fronts", [[0, 0], [0, 5], [5, 5]], ids=str)
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("few", [None, 16])
def test_neighbours_with_one_rotation(few: int | None, turned: bool, fronts: list[int], kernel_device: str) -> None:
    """Against the exact logits of keys whose rotations are the means of their buckets."""
    size, problem = 4, Problem(hidden=(0, 5), own_turns=True, rank=few, device=kernel_device)
    factors = torch.polar(torch.ones(2, 64, 8), torch.rand(2, 64, 8)).to(kernel_device)
    means = torch.stack(
        [own[front : front + 40].unflatten(0, (10, 4)).mean(1) for own, front in zip(factors, fronts, strict=True)]
    )
    each = torch.ones(2, 33, 8, dtype=torch.complex64, device=kernel_device)
    for b, front in enumerate(fronts):
        each[b, front:] = means[b].repeat_interleave(4, 0)[: 33 - front]
    problem.turns = Turns(each, False)
    expected = problem.naive_logits(turned=turned)
    for kernels in (True, False):
        with by(kernels):
            rows = problem.rows(Buckets(size, Turns(means, False), fronts))
            found = torch.full(expected.shape, torch.nan, device=kernel_device)
            rows.estimated(problem.query, problem.layer, found, scaling=SCALING, turned=turned, rank=few)
            seen = torch.arange(33) >= torch.tensor(fronts)[:, None]  # what lies before a sequence is never met
            found = found.cpu().where(seen[:, None, None], torch.zeros(()))
            close(found, expected.where(seen[:, None, None], torch.zeros(()).double()), 3e-6)


def test_weights_of_zero_sum_to_zero(kernel_device: str) -> None:
    problem = Problem(device=kernel_device)
    weights = problem.weights().zero_()
    with by(True):
        assert not problem.rows().values(weights, problem.layer).any()


def test_offsets_in_64_bits(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack_triton_clla, "needs_wide_offsets", lambda data: True)
    check(Problem(device=kernel_device))
    check(Problem(device=kernel_device), index=torch.tensor([[32, 1, 8], [3, 9, 2]]))


def test_rows_beyond_32_bits(kernel_device: str) -> None:
    """The third row begins behind 2 GiB of a buffer that is mostly never touched."""
    problem = Problem(count=3, hidden=(0,), pairs=0, device=kernel_device)
    around = torch.empty(1, 3, 2**30 + 64, dtype=torch.uint8, device=kernel_device)
    around[..., : problem.layout.row_bytes] = problem.data
    problem.data = around[..., : problem.layout.row_bytes]
    assert unpack_triton_clla.needs_wide_offsets(problem.data)
    check(problem)


def test_offsets_are_wide_where_they_must_be() -> None:
    for rows, wide in ((2**31 // 640, False), (2**31 // 640 + 1, True)):
        data = torch.empty(1, rows, 640, dtype=torch.uint8, device="meta")
        assert unpack_triton_clla.needs_wide_offsets(data) is wide


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["SmolLM2", "a quarter rotary", "no rotation"])
@pytest.mark.usefixtures("bf16_products")
def test_decoders_of_half_precision(name: str, dtype: torch.dtype, kernel_device: str) -> None:
    tolerance = {torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    check(Problem(**GEOMETRIES[name], count=9, dtype=dtype, device=kernel_device), tolerance=tolerance)


@pytest.mark.parametrize("held", [0, 1 << 26], ids=["read anew", "kept"])
@pytest.mark.parametrize("block", [1, 10, 33])
def test_the_twin_in_blocks(block: int, held: int, kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_clla, "BLOCK", block)
    monkeypatch.setattr(rows_clla, "HELD_BYTES", held)
    problem = Problem(hidden=(0, 25), own_turns=True, device=kernel_device)
    index = torch.stack([torch.randperm(33)[:20] for _ in range(2)]).to(kernel_device)
    with by(False):
        rows = problem.rows()
        assert len(list(rows.blocks())) == (1 if held else -(-33 // block))
        for _ in range(2):  # the second layer finds what the first left
            close(written(problem, rows), problem.naive_logits(), 3e-6)
        close(written(problem, rows.chosen(index)), problem.naive_logits(index), 3e-6)
        weights = problem.weights()
        expected = torch.einsum("bhmk,bkhd->bhmd", weights.double().cpu(), problem.decoded(values=True))
        close(rows.values(weights, problem.layer), expected, 3e-6)


@pytest.mark.parametrize("rows", [9, 17, 40])
def test_many_sequences_on_a_gpu_come_in_blocks_that_fit(
    rows: int, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(hidden=(0, 5), device=kernel_device)
    monkeypatch.setattr(rows_clla, "HELD_ON_GPU", 2 * rows * problem.layout.rank * 4)
    with by(True):
        found = problem.rows()
        sizes = [latents.shape[1] for _, latents in found.filled_blocks()]
        assert sizes == [40] if rows == 40 else max(sizes) <= rows and sum(sizes) == 40
        close(written(problem, found), problem.naive_logits(), 3e-6)
        weights = problem.weights()
        expected = torch.einsum("bhmk,bkhd->bhmd", weights.double().cpu(), problem.decoded(values=True))
        close(found.values(weights, problem.layer), expected, 3e-6)


def test_small_weights_count_in_fp16(kernel_device: str) -> None:
    """Attention spread evenly over many tokens that get a hundredth of it: less each than fp16 tells from nothing."""
    layout, count = RowLayout((8, 4, 2), 8), 32768
    generator = torch.Generator().manual_seed(0)
    data = layout.pack(torch.randn(1, count, layout.rank, generator=generator) + 0.5).to(kernel_device)
    weights = torch.full((1, 1, 1, count), 0.01 / count, device=kernel_device)
    expected = 0.01 * layout.unpack(data).double().mean(1)
    rows = PackedRows(data, layout, torch.float16, torch.zeros(1, dtype=torch.int64))
    found = rows._sums(weights[0])
    error = (found[0].double() - expected).abs().max() / expected.abs().max()
    assert error < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "static"),
    [("llama", False), ("llama", True), ("smollm3", False), ("gpt_neox", True), ("cohere", False), ("gpt2", True)],
    ids=str,
)
def test_models_read_latents_by_kernels(family: str, static: bool, kernel_device: str) -> None:
    """A padded batch; rows join while tokens come. By the kernel and by the twin alike, and not by neither."""
    model = pico(family)
    stats = stats_of(model, batches=1, with_inputs=False)
    plan = plan_of(stats, model, bits=4, rank=16, window=4, flush_block=2, sinks=2)
    converted, ids = converted_of(model, plan, stats).to(kernel_device), tokens(2, 14).to(kernel_device)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    launches = 3 * len(plan.groups)  # once per token for all layers of a group
    check_same_answers(converted, ids, mask, lambda: converted.new_cache(18 if static else None), launches)


def case_of(shape: str, rank: int | None = None, dtype: torch.dtype = torch.bfloat16) -> Case:
    """One group's launch at a sixteenth of the cache, 16 sequences of 8192 tokens."""
    plan = random_plan(shape_config(shape), kv_budget="6.25%", max_layers_per_group=6)
    layout = RowLayout(plan.groups[0].tier_bits, plan.tier_size)
    data = torch.empty(16, 8192, layout.row_bytes, dtype=torch.uint8, device="meta")
    with by(True):
        loose = ("count", "length")
        call = lambda: unpacked(data, layout, dtype, rank=rank)  # noqa: E731
        return launched(unpack_triton_clla, "unpack_kernel", call, not_specialized=loose)


@pytest.mark.slow
def test_the_compiled_kernel_spills_nothing() -> None:
    layout = RowLayout(
        random_plan(shape_config("llama-3-8b"), kv_budget="6.25%", max_layers_per_group=6).groups[0].tier_bits, 8
    )
    cases = [
        case_of("smollm2-135m"),
        case_of("llama-3-8b", judging_rank(layout)),
        case_of("llama-3-8b", None, torch.float32),
    ]
    reports = compile_all(cases)
    check_fits(reports)
    assert all(used["registers"] <= 64 for report in reports for used in report.values())
