"""The source's own cache as baseline: int4 errors, and bytes that are really kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig

from clla.baselines.stored import SourceCache, pack_int4, unpack_int4

B, H, D = 2, 3, 16
HALF = 2.0**-11  # relative rounding of fp16
SUBNORMAL = 2.0**-25  # absolute rounding of fp16 next to zero


def config_of(layers: int) -> LlamaConfig:
    """Only the number of layers matters."""
    return LlamaConfig(num_hidden_layers=layers)


def vectors(tokens: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, H, tokens, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def round_trip(x: Tensor) -> Tensor:
    return unpack_int4(*pack_int4(x))


def worst_error(x: Tensor) -> Tensor:
    """Half a step, and what fp16 does to the step and to the minimum."""
    low, high = x.float().amin(-1, keepdim=True), x.float().amax(-1, keepdim=True)
    step = ((high - low) / 15).clamp_min(1e-6)
    return step / 2 + 15 * (step * HALF + SUBNORMAL) + low.abs() * HALF + SUBNORMAL + 1e-6 * x.abs()


@given(seed=st.integers(0, 10**6), log_scale=st.floats(-5, 3), offset=st.floats(-50, 50), power=st.sampled_from((1, 3)))
@settings(deadline=None, max_examples=60)
def test_int4_error_is_bounded(seed: int, log_scale: float, offset: float, power: int) -> None:
    x = vectors(4, seed=seed) ** power * 10**log_scale + offset
    assert bool(((round_trip(x) - x).abs() <= worst_error(x)).all())


def test_int4_equals_a_naive_loop() -> None:
    x = vectors(2)[0, 0]
    codes, affine = pack_int4(x[None, None])
    assert codes.shape == (1, 1, 2, D // 2) and codes.dtype == torch.uint8
    assert affine.shape == (1, 1, 2, 2) and affine.dtype == torch.float16
    for t, row in enumerate(x.tolist()):
        scale = float(torch.tensor((max(row) - min(row)) / 15).half())
        low = float(torch.tensor(min(row)).half())
        assert affine[0, 0, t].tolist() == [scale, low]
        for c, value in enumerate(row):
            code = min(15, max(0, round((value - low) / scale)))
            byte = int(codes[0, 0, t, c // 2])
            assert (byte >> 4 if c % 2 else byte & 15) == code
            assert float(unpack_int4(codes, affine)[0, 0, t, c]) == pytest.approx(low + scale * code, rel=1e-6)


def test_fifteen_steps_are_all_used() -> None:
    ramp = torch.arange(16.0).expand(1, 1, 1, 16)
    assert torch.equal(round_trip(ramp), ramp)


@pytest.mark.parametrize("value", (0.0, 1.0, -1.0, 0.1, -3.3, 1e-7, 1000.7, -60000.0))
def test_constant_vectors_come_back(value: float) -> None:
    """No range at all: neither NaN nor a code that runs away."""
    x = torch.full((1, 1, 2, D), value)
    restored = round_trip(x)
    assert bool(restored.isfinite().all())
    torch.testing.assert_close(restored, x, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("sign", (1.0, -1.0))
def test_vectors_of_one_sign_do_not_saturate(sign: float) -> None:
    """A minimum clamped to zero would flatten these."""
    x = sign * (100 + torch.rand(1, 1, 8, D, generator=torch.Generator().manual_seed(0)))
    restored = round_trip(x)
    assert bool(((restored - x).abs() <= worst_error(x)).all())
    assert float(restored.std()) > 0.5 * float(x.std())


def stored_bytes(cache: SourceCache) -> int:
    """Bytes of every storage that a layer of the cache holds on to."""

    def storages(value: object) -> list[tuple[int, int]]:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            return [(storage.data_ptr(), storage.nbytes())] if storage.nbytes() else []
        if isinstance(value, list | tuple):
            return [found for item in value for found in storages(item)]
        return []

    return sum(
        dict(found for layer in cache.layers for value in vars(layer).values() for found in storages(value)).values()
    )


@pytest.mark.parametrize("storage", ("int4", torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn))
def test_nbytes_is_what_is_stored(storage: torch.dtype | str) -> None:
    cache = SourceCache(config_of(2), storage)
    assert cache.nbytes == 0
    tokens = 0
    per_vector = D // 2 + 4 if storage == "int4" else D * torch.empty(0, dtype=storage).element_size()
    for step, new in enumerate((7, 1, 1, 4)):
        for layer in range(2):
            cache.update(vectors(new, seed=step), vectors(new, seed=step + 10), layer)
        tokens += new
        assert cache.get_seq_length() == tokens
        assert cache.nbytes == stored_bytes(cache) == 2 * 2 * B * H * tokens * per_vector


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_int4_cache_hands_out_decoded_past_and_exact_present(dtype: torch.dtype) -> None:
    """The same whether tokens come one by one or at once."""
    cache, keys, values = (
        SourceCache(config_of(1), "int4"),
        vectors(6, seed=1, dtype=dtype),
        vectors(6, seed=2, dtype=dtype),
    )
    for start, stop in ((0, 3), (3, 4), (4, 6)):
        new_keys, new_values = keys[:, :, start:stop], values[:, :, start:stop]
        for handed, new, whole in zip(
            cache.update(new_keys, new_values, 0), (new_keys, new_values), (keys, values), strict=True
        ):
            assert handed.dtype == dtype and handed.shape[2] == stop
            assert torch.equal(handed[:, :, start:], new)
            assert torch.equal(handed[:, :, :start], round_trip(whole[:, :, :start]).to(dtype))


@pytest.mark.parametrize("storage", (torch.bfloat16, torch.float8_e4m3fn))
def test_a_storage_dtype_rounds_once(storage: torch.dtype) -> None:
    cache, keys, values = SourceCache(config_of(1), storage), vectors(5, seed=1), vectors(5, seed=2)
    cache.update(keys[:, :, :3], values[:, :, :3], 0)
    handed = cache.update(keys[:, :, 3:], values[:, :, 3:], 0)
    for got, whole in zip(handed, (keys, values), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, whole.to(storage).float())
