"""The source's own cache as baseline: fp8 errors, and bytes that are really kept."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from helpers import kept_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig

from clla.errors import UsageError
from clla.evaluate.source_cache import HEADROOM, Codec, Fp8Tensor, Fp8TokenHead, MinMax, SourceCache

B, H, D = 2, 3, 16


def config_of(layers: int) -> LlamaConfig:
    """Only the number of layers matters."""
    return LlamaConfig(num_hidden_layers=layers)


def vectors(tokens: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, H, tokens, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def round_trip(codec: Codec, x: Tensor) -> Tensor:
    return codec.decode(*codec.encode(x))


def e4m3(value: float) -> float:
    """Nearest value with 3 bits of mantissa, exponents from -6 up, at most 448; ties to even."""
    exponent = max(-6, math.frexp(value)[1] - 1)
    step = 2.0 ** (exponent - 3)
    return max(-448.0, min(448.0, round(value / step) * step))


def fp32(value: float) -> float:
    return float(torch.tensor(value))


@pytest.mark.parametrize("log_scale", (-6, 0, 4))
def test_fp8_token_head_equals_a_naive_loop(log_scale: int) -> None:
    x = vectors(3)[0, 0] * 10.0**log_scale
    codes, scales = Fp8TokenHead().encode(x[None, None])
    assert codes.shape == (1, 1, 3, D) and codes.element_size() == 1
    assert scales.shape == (1, 1, 3, 1) and scales.dtype == torch.float16
    decoded = Fp8TokenHead().decode(codes, scales)
    for t, row in enumerate(x.tolist()):
        scale = float(torch.tensor(max(2.0**-14, max(abs(v) for v in row) / 448)).half())
        assert float(scales[0, 0, t]) == scale
        expected = [e4m3(fp32(v / scale)) * scale for v in row]
        assert decoded[0, 0, t].tolist() == pytest.approx(expected, rel=1e-6)


@given(seed=st.integers(0, 10**6), log_scale=st.floats(-8, 6), offset=st.floats(-50, 50))
@settings(deadline=None, max_examples=60)
def test_fp8_error_is_bounded(seed: int, log_scale: float, offset: float) -> None:
    """Half a unit of 3 bits of mantissa, or of the subnormals; nothing saturates."""
    x = vectors(4, seed=seed) * 10**log_scale + offset
    token_scale = (x.abs().amax(-1, keepdim=True) / 448).clamp_min(2.0**-14)
    tensor_scale = x.abs().amax() * HEADROOM / 448
    for codec, scale in ((Fp8TokenHead(), token_scale), (Fp8Tensor(), tensor_scale)):
        error = (round_trip(codec, x) - x).abs()
        assert bool((error <= x.abs() * 2.0**-4 * 1.001 + scale * 2.0**-10 * 1.001).all())


def test_fp8_scale_is_fixed_by_the_first_chunk() -> None:
    codec, first = Fp8Tensor(), vectors(4)
    codec.encode(first)
    reach = float(first.abs().amax()) * HEADROOM
    later = torch.tensor([0.9, 1.0, 1.1, 100.0, -100.0]).mul(reach).expand(B, H, 1, 5)
    codec.encode(later)
    expected = torch.tensor([0.9, 1.0, 1.0, 1.0, -1.0]).mul(reach).expand(B, H, 1, 5)
    torch.testing.assert_close(round_trip(codec, later), expected, rtol=2.0**-4, atol=0)
    torch.testing.assert_close(round_trip(codec, later)[..., 2:], expected[..., 2:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("new_codec", (Fp8Tensor, Fp8TokenHead))
def test_zeros_come_back_and_spoil_nothing(new_codec: type[Codec]) -> None:
    codec, later = new_codec(), vectors(2)
    assert torch.equal(round_trip(codec, torch.zeros(B, H, 3, D)), torch.zeros(B, H, 3, D))
    torch.testing.assert_close(round_trip(codec, later), later, rtol=2.0**-4, atol=2.0**-9)


BYTES_A_VECTOR = {
    "int4": D // 2 + 4,
    "fp8": D,
    "fp8-token-head": D + 2,
    torch.bfloat16: 2 * D,
    torch.float16: 2 * D,
    torch.float32: 4 * D,
}


@pytest.mark.parametrize("storage", BYTES_A_VECTOR, ids=str)
def test_nbytes_is_what_is_stored(storage: torch.dtype | str) -> None:
    layers, tokens = 2, 0
    cache = SourceCache(config_of(layers), storage)
    assert cache.nbytes == 0
    scales = 2 * layers * 4 if storage == "fp8" else 0
    for step, new in enumerate((7, 1, 1, 4)):
        for layer in range(layers):
            cache.update(vectors(new, seed=step), vectors(new, seed=step + 10), layer)
        tokens += new
        assert cache.get_seq_length() == tokens
        assert cache.nbytes == kept_bytes(cache) == 2 * layers * B * H * tokens * BYTES_A_VECTOR[storage] + scales


@pytest.mark.parametrize(
    ("storage", "new_codec"), (("int4", partial(MinMax, 4)), ("fp8", Fp8Tensor), ("fp8-token-head", Fp8TokenHead))
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_encoded_caches_hand_out_decoded_past_and_exact_present(
    storage: str, new_codec: type[Codec], dtype: torch.dtype
) -> None:
    """The same whether tokens come one by one or at once, after the first chunk."""
    cache = SourceCache(config_of(1), storage)
    keys, values = vectors(6, seed=1, dtype=dtype), vectors(6, seed=2, dtype=dtype)
    codecs = new_codec(), new_codec()
    for codec, whole in zip(codecs, (keys, values), strict=True):
        codec.encode(whole[:, :, :3])
    for start, stop in ((0, 3), (3, 4), (4, 6)):
        new_keys, new_values = keys[:, :, start:stop], values[:, :, start:stop]
        for handed, new, whole, codec in zip(
            cache.update(new_keys, new_values, 0), (new_keys, new_values), (keys, values), codecs, strict=True
        ):
            assert handed.dtype == dtype and handed.shape[2] == stop
            assert torch.equal(handed[:, :, start:], new)
            assert torch.equal(handed[:, :, :start], round_trip(codec, whole[:, :, :start]).to(dtype))


def test_a_storage_dtype_rounds_once() -> None:
    cache, keys, values = SourceCache(config_of(1), torch.bfloat16), vectors(5, seed=1), vectors(5, seed=2)
    cache.update(keys[:, :, :3], values[:, :, :3], 0)
    handed = cache.update(keys[:, :, 3:], values[:, :, 3:], 0)
    for got, whole in zip(handed, (keys, values), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, whole.bfloat16().float())


@pytest.mark.parametrize("storage", (torch.float8_e4m3fn, torch.int8, "int2"))
def test_unscaled_fp8_and_unknown_storage_are_refused(storage: torch.dtype | str) -> None:
    with pytest.raises(UsageError, match="fp8-token-head"):
        SourceCache(config_of(1), storage)
