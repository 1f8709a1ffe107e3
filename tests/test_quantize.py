"""Packed latents: layout against a naive loop, errors against the Gaussian theory."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from torch import Tensor

from clla.convert.quantize import ERROR_SHARE, gaussian_error
from clla.modeling.quantize_clla import GAUSSIAN_STEP, PLANES, RowLayout, tensor_digest

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16)
TIER_SIZES = (8, 16, 32)
MIXED = (16, 8, 8, 7, 6, 5, 4, 4, 3, 2, 1, 1)
SMALLEST_SCALE = 2.0 ** (-127 / 8)  # code 1
LARGEST_SCALE = 2.0 ** (127 / 8)  # code 255


def step_of(bits: int, tier_size: int) -> float:
    return 2.2 * math.sqrt(tier_size) / 65536 if bits == 16 else GAUSSIAN_STEP[bits]


def naive_row(scale_codes: list[int], codes: list[int], tier_bits: tuple[int, ...], tier_size: int) -> list[int]:
    """Scales, then for each run of equal widths its planes: byte j holds components j, j + m, j + 2m, …"""
    row = list(scale_codes)
    tier = 0
    while tier < len(tier_bits):
        bits, stop = tier_bits[tier], tier
        while stop < len(tier_bits) and tier_bits[stop] == bits:
            stop += 1
        own = codes[tier * tier_size : stop * tier_size]
        shift = 0
        for width in PLANES[bits]:
            count = len(own) * width // 8  # m
            for j in range(count):
                byte = 0
                for i in range(8 // width):
                    byte += (own[j + i * count] >> shift) % 2**width * 2 ** (width * i)
                row.append(byte)
            shift += width
        tier = stop
    return row


def naive_codes(latent: np.ndarray, tier_bits: tuple[int, ...], tier_size: int) -> tuple[list[int], list[int]]:
    """Scale codes and component codes of one latent, component by component."""
    scale_codes, codes = [], []
    for t, bits in enumerate(tier_bits):
        tier = latent[t * tier_size : (t + 1) * tier_size].astype(np.float32)
        rms = math.sqrt(float(np.mean(tier.astype(np.float64) ** 2)))
        scale_code = 0 if rms == 0 else min(255, max(1, round(math.log2(rms) * 8) + 128))
        step = np.float32(step_of(bits, tier_size)) * np.float32(2.0 ** ((scale_code - 128) / 8))
        scale_codes.append(scale_code)
        for x in tier:
            level = math.floor(np.float32(x) / step) if scale_code else 0
            codes.append(min(2 ** (bits - 1) - 1, max(-(2 ** (bits - 1)), level)) + 2 ** (bits - 1))
    return scale_codes, codes


def naive_values(scale_codes: list[int], codes: list[int], tier_bits: tuple[int, ...], tier_size: int) -> list[float]:
    """Mid-rise levels times step times scale."""
    values = []
    for i, code in enumerate(codes):
        bits, scale_code = tier_bits[i // tier_size], scale_codes[i // tier_size]
        scale = 2.0 ** ((scale_code - 128) / 8) if scale_code else 0.0
        values.append((code - 2 ** (bits - 1) + 0.5) * step_of(bits, tier_size) * scale)
    return values


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tier_size", TIER_SIZES)
@pytest.mark.parametrize("tier_bits", [*((b,) for b in WIDTHS), *((b, b) for b in WIDTHS), MIXED], ids=str)
def test_any_codes_decode_as_a_naive_reader_says(tier_bits: tuple[int, ...], tier_size: int) -> None:
    rng = np.random.default_rng(1)
    layout = RowLayout(tier_bits, tier_size)
    for _ in range(4):
        scale_codes = rng.integers(0, 256, len(tier_bits)).tolist()
        codes = [int(rng.integers(0, 2 ** tier_bits[i // tier_size])) for i in range(layout.rank)]
        row = naive_row(scale_codes, codes, tier_bits, tier_size)
        assert layout.row_bytes == len(row)
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
    for latent, row in zip(latents, rows, strict=True):
        assert naive_row(*naive_codes(latent.numpy(), tier_bits, tier_size), tier_bits, tier_size) == row.tolist()


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
    assert layout.row_bytes * 8 == sum(8 + tier_size * b for b in tier_bits)
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
    """The tier's own RMS is a better scale than the true deviation, so a little less than planned."""
    layout = RowLayout((bits,), tier_size)
    x = gaussian(6000, tier_size) * 0.37
    share = float((layout.unpack(layout.pack(x)) - x).square().sum() / x.square().sum())
    assert 0.75 * ERROR_SHARE[bits] < share < 1.05 * ERROR_SHARE[bits]


