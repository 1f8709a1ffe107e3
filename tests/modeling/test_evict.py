"""Token eviction on top of latents: which rows stay, and a cache that stays within its plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import pico
from helpers import converted_of, plan_of, stats_of, tokens
from torch import Tensor

from clla.artifacts.plan import Plan
from clla.modeling.evict_clla import attention_weights, best, observed_weight
from clla.modeling.hooks_clla import CACHE
from clla.modeling.modeling_clla import CllaForCausalLM

FAMILIES = ("llama", "qwen2-sliding", "gpt_neox", "mixtral")


def evicting(name: str, capacity: int | None, *, window: int = 16, chunk: int = 24) -> tuple[CllaForCausalLM, Plan]:
    model = pico(name)
    stats = stats_of(model, with_inputs=False, batches=4)
    plan = replace(plan_of(stats, model, window=window), capacity=capacity)
    return converted_of(model, plan, stats, prefill_chunk=chunk), plan


def naive_weights(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """[B, H_q, T, S], one query at a time."""
    batch, heads, count, _ = query.shape
    per_head, total = heads // key.shape[1], key.shape[2]
    out = torch.zeros(batch, heads, count, total)
    for b in range(batch):
        for h in range(heads):
            for t in range(count):
                seen = total - count + t + 1
                logits = key[b, h // per_head, :seen] @ query[b, h, t] * scaling
                out[b, h, t, :seen] = logits.softmax(0)
    return out


def test_attention_weights_equal_a_naive_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 6, 5, 8, generator=generator), torch.randn(2, 3, 9, 8, generator=generator)
    naive = naive_weights(query, key, 0.3)
    none = torch.zeros(2, dtype=torch.long)
    torch.testing.assert_close(attention_weights(query, key, 0.3, none).flatten(1, 2), naive)
    torch.testing.assert_close(observed_weight(query, key, 0.3, 2, none), naive[:, :, -2:].mean(1).sum(1))


def test_padding_gets_no_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 6, 5, 8, generator=generator), torch.randn(2, 3, 9, 8, generator=generator)
    weights = attention_weights(query, key, 0.3, torch.tensor([3, 6])).flatten(1, 2)
    torch.testing.assert_close(weights[:1, :, :, 3:], naive_weights(query[:1], key[:1, :, 3:], 0.3))
    assert not weights[1, :, 0].isnan().any() and float(weights[1, :, 2:].abs().sum()) > 0
    assert float(weights[1, :, :, :6].abs().max()) == 0


def test_the_best_rows_stay_in_order_with_their_neighbours() -> None:
    score = torch.zeros(1, 40)
    score[0, 30], score[0, 12] = 2.0, 1.0
    assert best(score, 14, torch.zeros(1, dtype=torch.long), 0)[0].tolist() == [*range(9, 16), *range(27, 34)]


def test_padding_leaves_first_and_sinks_never() -> None:
    score = torch.rand(2, 12, generator=torch.Generator().manual_seed(0)) + 1
    kept = best(score, 6, torch.tensor([8, 3]), 2)
    assert kept[0].tolist() == [6, 7, 8, 9, 10, 11]  # the end of the padding fills up what is left
    assert kept[1, :2].tolist() == [3, 4]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_capacity_that_is_never_reached_changes_nothing(name: str) -> None:
    ids = tokens(1, 90)
    plain, _ = evicting(name, None)
    roomy, _ = evicting(name, 200)
    torch.testing.assert_close(roomy(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_bytes_stay_within_the_plan(name: str) -> None:
    model, plan = evicting(name, 32)
    cache, ids = model.new_cache(), tokens(1, 200)
    for start in range(0, 150, 50):
        model(ids[:, start : start + 50], past_key_values=cache)
    for step in range(150, 200):
        model(ids[:, step : step + 1], past_key_values=cache)
        for group in cache.groups:
            assert group.held is not None and group.held.rows.shape[1] == 32 == group.encoded - group.evicted
            assert group.held.positions.shape == (1, 32)
    assert cache.get_seq_length() == 200
    planned = plan.bytes_at(200) + sum(t.nbytes for layer in cache.kept.values() for t in (layer.keys, layer.values))
    assert abs(cache.nbytes - planned) <= 16 + len(plan.groups) * 2 * 32  # offsets; scores that wait for the next block


def test_kept_rows_are_those_of_an_unbounded_cache() -> None:
    """A kept row decodes to the key that it had, at the position that it had."""
    model, _ = evicting("llama", 24)
    unbounded, _ = evicting("llama", None)
    cache, whole, ids = model.new_cache(), unbounded.new_cache(), tokens(1, 48)
    model(ids[:, :24], past_key_values=cache)
    model(ids[:, 24:], past_key_values=cache)
    unbounded(ids, past_key_values=whole)
    kept, every = cache.groups[0], whole.groups[0]
    assert kept.held is not None and every.held is not None
    assert kept.evicted > 0
    positions, nothing = kept.held.positions[0].long(), torch.empty(1, 2 * kept.heads, 0, kept.head_dim)
    assert bool((positions.diff() > 0).all()) and positions[:4].tolist() == [0, 1, 2, 3]
    # Nothing was evicted before the last pass, so both caches saw the same tokens.
    decoded = kept._decode(kept.held, 0, nothing)
    torch.testing.assert_close(decoded, every._decode(every.held, 0, nothing)[:, :, positions])


def test_padding_on_the_left_changes_nothing_but_rounding() -> None:
    """Blocks are cut by slots, so the padding is a whole number of blocks and chunks."""
    model, _ = evicting("llama", 24)
    ids, pad = tokens(1, 96), 24
    alone = model(ids, use_cache=True)
    padded = torch.cat((torch.full((1, pad), 258), ids), dim=1)
    mask = torch.ones_like(padded)
    mask[:, :pad] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    beside = model(padded, attention_mask=mask, position_ids=positions, use_cache=True)
    torch.testing.assert_close(beside.logits[:, pad:], alone.logits, atol=1e-4, rtol=1e-4)
    group = beside[CACHE].groups[0]
    assert group.evicted > pad
    torch.testing.assert_close(group.held.positions, alone[CACHE].groups[0].held.positions)


def test_generate_with_beams_and_a_hole_in_the_mask() -> None:
    model, _ = evicting("llama", 24)
    ids = tokens(2, 70)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, num_beams=2, do_sample=False)
    assert output.shape[0] == 2 and output.shape[1] > 70
    mask = torch.ones_like(ids)
    mask[:, 30] = 0
    with pytest.raises(ValueError, match="left"):
        model(ids, attention_mask=mask)


def test_a_cache_that_evicted_does_not_go_back_behind_its_window() -> None:
    model, _ = evicting("llama", 24)
    cache = model.new_cache()
    model(tokens(1, 100), past_key_values=cache)
    cache.crop(-2)
    assert cache.get_seq_length() == 98
    with pytest.raises(ValueError, match="evicted"):
        cache.crop(-60)
