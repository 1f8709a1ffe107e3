"""Packed latents: layout against a naive loop, errors against the Gaussian theory."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_rows import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    check_class,
    classes_of,
    gaussian,
    naive_codes,
    naive_row,
    naive_try,
    rounding,
    scale_of,
    start_codes,
    step_of,
)
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from torch import Tensor

from clla.modeling import quantize_clla
from clla.modeling.quantize_clla import GAUSSIAN_STEP, SCALE_OFFSETS, RowLayout, tensor_digest
from clla.plan.rate import ERROR_SHARE, gaussian_error

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16)
TIER_SIZES = (8, 16, 32)
MIXED = (16, 8, 8, 7, 6, 5, 4, 4, 3, 2, 1, 1)


def naive_values(scale_codes: list[int], codes: list[int], tier_bits: tuple[int, ...], tier_size: int) -> list[float]:
    """Mid-rise levels times step times the class's scale."""
    values = []
    for scale_code, (bits, part) in zip(scale_codes, classes_of(tier_bits, tier_size), strict=True):
        step = step_of(bits, part.stop - part.start) * scale_of(scale_code)
        values += [(code - 2 ** (bits - 1) + 0.5) * step for code in codes[part]]
    return values


@pytest.mark.parametrize("tier_size", TIER_SIZES)
@pytest.mark.parametrize("tier_bits", [*((b,) for b in WIDTHS), *((b, b) for b in WIDTHS), MIXED], ids=str)
def test_any_codes_decode_as_a_naive_reader_says(tier_bits: tuple[int, ...], tier_size: int) -> None:
    rng = np.random.default_rng(1)
    layout = RowLayout(tier_bits, tier_size)
    for _ in range(4):
        scale_codes = rng.integers(0, 256, len(classes_of(tier_bits, tier_size))).tolist()
        codes = [int(rng.integers(0, 2 ** tier_bits[i // tier_size])) for i in range(layout.rank)]
        row = naive_row(scale_codes, codes, tier_bits, tier_size)
        assert layout.row_bytes == len(row)
        assert naive_codes(row, tier_bits, tier_size) == (scale_codes, codes)
        decoded = layout.unpack(torch.tensor(row, dtype=torch.uint8))
        expected = torch.tensor(naive_values(scale_codes, codes, tier_bits, tier_size))
        torch.testing.assert_close(decoded, expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("tier_size", TIER_SIZES)
@pytest.mark.parametrize("tier_bits", [*((b,) for b in WIDTHS), (4, 4, 2), MIXED], ids=str)
def test_packed_bytes_equal_a_naive_writer(tier_bits: tuple[int, ...], tier_size: int) -> None:
    layout = RowLayout(tier_bits, tier_size)
    latents = gaussian(5, layout.rank) * torch.logspace(-3, 3, 5)[:, None]
    rows = layout.pack(latents)
    assert rows.dtype == torch.uint8 and rows.shape == (5, layout.row_bytes)
    assert rows.nbytes == 5 * layout.row_bytes
    for latent, row in zip(latents.numpy(), rows.tolist(), strict=True):
        scale_codes, codes = naive_codes(row, tier_bits, tier_size)
        assert naive_row(scale_codes, codes, tier_bits, tier_size) == row
        for scale_code, (bits, part) in zip(scale_codes, classes_of(tier_bits, tier_size), strict=True):
            check_class(latent[part], bits, scale_code, codes[part])


SHAPES_OF_DATA = {
    "gaussian": lambda x: x,
    "heavy tails": lambda x: x**5,
    "one sign": lambda x: 3 + x.clamp(-2, 2),
    "constant": lambda x: torch.full_like(x, -0.6),
    "two values": lambda x: x.sign() * (1 + 2 * (x.abs() > 1)),
    "one component": lambda x: x * (torch.arange(x.shape[-1]) == 5),
    "falling": lambda x: x * torch.logspace(1, -1, x.shape[-1]),
}


@pytest.mark.parametrize("data", sorted(SHAPES_OF_DATA))
@pytest.mark.parametrize("bits", WIDTHS)
def test_the_search_picks_the_scale_of_least_error(bits: int, data: str) -> None:
    """Whatever the distribution; so never a larger squared error than with the RMS as the scale."""
    layout = RowLayout((bits,), 32)
    x = SHAPES_OF_DATA[data](gaussian(40, 32, seed=bits)) * torch.logspace(-4, 4, 40)[:, None]
    rows = layout.pack(x)
    decoded = layout.unpack(rows).double().numpy()
    for latent, row, values in zip(x.numpy(), rows.tolist(), decoded, strict=True):
        scale_codes, codes = naive_codes(row, (bits,), 32)
        check_class(latent, bits, scale_codes[0], codes)
        own = latent.astype(np.float64)
        plain = [naive_try(own, bits, start) for start in start_codes(own)]
        assert ((values - own) ** 2).sum() <= max(t.squared + 2 * rounding(own, t) for t in plain)


@pytest.mark.parametrize("offsets", [(0, 8), (0, 8, -3)], ids=str)
def test_the_rms_wins_ties(offsets: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels 0.5 (scale 1) and 1.0 (scale 2) are equally far from these pairs, exactly so in fp32."""
    monkeypatch.setitem(quantize_clla.GAUSSIAN_STEP, 1, 1.0)
    monkeypatch.setattr(quantize_clla, "SCALE_OFFSETS", offsets)
    x = torch.tensor([1.40625, 0.09375] * 4)
    assert [float((x - level).square().sum()) for level in (0.5, 1.0)] == [3.9453125] * 2
    assert int(RowLayout((1,), 8).pack(x)[0]) == 128
    nearer = x + torch.tensor([0.0, 2.0**-10] * 4)  # now the larger one leaves less
    assert int(RowLayout((1,), 8).pack(nearer)[0]) == 136


def test_first_components_of_eight_bits_do_not_share_a_scale() -> None:
    """A token whose first components dwarf the others: with one scale they would be cut off."""
    x = gaussian(50, 128) * torch.cat((torch.full((8,), 40.0), torch.ones(120)))
    layout = RowLayout((8,) * 16, 8)
    assert [stop - first for _, first, stop in layout.classes] == [8, 16, 32, 64, 8]
    shares = [
        (made.unpack(made.pack(x)) - x).square().sum() / x.square().sum() for made in (layout, RowLayout((8,), 128))
    ]
    assert shares[0] < 2e-4 and shares[1] > 20 * shares[0]


def test_all_tiers_of_a_width_share_a_scale() -> None:
    """Bytes of a row do not depend on how its classes are cut into tiers, and classes do not touch each other."""
    x = gaussian(6, 48) * torch.logspace(1, -1, 48)
    rows = RowLayout((4, 4, 4, 4, 2, 2), 8).pack(x)
    assert rows.shape == (6, 2 + 16 + 4)
    assert torch.equal(rows, RowLayout((4, 4, 2), 16).pack(x))
    wide, narrow = RowLayout((4,), 32).pack(x[:, :32]), RowLayout((2,), 16).pack(x[:, 32:])
    assert torch.equal(rows, torch.cat((wide[:, :1], narrow[:, :1], wide[:, 1:], narrow[:, 1:]), dim=1))


@given(
    tier_bits=st.lists(st.sampled_from(WIDTHS), max_size=6).map(lambda b: tuple(sorted(b, reverse=True))),
    tier_size=st.sampled_from(TIER_SIZES),
    shape=st.sampled_from([(), (1,), (3,), (2, 3), (2, 1, 2), (0,), (2, 0)]),
)
@settings(deadline=None, max_examples=40)
def test_shapes_and_bytes_of_any_layout(tier_bits: tuple[int, ...], tier_size: int, shape: tuple[int, ...]) -> None:
    layout = RowLayout(tier_bits, tier_size)
    latents = gaussian(*shape, layout.rank)
    rows = layout.pack(latents)
    assert rows.shape == (*shape, layout.row_bytes) and rows.dtype == torch.uint8
    assert layout.row_bytes * 8 == 8 * len(classes_of(tier_bits, tier_size)) + tier_size * sum(tier_bits)
    decoded = layout.unpack(rows, torch.float16)
    assert decoded.shape == latents.shape and decoded.dtype == torch.float16
    one_by_one = [layout.pack(latent) for latent in latents.reshape(latents.shape[:-1].numel(), layout.rank)]
    assert all(map(torch.equal, rows.reshape(len(one_by_one), layout.row_bytes), one_by_one))


@pytest.mark.parametrize("bits", [*range(1, 9), 16])
def test_error_share_is_the_integral_over_the_gaussian(bits: int) -> None:
    if bits == 16:
        assert ERROR_SHARE[16] < ERROR_SHARE[8] * 1e-3
        return
    step, half = GAUSSIAN_STEP[bits], 2 ** (bits - 1)

    def squared_error(x: float) -> float:
        level = min(math.floor(x / step), half - 1) + 0.5
        return (x - level * step) ** 2 * norm.pdf(x)

    edges = [i * step for i in range(half)] + [max(12.0, half * step)]
    integral = 2 * sum(quad(squared_error, a, b)[0] for a, b in pairwise(edges))
    assert ERROR_SHARE[bits] == pytest.approx(integral, rel=1e-6)


@pytest.mark.parametrize(("bits", "step"), [(1, 0.5), (2, 2.0), (3, 0.3), (4, 0.1)])
def test_gaussian_error_at_any_step_equals_monte_carlo(bits: int, step: float) -> None:
    x = np.random.default_rng(0).standard_normal(400_000)
    half = 2 ** (bits - 1)
    decoded = (np.clip(np.floor(x / step), -half, half - 1) + 0.5) * step
    assert gaussian_error(bits, step) == pytest.approx(float(((x - decoded) ** 2).mean()), rel=0.02)


@pytest.mark.parametrize("bits", range(1, 9))
def test_steps_are_the_best_for_a_gaussian(bits: int) -> None:
    best = minimize_scalar(lambda step: gaussian_error(bits, step), bounds=(1e-3, 3), method="bounded")
    assert gaussian_error(bits, GAUSSIAN_STEP[bits]) <= best.fun * (1 + 1e-4)


def test_error_shares_fall_with_the_width() -> None:
    shares = [ERROR_SHARE[b] for b in (0, *WIDTHS)]
    assert shares[0] == 1.0
    assert shares == sorted(shares, reverse=True)
    assert ERROR_SHARE[2] == pytest.approx(0.119, abs=5e-4) and ERROR_SHARE[4] == pytest.approx(0.0115, abs=5e-5)


@pytest.mark.parametrize("tier_size", TIER_SIZES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_measured_error_is_what_the_plan_reckons_with(bits: int, tier_size: int) -> None:
    """Less than planned: the class's own RMS beats the true deviation, and the search beats the RMS."""
    layout = RowLayout((bits,), tier_size)
    x = gaussian(6000, tier_size) * 0.37
    share = float((layout.unpack(layout.pack(x)) - x).square().sum() / x.square().sum())
    tried = naive_shares(gaussian(6000, tier_size, seed=1).double().numpy() * 0.37, bits)
    best = float(tried.min(0).sum())
    assert share == pytest.approx(best, rel=0.04)  # of other samples
    assert share < float(tried[SCALE_OFFSETS.index(0)].sum()) * 1.01 and share < ERROR_SHARE[bits]


@pytest.mark.parametrize("bits", range(1, 9))
def test_measured_error_of_a_large_class_tends_to_what_the_plan_reckons_with(bits: int) -> None:
    """Its RMS is the true deviation and the step the best for that: nothing is left to find but at many bits.

    There even 2048 components seldom reach the ends of the range, so a smaller scale is still better.
    """
    layout = RowLayout((bits,), 2048)
    x = gaussian(200, 2048) * 2.0 ** (torch.arange(200) / 8 - 12)[:, None]  # on the grid of the scales
    shares = (layout.unpack(layout.pack(x)) - x).square().sum(1) / x.square().sum(1)
    share = float(shares.mean()) / ERROR_SHARE[bits]
    assert share == pytest.approx(1.0, rel=0.01) if bits <= 5 else 0.75 < share < 1.0


def naive_shares(x: np.ndarray, bits: int) -> np.ndarray:
    """Squared error of each row with each offset around its RMS, over the whole energy, [offsets, rows]."""
    start = np.round(np.log2(np.sqrt((x**2).mean(1, keepdims=True))) * 8)
    half, errors = 2 ** (bits - 1), []
    for offset in SCALE_OFFSETS:
        step = step_of(bits, x.shape[1]) * 2.0 ** ((start + offset) / 8)
        errors.append((((np.clip(np.floor(x / step), -half, half - 1) + 0.5) * step - x) ** 2).sum(1))
    return np.stack(errors) / (x**2).sum()


def half_step(layout: RowLayout, rows: Tensor, x: Tensor) -> Tensor:
    """Bound on the error of each component that is not cut off, in a layout of one class."""
    ((bits, _, size),) = layout.classes
    scales = 2.0 ** ((rows[..., :1].double() - 128) / 8)
    return 0.5 * (1 + 2.0**-22) * step_of(bits, size) * scales + x.double().abs() * 2.0**-22


@pytest.mark.parametrize("search", (True, False))
@pytest.mark.parametrize("tiers", (1, 4))
@pytest.mark.parametrize("tier_size", TIER_SIZES)
def test_sixteen_bits_never_clip(tier_size: int, tiers: int, search: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worst case: one component carries the whole class; at every phase of the scale's rounding.

    The RMS as the scale always reaches it, and the search does not trade it for smaller steps.
    """
    if not search:
        monkeypatch.setattr(quantize_clla, "SCALE_OFFSETS", (0,))
    layout = RowLayout((16,) * tiers, tier_size)
    peaks = torch.logspace(-2, 2, 97)
    x = torch.zeros(2 * len(peaks), layout.rank)
    x[:, 3] = torch.cat((peaks, -peaks))
    rows = layout.pack(x)
    error = (layout.unpack(rows).double() - x).abs()
    assert bool((error <= half_step(layout, rows, x)).all())
    scale = x.double().square().mean(-1, keepdim=True).sqrt() * 2 ** (1 / 16)
    plain = 0.5 * step_of(16, layout.rank) * scale
    assert bool((error.square().sum(-1, keepdim=True) <= layout.rank * plain.square() * 1.001).all())


@given(st.integers(0, 10**6), st.floats(-3, 3), st.sampled_from(TIER_SIZES))
@settings(deadline=None, max_examples=30)
def test_sixteen_bits_bound_every_component(seed: int, exponent: float, tier_size: int) -> None:
    layout = RowLayout((16,), tier_size)
    x = gaussian(4, tier_size, seed=seed) ** 3 * 10**exponent
    rows = layout.pack(x)
    assert bool(((layout.unpack(rows).double() - x).abs() <= half_step(layout, rows, x)).all())


@pytest.mark.parametrize(("wide", "narrow"), [*pairwise(WIDTHS[::-1]), (16, 1)])
def test_an_all_zero_class_decodes_to_zeros(wide: int, narrow: int) -> None:
    layout = RowLayout((wide, narrow), 8)
    for zeros, other, bits in ((slice(0, 8), slice(8, 16), narrow), (slice(8, 16), slice(0, 8), wide)):
        x = gaussian(3, 16)
        x[:, zeros] = 0
        rows = layout.pack(x)
        assert ((rows[:, :2] == 0).sum(1) == 1).all()
        decoded = layout.unpack(rows)
        assert torch.equal(decoded[:, zeros], torch.zeros(3, 8))
        alone = RowLayout((bits,), 8)
        assert torch.equal(decoded[:, other], alone.unpack(alone.pack(x[:, other])))
    assert not layout.unpack(layout.pack(torch.zeros(2, 16))).any()


@pytest.mark.parametrize("bits", WIDTHS)
def test_zero_tokens_do_not_touch_their_neighbours(bits: int) -> None:
    layout = RowLayout((bits,), 16)
    x = gaussian(5, 16)
    x[[1, 3]] = 0
    decoded = layout.unpack(layout.pack(x))
    assert bool(decoded.isfinite().all()) and not decoded[[1, 3]].any() and decoded[[0, 2, 4]].all()


@pytest.mark.parametrize("bits", (5, 6, 7, 8, 16))
@pytest.mark.parametrize("sign", (1.0, -1.0))
def test_groups_of_one_sign_do_not_saturate(bits: int, sign: float) -> None:
    """Constant and shifted classes stay within half a step: nothing is cut off at the sign's end of the range."""
    layout = RowLayout((bits,), 16)
    constant = torch.full((1, 16), 3.7 * sign)
    shifted = sign * (5 + gaussian(50, 16).clamp(-3, 3))
    for x in (constant, shifted):
        rows = layout.pack(x)
        assert bool(((layout.unpack(rows).double() - x).abs() <= half_step(layout, rows, x)).all())


@pytest.mark.parametrize("bits", (2, 4, 8, 16))
@pytest.mark.parametrize("scale", (1e-4, 1e-2, 1e2, 3e4))
def test_relative_error_does_not_depend_on_the_scale(bits: int, scale: float) -> None:
    layout = RowLayout((bits,), 32)
    x = gaussian(500, 32)
    unit, scaled = (float((layout.unpack(layout.pack(y)) - y).norm() / y.norm()) for y in (x, x * scale))
    assert scaled == pytest.approx(unit, rel=0.05, abs=1e-6)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scale", (1e-38, 1e-12, 1e-6))
def test_scales_below_the_smallest_code_leave_a_tiny_error(bits: int, scale: float) -> None:
    """At most what the smallest code leaves, and no more than the three next larger ones may do to a component."""
    layout = RowLayout((bits,), 8)
    x = gaussian(20, 8) * scale
    rows = layout.pack(x)
    assert set(rows[:, 0].tolist()) <= {0, 1, 2, 3, 4}
    decoded = layout.unpack(rows).double()
    assert bool(decoded.isfinite().all())
    smallest = 0.5 * step_of(bits, 8) * SMALLEST_SCALE
    error = (decoded - x).abs()
    assert bool((error <= smallest * 2 ** (3 / 8) * 1.001 + x.abs()).all())
    assert bool((error.square().sum(1) <= (smallest * 1.001 + x.double().abs()).square().sum(1)).all())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scale", (1e6, 1e20, 3e37))
def test_scales_above_the_largest_code_stay_finite_and_keep_their_signs(bits: int, scale: float) -> None:
    layout = RowLayout((bits,), 8)
    x = gaussian(20, 8) * scale
    rows = layout.pack(x)
    assert set(rows[:, 0].tolist()) == {255}
    decoded = layout.unpack(rows)
    assert bool(decoded.isfinite().all()) and torch.equal(decoded.sign(), x.sign())
    assert float(decoded.abs().max()) <= 2 ** (bits - 1) * step_of(bits, 8) * LARGEST_SCALE


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_other_dtypes_pack_as_their_fp32_values(dtype: torch.dtype) -> None:
    layout = RowLayout((8, 3), 16)
    x = gaussian(7, 32).to(dtype)
    assert torch.equal(layout.pack(x), layout.pack(x.float()))


def test_strides_of_the_input_do_not_matter() -> None:
    layout = RowLayout((7, 3), 8)
    x = gaussian(16, 9, 5).transpose(0, 2)  # [5, 9, 16], not contiguous
    rows = layout.pack(x)
    assert torch.equal(rows, layout.pack(x.contiguous()))
    spread = torch.zeros(5, 9, 2 * layout.row_bytes, dtype=torch.uint8)
    spread[..., ::2] = rows
    assert torch.equal(layout.unpack(spread[..., ::2]), layout.unpack(rows))


@pytest.mark.parametrize("tier_bits", [(2, 4), (8, 2, 4), (0,), (9,), (4, 0)], ids=str)
def test_unsorted_or_unknown_widths_raise(tier_bits: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="never increasing"):
        RowLayout(tier_bits, 8)


@pytest.mark.parametrize("tier_size", (0, -8, 4, 12))
def test_tier_sizes_that_do_not_pack_raise(tier_size: int) -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        RowLayout((4,), tier_size)


def test_digest_sees_names_shapes_dtypes_and_bytes() -> None:
    x = torch.arange(6, dtype=torch.float32)
    digests = {
        tensor_digest(tensors)
        for tensors in (
            {"x": x},
            {"y": x},
            {"x": x.view(2, 3)},
            {"x": x.view(torch.int32)},
            {"x": x + torch.tensor([0, 0, 0, 0, 0, 1e-6])},
            {"x": x, "y": x},
        )
    }
    assert len(digests) == 6
    assert tensor_digest({"a": x, "b": x + 1}) == tensor_digest({"b": x + 1, "a": x})
    assert tensor_digest({"x": x.view(2, 3).mT.contiguous()}) == tensor_digest({"x": x.view(2, 3).mT})