@pytest.mark.parametrize("tier_size", TIER_SIZES)
def test_sixteen_bits_never_clip(tier_size: int) -> None:
    """Worst case: one component carries the whole tier; at every phase of the scale's rounding."""
    layout = RowLayout((16,), tier_size)
    peaks = torch.logspace(-2, 2, 97)
    x = torch.zeros(2 * len(peaks), tier_size)
    x[:, 3] = torch.cat((peaks, -peaks))
    scale = x.square().mean(-1, keepdim=True).sqrt() * 2 ** (1 / 16)
    error = (layout.unpack(layout.pack(x)) - x).abs()
    assert bool((error <= 0.5001 * step_of(16, tier_size) * scale).all())


@given(st.integers(0, 10**6), st.floats(-3, 3), st.sampled_from(TIER_SIZES))
@settings(deadline=None, max_examples=30)
def test_sixteen_bits_bound_every_component(seed: int, exponent: float, tier_size: int) -> None:
    layout = RowLayout((16,), tier_size)
    x = gaussian(4, tier_size, seed=seed) ** 3 * 10**exponent
    scale = x.square().mean(-1, keepdim=True).sqrt() * 2 ** (1 / 16)
    assert bool(((layout.unpack(layout.pack(x)) - x).abs() <= 0.501 * step_of(16, tier_size) * scale).all())


@pytest.mark.parametrize("bits", WIDTHS)
def test_an_all_zero_tier_decodes_to_zeros(bits: int) -> None:
    layout = RowLayout((bits, bits), 8)
    x = torch.cat((torch.zeros(3, 8), gaussian(3, 8)), dim=-1)
    decoded = layout.unpack(layout.pack(x))
    assert torch.equal(decoded[:, :8], torch.zeros(3, 8))
    alone = RowLayout((bits,), 8)
    assert torch.equal(decoded[:, 8:], alone.unpack(alone.pack(x[:, 8:])))


@pytest.mark.parametrize("bits", (5, 6, 7, 8, 16))
@pytest.mark.parametrize("sign", (1.0, -1.0))
def test_groups_of_one_sign_do_not_saturate(bits: int, sign: float) -> None:
    """Constant and shifted tiers stay within half a step: nothing is cut off at the sign's end of the range."""
    layout = RowLayout((bits,), 16)
    constant = torch.full((1, 16), 3.7 * sign)
    shifted = sign * (5 + gaussian(50, 16).clamp(-3, 3))
    for x in (constant, shifted):
        scale = x.square().mean(-1, keepdim=True).sqrt() * 2 ** (1 / 16)
        assert bool(((layout.unpack(layout.pack(x)) - x).abs() <= 0.501 * step_of(bits, 16) * scale).all())


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
    layout = RowLayout((bits,), 8)
    x = gaussian(20, 8) * scale
    decoded = layout.unpack(layout.pack(x))
    assert bool(decoded.isfinite().all())
    assert bool(((decoded - x).abs() <= 0.501 * step_of(bits, 8) * SMALLEST_SCALE + x.abs()).all())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scale", (1e6, 1e20, 3e37))
def test_scales_above_the_largest_code_stay_finite_and_keep_their_signs(bits: int, scale: float) -> None:
    layout = RowLayout((bits,), 8)
    x = gaussian(20, 8) * scale
    decoded = layout.unpack(layout.pack(x))
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
