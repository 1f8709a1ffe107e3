"""MiniCache: directions on the sphere, retained tokens, and bytes that are really kept."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cache_helpers import B, D, H, config_of, feed, stream, vectors
from conftest import pico
from helpers import kept_bytes, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clla.baselines.grouped import GroupLayer
from clla.baselines.minicache import Merged, MiniCacheCache, angle, retained, slerp
from clla.errors import UsageError


def store_of(cache: MiniCacheCache) -> Any:
    """The store of the lowest pair."""
    return next(layer.store for layer in cache.layers if isinstance(layer, GroupLayer))


def test_worked_example() -> None:
    pair = torch.tensor([[1.0, 0.0], [0.0, 2.0]])[:, None, None, None]  # one token of one head
    merged = Merged.of(pair, t=0.6, gamma=0.0, retention="prose")
    torch.testing.assert_close(merged.direction.flatten(), torch.tensor([0.5878, 0.8090]), atol=1e-4, rtol=0)
    torch.testing.assert_close(merged.restore(1).flatten(), torch.tensor([1.1756, 1.6180]), atol=1e-4, rtol=0)
    torch.testing.assert_close(merged.restore(0).flatten(), torch.tensor([0.5878, 0.8090]), atol=1e-4, rtol=0)


def naive_slerp(previous: list[float], current: list[float], t: float) -> list[float]:
    a, b = math.hypot(*previous), math.hypot(*current)
    omega = math.acos(sum(x * y for x, y in zip(previous, current, strict=True)) / (a * b))
    first, second = math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)
    return [first * x / a + second * y / b for x, y in zip(previous, current, strict=True)]


@given(seed=st.integers(0, 10**6), t=st.floats(0, 1), log_scale=st.floats(-3, 3))
@settings(deadline=None, max_examples=40)
def test_slerp_equals_a_naive_loop(seed: int, t: float, log_scale: float) -> None:
    pair = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed))
    pair[1] *= 10**log_scale
    got = slerp(pair, t)
    for row, (previous, current) in zip(got, pair.double().transpose(0, 1).tolist(), strict=True):
        torch.testing.assert_close(row, torch.tensor(naive_slerp(previous, current, t)), atol=2e-5, rtol=0)


@pytest.mark.parametrize("t", (0.0, 0.3, 0.6, 1.0))
@pytest.mark.parametrize("turn", (0.0, 1e-7, 1e-5, 1e-3, 0.1))
def test_nearly_parallel_vectors(t: float, turn: float) -> None:
    pair = torch.tensor([[1.0, 0.0], [3 * math.cos(turn), 3 * math.sin(turn)]])
    assert float(angle(pair)) == pytest.approx(turn, rel=1e-3, abs=1e-9)
    expected = torch.tensor([math.cos(t * turn), math.sin(t * turn)])
    torch.testing.assert_close(slerp(pair, t), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("t", (0.0, 0.5, 0.6))
def test_vectors_without_a_way_between_them(t: float) -> None:
    unit = torch.tensor([0.6, 0.8])
    torch.testing.assert_close(slerp(torch.stack((-2 * unit, 3 * unit)), t), unit)
    for zero in (0, 1):
        pair = torch.stack((5 * unit, 5 * unit))
        pair[zero] = 0
        if t > 0 or zero == 1:  # at t = 0 nothing of the second is asked for
            torch.testing.assert_close(slerp(pair, t), unit)
    assert torch.equal(slerp(torch.zeros(2, 2), t), torch.zeros(2))


def turned(angles: list[float], heads: int = 1) -> Tensor:
    """A block [2, 1, heads, T, 2] whose layers stand at these angles to each other."""
    current = torch.tensor([[math.cos(a), math.sin(a)] for a in angles])
    return torch.stack((torch.tensor([1.0, 0.0]).expand_as(current), 2 * current))[:, None, None].repeat(
        1, 1, heads, 1, 1
    )


@pytest.mark.parametrize(("retention", "kept"), (("equation", [0, 1]), ("prose", [3, 4])))
def test_retention_by_the_equation_and_by_the_text(retention: Any, kept: list[int]) -> None:
    block = turned([0.5, 0.54, 1.0, 1.46, 1.5])
    assert retained(block, 0.05, retention)[0].nonzero().flatten().tolist() == kept
    assert not retained(block, 0.0, retention).any()
    assert retained(block, 2.0, retention).all()
    assert not retained(turned([0.5] * 3), 0.05, retention).any()  # no range, none stands out


def test_distance_is_the_mean_over_heads() -> None:
    block = torch.cat((turned([0.1, 1.0, 0.2]), turned([1.0, 0.0, 0.9])), dim=2)  # means 0.55, 0.5, 0.55
    assert retained(block, 0.05, "equation").tolist() == [[False, True, False]]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("retention", ("equation", "prose"))
def test_two_blocks_equal_a_naive_loop(retention: Any, dtype: torch.dtype) -> None:
    """Every token by itself: thresholds a sequence and block, retained ones exact, others turned."""
    blocks = [vectors(2, 6, seed=seed, dtype=dtype)[:, 0] for seed in (1, 2)]  # [2, B, H, 6, D]
    merged = [Merged.of(block, t=0.6, gamma=0.3, retention=retention) for block in blocks]
    whole = merged[0].extended(merged[1])
    assert {t.dtype for t in (whole.direction, whole.length, whole.exact)} == {dtype}
    assert whole.index.dtype == torch.int32
    counts = set()
    for number, block in enumerate(blocks):
        for b in range(B):
            angles = [sum(float(angle(block[:, b, h, i].float())) for h in range(H)) / H for i in range(6)]
            low, high = min(angles), max(angles)
            count = 0
            for i, distance in enumerate(angles):
                near, far = distance < low + 0.3 * (high - low), distance > high - 0.3 * (high - low)
                exact = near if retention == "equation" else far
                count += exact
                for h in range(H):
                    pair = block[:, b, h, i].float()
                    direction = torch.tensor(naive_slerp(*pair.double().tolist(), 0.6)).to(dtype).float()
                    for layer in range(2):
                        length = pair[layer].norm().to(dtype).float()
                        expected = pair[layer] if exact else direction * length
                        got = whole.restore(layer)[b, h, 6 * number + i]
                        tolerance = 0 if exact else 1e-5 if dtype == torch.float32 else 0.05
                        torch.testing.assert_close(got.float(), expected, atol=tolerance, rtol=tolerance)
            counts.add(count)
    assert len(counts) > 1  # or the padding of unequal counts would be untested


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("retention", ("equation", "prose"))
def test_nbytes_is_what_is_stored(retention: Any, dtype: torch.dtype) -> None:
    """Five layers: 2 and 3 merged, 0, 1 and the odd 4 exact."""
    cache, size, block = MiniCacheCache(config_of(5), gamma=0.2, retention=retention, block=8), dtype.itemsize, 8
    assert cache.nbytes == kept_bytes(cache) == 0
    total = 0
    for step, new in enumerate((7, 1, 1, 21)):
        feed(cache, vectors(5, new, seed=step, dtype=dtype))
        total += new
        done = total // block * block
        kept = sum(half.index.numel() for half in store_of(cache).merged)
        assert kept > 0 or not done
        exact = (3 * total + 2 * (total - done)) * 2 * B * H * D * size
        merged = done * 2 * B * H * (D + 2) * size
        assert cache.nbytes == kept_bytes(cache) == exact + merged + kept * (2 * H * D * size + 4)
        assert cache.get_seq_length(2) == cache.get_seq_length() == total


def test_state_does_not_depend_on_the_chunks() -> None:
    whole, single, text = MiniCacheCache(config_of(4), block=8), MiniCacheCache(config_of(4), block=8), vectors(4, 21)
    feed(whole, text)
    for i in range(21):
        handed = feed(single, text[..., i : i + 1, :])
    for a, b in zip(store_of(whole).tensors(), store_of(single).tensors(), strict=True):
        assert torch.equal(a, b)
    new = vectors(4, 3, seed=9)
    for got, expected in zip(feed(single, new), feed(whole, new), strict=True):
        assert torch.equal(torch.stack(got), torch.stack(expected))
    for layer, (keys, values) in enumerate(handed):
        own = torch.stack((keys, values))
        assert torch.equal(own[..., 16:, :], text[layer][..., 16:, :])  # two blocks have left
        assert torch.equal(own[..., :16, :], text[layer][..., :16, :]) == (layer < 2)


@pytest.mark.parametrize("lossless", ({"block": 100}, {"gamma": 2.0, "block": 8}))
@pytest.mark.parametrize("chunk", (1, 7, 40))
def test_lossless_settings_reproduce_the_source(lossless: dict[str, Any], chunk: int) -> None:
    model, ids = pico(), tokens(1, 40)
    expected = model(ids).logits[0].log_softmax(-1)
    got = stream(model, MiniCacheCache(model.config, **lossless), ids, chunk)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_merging_matters_from_its_first_block_on() -> None:
    """The chunk that completes a block still attends to it exactly."""
    model, ids = pico(), tokens(1, 40)
    expected = model(ids).logits[0].log_softmax(-1)
    got = stream(model, MiniCacheCache(model.config, gamma=0.0, block=16), ids, 8)
    torch.testing.assert_close(got[:16], expected[:16], atol=1e-4, rtol=1e-4)
    assert float((got[16:] - expected[16:]).abs().amax(-1).min()) > 1e-2


def test_sliding_layers_stay_as_they_are() -> None:
    model, ids = pico("qwen2-sliding"), tokens(1, 40)
    expected = stream(model, MiniCacheCache(model.config, start=0, block=100), ids, 8)
    torch.testing.assert_close(expected, model(ids).logits[0].log_softmax(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "names"),
    (({"start": 3}, "start"), ({"t": 1.5}, "t is 1.5"), ({"gamma": -1}, "gamma"), ({"block": 0}, "block")),
)
def test_settings_that_cannot_be(wrong: dict[str, Any], names: str) -> None:
    with pytest.raises(UsageError, match=names):
        MiniCacheCache(config_of(4), **wrong)
