"""Packed min-max groups: a naive loop, bounds of the error, and groups without a range."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clla.evaluate.minmax import pack, unpack

HALF = 2.0**-11  # relative rounding of fp16
SUBNORMAL = 2.0**-25  # absolute rounding of fp16 next to zero
BITS = (2, 3, 4)


def groups(count: int, size: int, *, seed: int = 0) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def round_trip(x: Tensor, bits: int) -> Tensor:
    return unpack(*pack(x, bits), bits)


def worst_error(x: Tensor, bits: int) -> Tensor:
    """Half a step, and what fp16 does to the step and to the minimum."""
    low, high = x.float().amin(-1, keepdim=True), x.float().amax(-1, keepdim=True)
    levels = 2**bits - 1
    step = ((high - low) / levels).clamp_min(1e-6)
    return step / 2 + levels * (step * HALF + SUBNORMAL) + low.abs() * HALF + SUBNORMAL + 1e-6 * x.abs()


@given(
    bits=st.sampled_from(BITS),
    size=st.sampled_from((8, 16, 32)),
    seed=st.integers(0, 10**6),
    log_scale=st.floats(-7, 3),
    offset=st.floats(-5000, 5000),
    power=st.sampled_from((1, 3)),
)
@settings(deadline=None, max_examples=100)
def test_error_is_bounded(bits: int, size: int, seed: int, log_scale: float, offset: float, power: int) -> None:
    x = groups(4, size, seed=seed) ** power * 10**log_scale + offset
    assert bool(((round_trip(x, bits) - x).abs() <= worst_error(x, bits)).all())


def naive_codes(row: list[int], bits: int, size: int) -> list[int]:
    """Codes in a row of bytes, which is one long number, lowest byte first."""
    assert len(row) * 8 == size * bits
    number = int.from_bytes(bytes(row), "little")
    return [number >> (bits * c) & (2**bits - 1) for c in range(size)]


@pytest.mark.parametrize("size", (8, 32))
@pytest.mark.parametrize("bits", BITS)
def test_equals_a_naive_loop(bits: int, size: int) -> None:
    x = groups(3, size) + 40
    packed, affine = pack(x, bits)
    assert packed.shape == (3, size * bits // 8) and packed.dtype == torch.uint8
    assert affine.shape == (3, 2) and affine.dtype == torch.float16
    decoded = unpack(packed, affine, bits)
    for i, row in enumerate(x.tolist()):
        low = float(torch.tensor(min(row)).half())
        scale = float(torch.tensor((max(row) - low) / (2**bits - 1)).half())
        assert affine[i].tolist() == [scale, low]
        expected = [min(2**bits - 1, max(0, round((value - low) / scale))) for value in row]
        assert naive_codes(packed[i].tolist(), bits, size) == expected
        assert decoded[i].tolist() == pytest.approx([low + scale * code for code in expected], rel=1e-6)


def test_a_ramp_at_two_bits() -> None:
    ramp = torch.arange(32.0)[None]
    packed, affine = pack(ramp, 2)
    assert naive_codes(packed[0].tolist(), 2, 32) == [0] * 6 + [1] * 10 + [2] * 10 + [3] * 6
    assert affine[0].tolist() == [pytest.approx(10.333, rel=HALF), 0.0]
    exact_step = torch.tensor([[31 / 3, 0.0]])
    assert float((unpack(packed, exact_step, 2) - ramp).square().mean()) == pytest.approx(8.611, abs=1e-3)
    assert float((unpack(packed, affine, 2) - ramp).square().mean()) == pytest.approx(8.611, rel=1e-3)


@pytest.mark.parametrize("bits", BITS)
def test_all_levels_are_used(bits: int) -> None:
    ramp = torch.arange(2.0**bits).repeat(8)[None]
    assert torch.equal(round_trip(ramp, bits), ramp)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", (0.0, 1.0, -1.0, 0.1, -3.3, 1e-7, 1000.7, -60000.0, 1e5, 3e38))
def test_constant_groups_come_back(value: float, bits: int) -> None:
    """No range at all: neither NaN nor a code that runs away. What fp16 cannot hold saturates."""
    restored = round_trip(torch.full((2, 16), value), bits)
    reachable = min(value, 65504.0 * 2**bits)
    torch.testing.assert_close(restored, torch.full((2, 16), reachable), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sign", (1.0, -1.0))
def test_groups_of_one_sign_do_not_saturate(sign: float, bits: int) -> None:
    """A minimum clamped to zero would flatten these."""
    x = sign * (100 + torch.rand(8, 32, generator=torch.Generator().manual_seed(0)))
    restored = round_trip(x, bits)
    assert bool(((restored - x).abs() <= worst_error(x, bits)).all())
    assert float(restored.std()) > 0.5 * float(x.std())


@pytest.mark.parametrize("bits", BITS)
def test_a_range_below_the_offset_s_rounding_keeps_its_ends(bits: int) -> None:
    """1000.2 is stored as 1000: the last level still reaches the maximum."""
    x = torch.linspace(1000.2, 1000.3, 16)[None]
    assert float((round_trip(x, bits) - x).abs().max()) <= 0.3 / (2**bits - 1)
