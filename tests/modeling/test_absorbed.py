"""Attention over latents and rotary keys: against a naive reference, the source, and itself in all its uses."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import pico
from helpers import mostly_slow, stats_of, strict_of, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from clla.artifacts.plan import Plan
from clla.artifacts.stats import Stats
from clla.modeling.absorbed_clla import (
    AbsorbedRows,
    absorbed_query,
    decoded_rows,
    decoded_sums,
    rotary_key,
    split_query,
)
from clla.modeling.cache_clla import CllaCache
from clla.modeling.hooks_clla import CACHE, rope_of
from clla.modeling.modeling_clla import CllaForCausalLM
from clla.modeling.quantize_clla import JoinedLayout, RowLayout

EXACT = {"atol": 2e-3, "rtol": 2e-3}  # 16-bit latents through four fp32 layers
SAME = {"atol": 2e-4, "rtol": 2e-4}  # the same sums in another order
PAIRS = ((0, 1), (2, 3))
FAMILIES = ("llama", "llama-mha", "llama-yarn", "llama-llama3", "cohere", "gpt_neox", "qwen2", "smollm3")


@lru_cache(maxsize=16)
def source_and_stats(family: str) -> tuple[PreTrainedModel, Stats]:
    model = pico(family)
    return model, stats_of(model, with_queries=True)


def strict(family: str = "llama", **options: Any) -> tuple[CllaForCausalLM, Plan]:
    model, stats = source_and_stats(family)
    return strict_of(model, stats, **options)


def lossy(family: str = "llama") -> tuple[CllaForCausalLM, Plan]:
    return strict(family, groups=PAIRS, components=16, bits=4, rope_bits=6, rank=48)


@torch.no_grad()
def step_by_step(model: CllaForCausalLM, ids: Tensor, **options: Tensor) -> tuple[Tensor, CllaCache]:
    cache, parts = model.new_cache(), []
    for t in range(ids.shape[1]):
        own = {name: value[:, : t + 1] if name == "attention_mask" else value[:, t : t + 1]
               for name, value in options.items()}  # fmt: skip
        parts.append(model(ids[:, t : t + 1], past_key_values=cache, use_cache=True, **own).logits)
    return torch.cat(parts, 1), cache


# --- the functions ---


class Codec:
    """Random matrices of a group of two layers: 2 key-value heads of 8, rank 16, 4 pairs that turn."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.offset, self.rope_encoder, self.rope_mean = draw(12), draw(8, 12), draw(8)
        self.decoder, self.mean, self.rope_query = draw(2, 32, 16), draw(2, 32), draw(2, 2, 4, 2)
        self.query, self.hidden = draw(2, 4, 9, 8), draw(2, 9, 12)
        self.layout = JoinedLayout(RowLayout((6, 4), 8), RowLayout((6,), 8))
        self.packed = self.layout.pack(draw(2, 9, 24))
        self.rows = self.layout.unpack(self.packed)


def rotation_of(family: str, count: int) -> Any:
    """Rotations of heads of 8, from those of the pico's heads of 16."""
    model = pico(family)
    rope = rope_of(model, {"form": {"cohere": "pairs"}.get(family, "halves"), "plain_layers": ()})
    assert rope is not None
    found = rope(torch.arange(count)[None])
    index = [0, 1, 4, 5, 8, 9, 12, 13] if family == "cohere" else list(range(0, 16, 2))  # half of the pairs, whole
    return found._replace(cos=found.cos[..., index], sin=found.sin[..., index])


def complex_pairs(x: Tensor, interleaved: bool) -> Tensor:
    """Rotary pairs of heads [..., 8] as complex numbers [..., 4]."""
    return torch.complex(x[..., ::2], x[..., 1::2]) if interleaved else torch.complex(x[..., :4], x[..., 4:])


