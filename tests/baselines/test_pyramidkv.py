"""PyramidKV: budgets, the tokens selected, and a stream that stays within its memory."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from caches import (
    H_Q,
    SCALING,
    B,
    D,
    H,
    config_of,
    cuts,
    full_attention,
    logits_of,
    qkv,
    reference_logits,
    stream,
)
from conftest import pico
from helpers import kept_bytes, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clla.baselines.attention import ObservedModel
from clla.baselines.pyramidkv import PyramidKvCache, kept_tokens, layer_budgets, window_scores
from clla.errors import UsageError


def test_budgets_of_the_worked_example() -> None:
    budgets = layer_budgets(128, 8, 32, 8000)
    assert budgets == [234 - 7 * i for i in range(32)] and budgets[-1] == 17 and sum(budgets) == 4016


def test_budgets_of_short_prompts() -> None:
    assert layer_budgets(128, 8, 4, 208) == [200, 147, 94, 41]  # 240 - 200 = 40, step 53
    assert layer_budgets(128, 8, 4, 100) == [92] * 4  # everything stays
    assert layer_budgets(128, 8, 1) == [120]


@given(capacity=st.integers(10, 2000), layers=st.integers(2, 80), prompt=st.integers(10, 9000) | st.just(float("inf")))
@settings(deadline=None, max_examples=100)
def test_budgets_fall_evenly_around_the_average(capacity: int, layers: int, prompt: float) -> None:
    budgets = layer_budgets(capacity, 8, layers, prompt)
    steps = {low - high for high, low in pairwise(budgets)}
    average = min(capacity, prompt) - 8
    assert len(steps) == 1 and max(steps) <= 0 <= budgets[-1] and budgets[0] <= prompt - 8
    assert average <= sum(budgets) / layers < average + layers / 2


def naive_selection(query: Tensor, key: Tensor, kernel: int, budget: int) -> tuple[list[int], list[int], list[float]]:
    """One head's tokens that stay for sure, those of which some stay, and the scores, of queries [G, W, D]."""
    (group, window, _), held = query.shape, len(key)
    mass = [0.0] * (held - window)
    for g in range(group):
        for w in range(window):
            seen = held - window + w + 1
            weights = (key[:seen] @ query[g, w] * SCALING).softmax(0).tolist()
            mass = [m + weights[s] for s, m in enumerate(mass)]
    reach = kernel // 2
    pooled = [max(mass[max(0, s - reach) : s + reach + 1]) / (group * window) for s in range(len(mass))]
    best = sorted(range(len(mass)), key=lambda s: -pooled[s])[:budget]
    cut = sorted(pooled)[-budget]
    tied = [s for s in range(len(mass)) if pooled[s] == cut]  # neighbours share a maximum, and either may be taken
    return sorted(set(best) - set(tied)), tied, pooled


def test_scores_and_selection_equal_a_naive_loop() -> None:
    query, key, _ = qkv(40)
    scores = window_scores(query[:, :, -8:], key, SCALING, 7)
    kept = kept_tokens(scores, 10, 8)
    assert scores.shape == (B, H, 32) and kept.shape == (B, H, 18)
    for b in range(B):
        for head in range(H):
            surely, tied, pooled = naive_selection(query[b, 2 * head : 2 * head + 2, -8:], key[b, head], 7, 10)
            torch.testing.assert_close(scores[b, head], torch.tensor(pooled))
            indices = kept[b, head].tolist()
            assert indices == sorted(set(indices)) and indices[10:] == list(range(32, 40))
            assert set(surely) <= set(indices[:10]) <= set(surely) | set(tied)


@pytest.mark.parametrize("chunk", (1, 5, 30))
def test_tokens_kept_are_whole_and_the_newest_among_them(chunk: int) -> None:
    tensors = qkv(60)
    cache = PyramidKvCache(config_of(1), capacity=20, block=4)
    stream(cache, tensors, cuts(60, chunk))
    layer = cache.layers[0]
    assert layer.keys.shape[2] < 60
    for b in range(B):
        for head in range(H):
            key, value = tensors[1][b, head], tensors[2][b, head]
            times = [int((key == row).all(-1).nonzero()) for row in layer.keys[b, head]]
            assert times == sorted(times) and times[-8:] == list(range(52, 60))
            assert torch.equal(layer.values[b, head], value[times])


