"""KVSharer: chains of leaders, the greedy search, and a cache in which only leaders store."""

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
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from clla.baselines.kvsharer import (
    KvSharerCache,
    collapse,
    mean_caches,
    mean_cosine,
    mean_kl,
    outputs_of,
    ranked_pairs,
    replaced,
    search,
)
from clla.errors import UsageError
from clla.modeling.hooks_clla import CACHE

BATCHES = [tokens(2, 24, seed=3), tokens(1, 24, seed=4)]
IDENTITY = {0: 0, 1: 1, 2: 2, 3: 3}


def test_a_chain_collapses() -> None:
    assert collapse({0: 0, 1: 1, 2: 1, 3: 0}, 1, 0) == {0: 0, 1: 0, 2: 0, 3: 0}
    assert collapse({0: 0, 1: 0, 2: 2}, 2, 1) == {0: 0, 1: 0, 2: 0}  # the leader follows another itself


@given(picks=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=20))
@settings(deadline=None, max_examples=60)
def test_collapse_equals_following_the_chain(picks: list[tuple[int, int]]) -> None:
    mapping, links = {i: i for i in range(8)}, {i: i for i in range(8)}
    for a, b in picks:
        layer, leader = max(a, b), min(a, b)
        if layer == leader or links[layer] != layer:
            continue
        mapping, links[layer] = collapse(mapping, layer, leader), leader
        for i in range(8):
            end = i
            while links[end] != end:
                end = links[end]
            assert mapping[i] == end


def test_pairs_are_ranked_by_distance() -> None:
    caches = {0: torch.tensor([0.0, 0.0]), 2: torch.tensor([3.0, 4.0]), 5: torch.tensor([3.0, 0.0])}
    assert ranked_pairs(caches, "dissimilar") == [(2, 0), (5, 2), (5, 0)]  # 5, 4, 3
    assert ranked_pairs(caches, "similar") == [(5, 0), (5, 2), (2, 0)]


def test_mean_caches_equal_a_naive_loop() -> None:
    model = pico()
    rows = torch.cat(BATCHES)
    sums: dict[int, Any] = dict.fromkeys(range(4), 0.0)
    for row in rows:
        cache: Any = model(row[None], use_cache=True)[CACHE]
        for i in range(4):
            sums[i] = sums[i] + torch.stack((cache.layers[i].keys[0], cache.layers[i].values[0]))
    for i, mean in mean_caches(model, BATCHES).items():
        assert mean.shape == (2, 2, 24, 16)
        torch.testing.assert_close(mean, sums[i] / len(rows), atol=1e-4, rtol=1e-4)


def test_scores_equal_naive_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = ([torch.randn(n, 3, 5, generator=generator) for n in (2, 1)] for _ in range(2))
    cosines, divergences = [], []
    for x, y in zip(torch.cat(a).flatten(0, 1).tolist(), torch.cat(b).flatten(0, 1).tolist(), strict=True):
        cosines.append(sum(p * q for p, q in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y))
        zx, zy = (math.log(sum(math.exp(v) for v in row)) for row in (x, y))
        divergences.append(sum(math.exp(q - zy) * (q - zy - p + zx) for p, q in zip(x, y, strict=True)))
    assert mean_cosine(a, b) == pytest.approx(sum(cosines) / 9, rel=1e-5)
    assert mean_kl(a, b) == pytest.approx(sum(divergences) / 9, rel=1e-5)
    assert mean_kl(a, a) == pytest.approx(0, abs=1e-6) and mean_cosine(a, a) == pytest.approx(1)


class NaiveCache(DynamicCache):
    """Every layer stores; one that shares is handed its leader's keys and values."""

    def __init__(self, config: Any, leaders: dict[int, int]) -> None:
        super().__init__(config=config)
        self.leaders, self.seen = leaders, {}  # type: ignore[var-annotated]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.seen[layer_idx] = super().update(key_states, value_states, layer_idx)
        return self.seen[self.leaders[layer_idx]]