@pytest.mark.parametrize("family", ["llama", "cohere"])
def test_attention_is_that_of_a_loop_over_tokens_and_heads(family: str) -> None:
    """Logits qᵀDz + Re(q'ᴴc) one at a time, with complex numbers, causal; both ways of the library beside it."""
    codec, pairs, scaling = Codec(), (3, 0, 1, 0), 0.1
    rotation = rotation_of(family, 9)
    turned = rotation.rotate(codec.query)
    still, rotary = split_query(turned, codec, 1, pairs, rotation, rotation)
    torch.testing.assert_close(still, codec.query)
    expected = torch.zeros(2, 9, 4, 8)
    q, answer = complex_pairs(turned, rotation.interleaved), torch.view_as_complex(codec.rope_query[1])
    for b in range(2):
        for head in range(4):
            kv = head // 2
            keys = codec.decoder[1, kv * 8 : kv * 8 + 8]
            values, mean = codec.decoder[1, 16 + kv * 8 : 24 + kv * 8], codec.mean[1, 16 + kv * 8 : 24 + kv * 8]
            for t in range(9):
                logits, seen = [], []
                for s in range(t + 1):
                    z, c = codec.rows[b, s].split((16, 8))
                    c = torch.view_as_complex(c.unflatten(0, (4, 2)).clone())
                    logit = codec.query[b, head, t] @ (keys @ z)
                    for j, pair in enumerate(pairs):
                        logit = logit + (q[b, head, t, pair].conj() * answer[kv, j] * c[j]).real
                    logits.append(logit * scaling)
                    seen.append(values @ z + mean)
                expected[b, t, head] = torch.stack(logits).softmax(0) @ torch.stack(seen)
    rows = AbsorbedRows(codec.packed, codec.layout, torch.float32, torch.zeros(2, dtype=torch.long))
    sums = rows.sums(absorbed_query(still, rotary, codec.decoder[1, :16]), scaling)
    found = decoded_sums(sums, codec.decoder[1, 16:], codec.mean[1, 16:], 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    keys, values = decoded_rows(codec.rows, codec, 1, 2, 16, torch.float32)
    keys, values = (x.repeat_interleave(2, dim=1) for x in (keys, values))
    query = torch.cat((still, rotary), dim=-1)
    out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling)
    torch.testing.assert_close(out[..., :8].transpose(1, 2), expected, rtol=1e-4, atol=1e-5)
    assert not out[..., 8:].any()


def test_rotary_keys_turn_each_with_its_own_frequency() -> None:
    codec, pairs = Codec(), (3, 0, 1, 0)
    rotation = rotation_of("llama", 9)
    found = rotary_key(codec.hidden, codec, pairs, rotation)
    plain = (codec.hidden - codec.offset) @ codec.rope_encoder.mT + codec.rope_mean
    for t in range(9):
        for j, pair in enumerate(pairs):
            turn = torch.complex(rotation.cos[0, t, pair], rotation.sin[0, t, pair])
            wanted = torch.complex(plain[:, t, 2 * j], plain[:, t, 2 * j + 1]) * turn
            torch.testing.assert_close(found[:, t, 2 * j : 2 * j + 2], torch.view_as_real(wanted), rtol=1e-4, atol=1e-5)


