"""KIVI: which tokens are quantized, in which groups, and what is kept of them."""

from __future__ import annotations

import pytest
import torch
from conftest import pico
from helpers import kept_bytes, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, PreTrainedModel

from clla.baselines.kivi import KiviCache
from clla.errors import UsageError
from clla.evaluate.minmax import pack, unpack
from clla.evaluate.perplexity import Subject, stream_logits

B, H, D = 2, 3, 64
LAYERS = 2


def config_of(head_dim: int = D) -> LlamaConfig:
    return LlamaConfig(num_hidden_layers=LAYERS, num_attention_heads=H, hidden_size=H * head_dim)


def vectors(count: int, *, seed: int = 0, dtype: torch.dtype = torch.float32, head_dim: int = D) -> Tensor:
    return torch.randn(B, H, count, head_dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fill(cache: KiviCache, keys: Tensor, values: Tensor, chunks: list[int]) -> tuple[Tensor, Tensor]:
    """What the cache hands out with the last chunk, the same in both layers."""
    handed = []
    for layer in range(LAYERS):
        start = 0
        for chunk in chunks:
            part = slice(start, start + chunk)
            last = cache.update(keys[:, :, part], values[:, :, part], layer)
            start += chunk
        handed.append(last)
    assert all(torch.equal(a, b) for a, b in zip(*handed, strict=True))
    return handed[0]


def settled(x: Tensor, cache_tokens: int, *, of_keys: bool, bits: int, residual: int, size: int, sinks: int) -> Tensor:
    """The first `cache_tokens` of x as KIVI keeps them, group by group in a loop."""
    out = x[:, :, :cache_tokens].clone()
    rest = max(0, cache_tokens - sinks)
    stop = sinks + (rest - rest % residual if of_keys else max(0, rest - residual))
    size = size if of_keys else min(size, x.shape[3])
    for t in range(sinks, stop, size if of_keys else 1):
        for c in range(0, x.shape[3], 1 if of_keys else size):
            for b in range(B):
                for h in range(H):
                    group = (b, h, slice(t, t + size), c) if of_keys else (b, h, t, slice(c, c + size))
                    out[group] = unpack(*pack(x[group], bits), bits).to(x.dtype)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("head_dim", (16, 32, 64))
@pytest.mark.parametrize(("bits", "sinks"), ((2, 0), (3, 5), (4, 1)))
def test_hands_out_what_a_naive_loop_keeps(bits: int, sinks: int, head_dim: int, dtype: torch.dtype) -> None:
    setting = {"bits": bits, "residual": 32, "sinks": sinks}
    keys, values = (vectors(80, seed=i, dtype=dtype, head_dim=head_dim) for i in (1, 2))
    cache = KiviCache(config_of(head_dim), group_size=16, **setting)
    handed = fill(cache, keys, values, [70, 10])
    for got, whole, of_keys in zip(handed, (keys, values), (True, False), strict=True):
        assert got.dtype == dtype and got.shape == whole.shape
        assert torch.equal(got[:, :, 70:], whole[:, :, 70:])
        assert torch.equal(got[:, :, :70], settled(whole, 70, of_keys=of_keys, size=16, **setting))


def quantized(cache: KiviCache) -> tuple[int, int]:
    keys, values = cache.layers[0].stores
    return keys.quantized, values.quantized


@pytest.mark.parametrize("sinks", (0, 4))
def test_which_tokens_are_exact(sinks: int) -> None:
    """Of 300 tokens keys quantize 256, values 172; then keys wait for a full residual, values follow one by one."""
    cache = KiviCache(config_of(), bits=2, sinks=sinks)
    fill(cache, vectors(300 + sinks), vectors(300 + sinks), [300 + sinks])
    keys, values = cache.layers[0].stores
    assert quantized(cache) == (256, 172)
    assert (keys.newest.shape[2], values.newest.shape[2]) == (44, 128)
    assert keys.first.shape[2] == values.first.shape[2] == sinks
    expected = [(256 if n < 384 else 384, n - 128) for n in range(301, 390)]
    for step in expected:
        fill(cache, vectors(1), vectors(1), [1])
        assert quantized(cache) == step


def test_a_ramp_through_the_cache() -> None:
    """Keys see the ramp along the tokens, values along the channels: each in one group."""
    ramp = torch.arange(32.0)
    keys, values = ramp[:, None].expand(1, 1, 32, 32), ramp.expand(1, 1, 64, 32)
    cache = KiviCache(LlamaConfig(num_hidden_layers=1, head_dim=32), bits=2, residual=32)
    cache.update(torch.cat((keys, keys), 2), values, 0)
    handed = cache.update(keys[:, :, :1], values[:, :, :1], 0)
    for got, want in zip((handed[0][0, 0, :32], handed[1][0, 0, :32]), (ramp[:, None], ramp[None]), strict=True):
        levels, counts = got.unique(return_counts=True)
        assert counts.tolist() == [6 * 32, 10 * 32, 10 * 32, 6 * 32]
        assert levels.tolist() == pytest.approx([0, 31 / 3, 62 / 3, 31], rel=2.0**-11)
        assert float((got - want).square().mean()) == pytest.approx(8.611, rel=1e-3)


@given(
    chunks=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    bits=st.sampled_from((2, 3, 4)),
    sinks=st.integers(0, 40),
    residual=st.sampled_from((16, 32)),
)
@settings(deadline=None, max_examples=25)
def test_chunks_do_not_matter(chunks: list[int], bits: int, sinks: int, residual: int) -> None:
    """After N tokens the state is the same for any chunks, down to one token."""
    count = sum(chunks)
    keys, values = vectors(count + 1, seed=1), vectors(count + 1, seed=2)
    caches = [KiviCache(config_of(), bits=bits, residual=residual, group_size=16, sinks=sinks) for _ in range(3)]
    handed = [
        fill(cache, keys, values, [*parts, 1])
        for cache, parts in zip(caches, (chunks, [count], [1] * count), strict=True)
    ]
    for other, cache in zip(handed[1:], caches[1:], strict=True):
        assert torch.equal(other[0], handed[0][0]) and torch.equal(other[1], handed[0][1])
        assert cache.nbytes == caches[0].nbytes


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(("bits", "sinks"), ((2, 0), (3, 4), (4, 0)))
def test_nbytes_is_what_is_stored(bits: int, sinks: int, dtype: torch.dtype) -> None:
    cache = KiviCache(config_of(), bits=bits, sinks=sinks)
    assert cache.nbytes == 0
    keys, values = vectors(300 + sinks, dtype=dtype), vectors(300 + sinks, dtype=dtype)
    fill(cache, keys, values, [2, 200, 98 + sinks])
    exact, packed = 44 + 128 + 2 * sinks, 256 + 172
    itemsize = keys.element_size()
    assert cache.get_seq_length() == 300 + sinks
    assert cache.nbytes == kept_bytes(cache) == LAYERS * B * H * (D * exact * itemsize + D * packed * (bits + 1) // 8)


def logits(model: PreTrainedModel, new_cache: object, ids: Tensor, chunk: int) -> Tensor:
    return torch.cat([part for part, _ in stream_logits(Subject(model, new_cache), ids, chunk)])


@pytest.mark.parametrize("name", ("llama", "qwen2-sliding", "gpt_neox"))
def test_a_residual_longer_than_the_text_changes_nothing(name: str) -> None:
    model, ids = pico(name), tokens(1, 60)
    expected = logits(model, lambda: DynamicCache(config=model.config), ids, 7)
    kept = logits(model, lambda: KiviCache(model.config, bits=2, residual=64), ids, 7)
    assert torch.equal(kept, expected)
    sunk = logits(model, lambda: KiviCache(model.config, bits=2, residual=32, sinks=60), ids, 7)
    assert torch.equal(sunk, expected)


def test_more_bits_are_nearer_to_the_source() -> None:
    model, ids = pico(), tokens(1, 200)
    source = logits(model, lambda: DynamicCache(config=model.config), ids, 20)

    def error(bits: int) -> float:
        kept = logits(model, lambda: KiviCache(model.config, bits=bits, residual=32), ids, 20)
        assert torch.equal(kept[:20], source[:20])
        return float((source.exp() * (source - kept)).sum(-1).mean())

    errors = [error(bits) for bits in (4, 3, 2)]
    assert 0 < errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize(
    ("head_dim", "setting"),
    (
        (D, {"bits": 1}),
        (D, {"bits": 2, "group_size": 12}),
        (D, {"bits": 2, "group_size": 0}),
        (D, {"bits": 2, "residual": 48}),
        (D, {"bits": 2, "residual": 0}),
        (D, {"bits": 2, "sinks": -1}),
        (80, {"bits": 2}),
        (12, {"bits": 2}),
    ),
    ids=str,
)
def test_settings_that_cannot_be_packed_are_refused(head_dim: int, setting: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        KiviCache(config_of(head_dim), **setting)