def test_heads_choose_for_themselves_and_find_what_is_looked_for() -> None:
    """One older token per head has all of the window's attention; kernel 1, so that it comes without neighbours."""
    query, key, value = (torch.zeros(1, heads, 40, D) for heads in (H, H, H))
    query[..., 0] = 1
    for head, wanted in enumerate((3, 17, 30)):
        key[0, head, wanted, 0] = 100
    value[..., 0] = torch.arange(40.0)
    cache = PyramidKvCache(config_of(1), capacity=9, kernel=1, block=1)
    stream(cache, (query, key, value), [40])
    assert cache.layers[0].values[0, :, 0, 0].tolist() == [3, 17, 30]


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), capacity=st.integers(9, 60), block=st.integers(1, 9)
)
@settings(deadline=None, max_examples=30)
def test_a_stream_stays_within_its_memory(sizes: list[int], capacity: int, block: int) -> None:
    cache = PyramidKvCache(config_of(3), capacity=capacity, block=block)
    tensors, seen = qkv(sum(sizes), dtype=torch.bfloat16), 0
    budgets = layer_budgets(capacity, 8, 3)
    for size in sizes:
        for layer in range(3):
            stream(cache, tuple(x[:, :, seen : seen + size] for x in tensors), [size], layer)
        seen += size
        held = [layer.keys.shape[2] for layer in cache.layers]
        assert all(n == seen or b + 8 <= n < b + 8 + block for n, b in zip(held, budgets, strict=True))
        assert cache.get_seq_length() == seen
        assert (
            cache.nbytes
            == kept_bytes(cache)
            == sum(2 * B * H * n * D * 2 + B * H_Q * min(seen, 8) * D * 2 for n in held)
        )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_chunk_attends_to_all_of_itself_and_all_that_was_held(dtype: torch.dtype) -> None:
    tensors = qkv(50, dtype=dtype)
    cache = PyramidKvCache(config_of(1), capacity=20, block=1)
    first = stream(cache, tuple(x[:, :, :30] for x in tensors), [30])
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 3e-2}
    torch.testing.assert_close(first.float(), full_attention(*(x[:, :, :30] for x in tensors)), **tolerance)
    held = cache.layers[0].keys, cache.layers[0].values
    assert held[0].shape[2] == 20 and held[0].dtype == dtype
    query, key, value = (x[:, :, 30:] for x in tensors)
    expected = full_attention(query, torch.cat((held[0], key), 2), torch.cat((held[1], value), 2))
    second = stream(cache, (query, key, value), [20])
    assert second.dtype == dtype
    torch.testing.assert_close(second.float(), expected, **tolerance)


@pytest.mark.parametrize("name", ("llama", "gpt_neox", "qwen2-sliding"))
@pytest.mark.parametrize("chunk", (1, 7, 60))
def test_a_budget_above_the_text_is_lossless(name: str, chunk: int) -> None:
    model, ids = pico(name), tokens(2, 60)
    expected = reference_logits(model, ids)
    cache = PyramidKvCache(model.config, capacity=60, pyramid=False)
    torch.testing.assert_close(
        logits_of(ObservedModel(model), ids, cache, cuts(60, chunk)), expected, atol=2e-4, rtol=2e-4
    )


def test_a_small_budget_changes_the_logits_and_later_tokens_only() -> None:
    model, ids = pico(), tokens(1, 60)
    cache = PyramidKvCache(model.config, capacity=16, block=1)
    difference = (logits_of(ObservedModel(model), ids, cache, [30, 30]) - reference_logits(model, ids)).abs().amax(-1)
    assert float(difference[:, :30].max()) < 1e-3 < float(difference[:, 30:].max())
    assert len({layer.keys.shape[2] for layer in cache.layers}) == 4


def test_mistakes_are_told() -> None:
    for wrong in (
        {"capacity": 8},
        {"capacity": 20, "kernel": 4},
        {"capacity": 20, "window": 0},
        {"capacity": 20, "block": 0},
    ):
        with pytest.raises(UsageError):
            PyramidKvCache(config_of(2), **wrong)
    model, cache = pico(), PyramidKvCache(pico().config, capacity=20)
    with pytest.raises(UsageError, match="ObservedModel"):
        logits_of(model, tokens(1, 4), cache, [2, 2])