# --- the model ---


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "llama", "smollm3"))
def test_all_components_reproduce_the_source(family: str) -> None:
    """Full rank, 16 bits and every pair in the rotary key: nothing is lost, decoded or absorbed."""
    model, _ = source_and_stats(family)
    (converted, _), ids = strict(family), tokens(2, 60)
    with torch.no_grad():
        expected, whole = model(ids).logits, converted(ids).logits
    stepped, cache = step_by_step(converted, ids)
    torch.testing.assert_close(whole, expected, **EXACT)
    torch.testing.assert_close(stepped, expected, **EXACT)
    assert cache.groups[0].encoded == 60


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "llama-mha", "cohere", "smollm3"])
def test_steps_are_absorbed_and_equal_a_whole_pass(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of two layers, few components, few bits: lossy, and the same in both forms."""
    model, _ = source_and_stats(family)
    (converted, _), ids = lossy(family), tokens(2, 50)
    with torch.no_grad():
        whole = converted(ids).logits
        assert (whole - model(ids).logits).abs().max() > 0.05
        explicit: list[int] = []
        from clla.modeling import decoupled_clla

        def counted(*arguments: Any) -> tuple[Tensor, Tensor]:
            explicit.append(1)
            return decoded_rows(*arguments)

        monkeypatch.setattr(decoupled_clla, "decoded_rows", counted)
        stepped, _ = step_by_step(converted, ids)
        assert not explicit
        torch.testing.assert_close(stepped, whole, **SAME)
        few = converted(ids[:, :5]).logits
        assert not explicit  # up to H·d/H_q queries of one call
        torch.testing.assert_close(few, whole[:, :5], **SAME)
        converted(ids)
        assert explicit


def test_left_padding_changes_nothing() -> None:
    (converted, _), ids = lossy(), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    options = {"attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        padded = converted(ids, **options).logits
        alone = converted(ids[1:, 11:]).logits
    stepped, _ = step_by_step(converted, ids, **options)
    torch.testing.assert_close(padded[1:, 11:], alone, **SAME)
    torch.testing.assert_close(stepped[1:, 11:], alone, **SAME)
    torch.testing.assert_close(stepped[0], padded[0], **SAME)


def test_masks_with_holes_hide_them() -> None:
    """Few queries, too, which read packed rows only where nothing but padding is hidden."""
    (converted, _), ids = lossy(), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, 12:15] = mask[1, 36:39] = 0
    with torch.no_grad():
        whole = converted(ids, attention_mask=mask).logits
    stepped, _ = step_by_step(converted, ids, attention_mask=mask)
    torch.testing.assert_close(stepped[mask.bool()], whole[mask.bool()], **SAME)
    with torch.no_grad():
        assert (converted(ids).logits - whole)[:, -1].abs().max() > 0.05


def test_steps_run_in_any_mode() -> None:
    """One after another: with gradients, without, and where tensors cannot have any."""
    (converted, _), ids, cache = lossy(), tokens(1, 40), None
    for start, mode in ((0, torch.no_grad), (30, torch.inference_mode), (33, torch.no_grad), (36, torch.enable_grad)):
        stop = {0: 30, 36: 40}.get(start, start + 3)
        with mode():
            out = converted(ids[:, start:stop], past_key_values=cache)
        cache = out[CACHE]
    with torch.no_grad():
        torch.testing.assert_close(out.logits, converted(ids).logits[:, 36:], **SAME)


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3}])
def test_generate_gives_the_sources_tokens(options: dict[str, Any]) -> None:
    model, _ = source_and_stats("llama")
    (converted, _), ids = strict(), tokens(2, 33)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    common = {"attention_mask": mask, "max_new_tokens": 16, "pad_token_id": 258, "eos_token_id": 257, **options}
    assert torch.equal(converted.generate(ids, **common), model.generate(ids, **common))


@pytest.mark.parametrize("context", [1, 19, 70])
def test_planned_bytes_are_the_measured_bytes(context: int) -> None:
    converted, plan = lossy()
    cache = converted.new_cache()
    with torch.no_grad():
        converted(tokens(1, context), past_key_values=cache)
    bookkeeping = sum(t.nbytes for t in cache.timeline.tensors())
    assert cache.nbytes - bookkeeping == plan.bytes_at(context) == plan.row_bytes * context
    # two groups, each: 48 components of 4 bits and a scale; 16 of 6 bits, and a scale
    assert plan.row_bytes == 2 * (24 + 1 + 12 + 1)


def test_cropping_and_reordering() -> None:
    (converted, _), ids = lossy(), tokens(3, 40)
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        cache = converted.new_cache()
        converted(ids, past_key_values=cache)
        cache.crop(-10)
        again = converted(ids[:, 30:], past_key_values=cache).logits
        torch.testing.assert_close(again, converted(ids).logits[:, 30:], **SAME)
        cache.reorder_cache(order)
        step = tokens(3, 1, seed=4)
        moved = converted(step, past_key_values=cache).logits
        straight = converted(torch.cat((ids[order], step), 1)).logits[:, -1:]
    torch.testing.assert_close(moved, straight, **SAME)


def test_saved_models_load_as_remote_code(tmp_path: Path) -> None:
    (converted, _), ids = lossy(), tokens(1, 40)
    converted.save_pretrained(tmp_path)
    assert (tmp_path / "absorbed_clla.py").is_file()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, converted(ids).logits)


def test_gradients_reach_decoder_and_answers_through_the_cache() -> None:
    converted, _ = lossy()
    converted.codec.requires_grad_(True)
    converted(tokens(1, 30), labels=tokens(1, 30)).loss.backward()
    group: Any = converted.codec.groups[1]
    assert group.decoder.grad.abs().max() > 0 and group.rope_query.grad.abs().max() > 0
    assert group.encoder.grad is None  # what is kept carries no gradient
    converted.codec.requires_grad_(False)


def test_attention_that_is_not_seen_is_an_error() -> None:
    """Silence would be wrong logits: keys of the source are no keys of these queries."""
    model, _ = source_and_stats("llama")
    converted, _ = lossy()
    model.set_attn_implementation("sdpa")  # behind the conversion's back
    try:
        with pytest.raises(ValueError, match="cannot be observed"):
            converted(tokens(1, 10))
    finally:
        converted.watch_source()
    assert CACHE in converted(tokens(1, 10))