def naive_outputs(model: Any, leaders: dict[int, int]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of the last decoder layer (seen before the final norm) and logits."""
    hidden: list[Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    logits = [model(ids, **{CACHE: NaiveCache(model.config, leaders)}).logits for ids in BATCHES]
    hook.remove()
    return hidden, logits


def naive_score(model: Any, leaders: dict[int, int], score: str) -> float:
    (hidden, logits), (hidden0, logits0) = naive_outputs(model, leaders), naive_outputs(model, IDENTITY)
    if score == "cosine":
        return float(
            torch.cat([torch.cosine_similarity(a, b, -1) for a, b in zip(hidden, hidden0, strict=True)]).mean()
        )
    losses = [
        nn.functional.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        for a, b in zip(logits, logits0, strict=True)
    ]
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("leaders", (IDENTITY, {0: 0, 1: 0, 2: 2, 3: 2}, {0: 0, 1: 0, 2: 0, 3: 0}))
def test_outputs_are_those_of_a_model_that_shares(leaders: dict[int, int]) -> None:
    model = pico()
    hidden, logits = naive_outputs(model, leaders)
    for got, expected in ((outputs_of(model, BATCHES, leaders, "cosine"), hidden),
                          (outputs_of(model, BATCHES, leaders, "kl"), logits)):  # fmt: skip
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def naive_search(model: Any, share: int, order: str, score: str, threshold: float) -> tuple[dict[int, int], int]:
    """The mapping and the number of trials."""
    caches = mean_caches(model, BATCHES)
    pairs = [(float((caches[i] - caches[j]).flatten().norm()), i, j) for i in range(4) for j in range(i)]
    links, trials = dict(IDENTITY), 0
    for _, i, j in sorted(pairs, reverse=order == "dissimilar"):
        if links[i] != i or sum(k != v for k, v in links.items()) == share:
            continue
        trial = {**links, i: j}
        flat = {}
        for k in sorted(trial):  # leaders lie below, so they are flat already
            flat[k] = k if trial[k] == k else flat[trial[k]]
        value, trials = naive_score(model, flat, score), trials + 1
        if value > threshold if score == "cosine" else value < threshold:
            links = flat
    return links, trials


# Thresholds at which some pairs of this model pass and some do not.
@pytest.mark.parametrize(("score", "threshold"), (("cosine", 0.65), ("cosine", 0.4), ("kl", 0.065), ("kl", 0.1)))
@pytest.mark.parametrize("order", ("dissimilar", "similar"))
@pytest.mark.parametrize("share", (1, 3))
def test_search_equals_a_naive_loop(share: int, order: Any, score: Any, threshold: float) -> None:
    model, steps = pico(), list[int]()
    leaders = search(model, BATCHES, share=share, order=order, score=score, threshold=threshold, on_step=steps.append)
    expected, trials = naive_search(model, share, order, score, threshold)
    assert leaders == expected and len(steps) == trials
    measured = naive_score(model, leaders, score)
    assert measured > threshold if score == "cosine" else measured < threshold


@pytest.mark.parametrize(("score", "never", "always"), (("cosine", 1.1, -1.1), ("kl", -1.0, math.inf)))
def test_search_stops_at_what_was_wanted_or_at_what_passes(score: Any, never: float, always: float) -> None:
    model = pico()
    assert search(model, BATCHES, share=3, score=score, threshold=never) == IDENTITY
    for share in range(4):
        leaders = search(model, BATCHES, share=share, score=score, threshold=always)
        assert replaced(leaders) == share
        KvSharerCache(model.config, leaders=leaders)  # a mapping that the cache takes


def test_search_leaves_sliding_layers_out() -> None:
    model = pico("qwen2-sliding")
    assert search(model, BATCHES, share=1, threshold=-1.1) == {0: 0, 1: 0}


def test_search_refuses_what_it_cannot_do() -> None:
    model = pico()
    with pytest.raises(UsageError, match="lengths"):
        search(model, [tokens(1, 8), tokens(1, 9)], share=1)
    for share in (-1, 4):
        with pytest.raises(UsageError, match="of 4 layers"):
            search(model, BATCHES, share=share)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_only_leaders_store(dtype: torch.dtype) -> None:
    cache, total = KvSharerCache(config_of(4), leaders={0: 0, 1: 1, 2: 0, 3: 0}), 0
    assert cache.nbytes == kept_bytes(cache) == 0
    for step, new in enumerate((7, 1, 3)):
        text = vectors(4, new, seed=step, dtype=dtype)
        handed = feed(cache, text)
        total += new
        assert cache.nbytes == kept_bytes(cache) == 2 * 2 * B * H * D * total * dtype.itemsize
        assert [cache.get_seq_length(i) for i in range(4)] == [total] * 4
        for layer, leader in enumerate((0, 1, 0, 0)):
            assert torch.equal(torch.stack(handed[layer]), torch.stack(handed[leader]))
            assert torch.equal(torch.stack(handed[layer])[..., -new:, :], text[leader])


@pytest.mark.parametrize("chunk", (1, 7, 40))
@pytest.mark.parametrize("leaders", (IDENTITY, {0: 0, 1: 1, 2: 0, 3: 1}))
def test_streaming_equals_one_forward_pass(leaders: dict[int, int], chunk: int) -> None:
    model, ids = pico(), tokens(1, 40)
    expected = model(ids, **{CACHE: NaiveCache(model.config, leaders)}).logits[0].log_softmax(-1)
    got = stream(model, KvSharerCache(model.config, leaders=leaders), ids, chunk)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    source = model(ids).logits[0].log_softmax(-1)
    assert torch.allclose(got, source, atol=1e-3) == (leaders == IDENTITY)


@pytest.mark.parametrize(
    "leaders", ({0: 0, 1: 2, 2: 2, 3: 3}, {0: 0, 1: 0, 2: 1, 3: 3}, {0: 0, 1: 1, 2: 2}, {**IDENTITY, 4: 4})
)
def test_mappings_that_cannot_be(leaders: dict[int, int]) -> None:
    with pytest.raises(UsageError, match="leaders"):
        KvSharerCache(config_of(4), leaders=leaders)
