"""Converted models against their sources: the cache in all its uses. Families are compared in test_families.py."""

from __future__ import annotations

import pytest
import torch
from conversions import TOLERANCE, full_rank, lossy, source_and_stats
from helpers import converted_of, plan_of, tokens
from torch import Tensor

from clla.modeling.cache_clla import CllaCache
from clla.modeling.hooks_clla import CACHE
from clla.modeling.modeling_clla import CllaForCausalLM


@torch.no_grad()
def step_by_step(model: CllaForCausalLM, ids: Tensor, first: int = 1) -> tuple[Tensor, CllaCache]:
    cache, parts, start = model.new_cache(), [], 0
    for stop in [*range(first, ids.shape[1] + 1)]:
        parts.append(model(ids[:, start:stop], past_key_values=cache, use_cache=True).logits)
        start = stop
    return torch.cat(parts, 1), cache


@pytest.mark.parametrize("source", ["group", "first"])
def test_token_by_token_equals_one_forward_pass(source: str) -> None:
    model, _ = source_and_stats("llama")
    converted, ids = full_rank(source=source), tokens(1, 70)
    stepped, _ = step_by_step(converted, ids)
    with torch.no_grad():
        torch.testing.assert_close(stepped, converted(ids).logits, **TOLERANCE)
        torch.testing.assert_close(stepped, model(ids).logits, **TOLERANCE)


def test_first_source_without_a_window_is_exact_at_full_rank() -> None:
    """Without a window even the current token is read from its latent."""
    model, _ = source_and_stats("llama")
    converted, ids = full_rank(source="first", window=0), tokens(2, 60)
    stepped, cache = step_by_step(converted, ids)
    with torch.no_grad():
        torch.testing.assert_close(stepped, model(ids).logits, **TOLERANCE)
    assert cache.groups[0].encoded == 60


def test_truncation_changes_only_what_lies_before_the_window() -> None:
    """Comparisons at full rank can fail: a crude codec moves the logits, but not while all tokens are exact."""
    model, stats = source_and_stats("llama")
    crude = converted_of(model, plan_of(stats, model, bits=1, rank=16), stats)
    ids = tokens(1, 90)
    with torch.no_grad():
        expected, found = model(ids).logits, crude(ids).logits
    torch.testing.assert_close(found[:, :24], expected[:, :24], **TOLERANCE)  # the first chunk
    assert (found[:, 60:] - expected[:, 60:]).abs().max() > 0.1


def test_sinks_stay_exact_behind_padding() -> None:
    """A padded sequence keeps its own first tokens exact, not the padding."""
    converted = lossy(sinks=4)
    ids, mask = tokens(1, 80), torch.ones(1, 80, dtype=torch.long)
    mask[:, :30] = 0
    cache = converted.new_cache()
    with torch.no_grad():
        converted(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache)
        plain = converted.new_cache()
        converted(ids[:, 30:], past_key_values=plain)
    for padded_group, group in zip(cache.groups, plain.groups, strict=True):
        assert padded_group.held is not None and group.held is not None
        torch.testing.assert_close(padded_group.held.exact[..., :4, :], group.held.exact[..., :4, :], **TOLERANCE)


@pytest.mark.parametrize("source", ["group", "first"])
@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}])
def test_generate_gives_the_sources_tokens(source: str, options: dict[str, object]) -> None:
    model, _ = source_and_stats("llama")
    converted, ids = full_rank(source=source), tokens(2, 33)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    common = {"attention_mask": mask, "max_new_tokens": 24, "pad_token_id": 258, "eos_token_id": 257, **options}
    torch.manual_seed(3)
    expected = model.generate(ids, **common)
    torch.manual_seed(3)
    found = converted.generate(ids, return_dict_in_generate=True, **common)
    assert isinstance(found[CACHE], CllaCache)
    assert torch.equal(found.sequences, expected)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 4}, {"assistant": True}])
def test_assisted_decoding_gives_the_same_tokens(options: dict[str, object]) -> None:
    model, _ = source_and_stats("llama")
    converted, ids = full_rank(), tokens(1, 12).repeat(1, 3)
    common = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": 257, "pad_token_id": 258}
    helper = {"assistant_model": model} if options.pop("assistant", False) else {}
    found = converted.generate(ids, **common, **helper, **options)
    assert torch.equal(found, model.generate(ids, **common))


def test_other_cache_implementations_are_refused() -> None:
    with pytest.raises(ValueError, match="compressed cache"):
        full_rank().generate(tokens(1, 5), cache_implementation="quantized", max_new_tokens=2)


def test_tuples_where_they_are_asked_for() -> None:
    logits, cache = lossy()(tokens(1, 30), return_dict=False)
    assert logits.shape[:2] == (1, 30) and isinstance(cache, CllaCache)


def test_several_turns_equal_one_long_input() -> None:
    converted = full_rank()
    first, more = tokens(1, 40), tokens(1, 21, seed=9)
    cache = converted.new_cache()
    answer = converted.generate(first, **{CACHE: cache}, max_new_tokens=10, do_sample=False, eos_token_id=None)
    turn = torch.cat((answer, more), 1)
    expected = converted.generate(turn, max_new_tokens=10, do_sample=False, eos_token_id=None)
    found = converted.generate(turn, **{CACHE: cache}, max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert torch.equal(found, expected)
    assert cache.get_seq_length() == found.shape[1] - 1


def test_padding_between_turns_keeps_positions() -> None:
    """A second turn of another length is padded in the middle; positions go on from each sequence's own."""
    model, _ = source_and_stats("llama")
    converted, ids = full_rank(), tokens(2, 66)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, 40:47] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = converted.new_cache()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
        parts = [
            converted(
                ids[:, a:b],
                attention_mask=mask[:, :b],
                position_ids=positions[:, a:b],
                past_key_values=cache,
                use_cache=True,
            ).logits
            for a, b in ((0, 40), (40, 66))
        ]
    found = torch.cat(parts, 1)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **TOLERANCE)


def test_jumping_positions_are_refused() -> None:
    positions = torch.cat((torch.arange(10), torch.arange(30, 40)))[None]
    with pytest.raises(ValueError, match="position_ids jump"):
        lossy()(tokens(1, 20), position_ids=positions)


@pytest.mark.parametrize("source", ["group", "first"])
@pytest.mark.parametrize("context", [3, 19, 20, 21, 64, 129])
def test_planned_bytes_are_the_measured_bytes(source: str, context: int) -> None:
    model, stats = source_and_stats("llama")
    plan = plan_of(stats, model, bits=3, rank=64, source=source)
    converted = converted_of(model, plan, stats)
    cache = converted.new_cache()
    with torch.no_grad():
        converted(tokens(1, context), past_key_values=cache)
    assert not vars(cache.timeline)["_memo"]  # nothing of a forward pass outlives it
    bookkeeping = sum(t.nbytes for t in cache.timeline.tensors())
    assert cache.nbytes - bookkeeping == plan.bytes_at(context)
    assert bookkeeping <= 32


def test_prefill_and_decoding_keep_the_same() -> None:
    """Bytes and split depend on the length alone, not on how the tokens came."""
    converted, ids = lossy(), tokens(1, 75)
    _, stepped = step_by_step(converted, ids)
    whole = converted.new_cache()
    with torch.no_grad():
        converted(ids, past_key_values=whole)
    for a, b in zip(stepped.groups, whole.groups, strict=True):
        assert (a.encoded, a.filled) == (b.encoded, b.filled)
    assert stepped.nbytes == whole.nbytes


def test_latents_are_stored_packed() -> None:
    converted = lossy()
    cache = converted.new_cache()
    with torch.no_grad():
        converted(tokens(1, 100), past_key_values=cache)
    for group in cache.groups:
        assert group.held is not None and group.held.rows.dtype == torch.uint8
        assert group.held.rows.shape == (1, group.encoded, group.layout.row_bytes)
        assert group.encoded >= 100 - 16 - 4


def test_beam_reordering_moves_every_tensor() -> None:
    converted, ids = lossy(), tokens(3, 60)
    order = torch.tensor([2, 0, 0])
    moved, straight = converted.new_cache(), converted.new_cache()
    with torch.no_grad():
        converted(ids, past_key_values=moved)
        moved.reorder_cache(order)
        converted(ids[order], past_key_values=straight)
        step = tokens(3, 1, seed=4)
        a = converted(step, past_key_values=moved).logits
        b = converted(step, past_key_values=straight).logits
    torch.testing.assert_close(a, b)


def test_crop_takes_back_recent_tokens() -> None:
    converted, ids = full_rank(), tokens(1, 60)
    cache = converted.new_cache()
    with torch.no_grad():
        converted(ids, past_key_values=cache)
        cache.crop(-25)
        assert cache.get_seq_length() == 35
        again = converted(ids[:, 35:], past_key_values=cache).logits
        torch.testing.assert_close(again, converted(ids).logits[:, 35:], **TOLERANCE)


def test_reset_empties_the_cache() -> None:
    converted, ids = lossy(), tokens(1, 50)
    cache = converted.new_cache()
    with torch.no_grad():
        first = converted(ids, past_key_values=cache).logits
        cache.reset()
        assert cache.nbytes == 0 and cache.get_seq_length() == 0
        torch.testing.assert_close(converted(ids, past_key_values=cache).logits, first)


def test_forward_options() -> None:
    converted, ids = lossy(), tokens(2, 70)
    with torch.no_grad():
        whole = converted(ids, labels=ids, output_hidden_states=True)
        torch.testing.assert_close(converted(ids, logits_to_keep=30).logits, whole.logits[:, -30:])
        picked = torch.tensor([0, 33, 69])
        torch.testing.assert_close(converted(ids, logits_to_keep=picked).logits, whole.logits[:, picked])
        embeds = converted.get_input_embeddings()(ids)
        torch.testing.assert_close(converted(inputs_embeds=embeds).logits, whole.logits)
    assert whole.hidden_states[-1].shape == (2, 70, 64)
    expected = torch.nn.functional.cross_entropy(whole.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(whole.loss, expected)
    assert CACHE not in converted(ids, use_cache=False)


def test_other_caches_are_refused() -> None:
    from transformers import DynamicCache

    with pytest.raises(ValueError, match="DynamicCache"):
        lossy()(tokens(1, 5), past_key_values=DynamicCache())


def test_both_names_of_the_cache_are_understood() -> None:
    """transformers 5.24 renamed `past_key_values`; converted models take either name in every version."""
    converted, ids = lossy(), tokens(1, 60)
    logits = []
    for name in ("cache", "past_key_values"):
        kept = converted.new_cache()
        converted(ids[:, :50], **{name: kept})
        logits.append(converted(ids[:, 50:], **{name: kept}).logits)
        assert kept.get_seq_length() == 60
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match="two names"):
        converted(ids, cache=converted.new_cache(), past_key_values=converted.new_cache())


@pytest.mark.slow
def test_long_generation_does_not_grow_beyond_plan() -> None:
    model, stats = source_and_stats("llama")
    plan = plan_of(stats, model, bits=2, rank=32)
    converted = converted_of(model, plan, stats)
    out = converted.generate(
        tokens(1, 8), max_new_tokens=400, do_sample=True, eos_token_id=None, return_dict_in_generate=True
    )
    length = out[CACHE].get_seq_length()
    assert length == 407
    assert out[CACHE].nbytes <= plan.bytes_at(length) + 32
