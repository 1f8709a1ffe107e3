"""A hundred thousand tokens through one cache: it grows as planned, and what it holds is what it was given.

The oracle knows nothing of the cache. It takes keys before RoPE and values from the projections' outputs, encodes
them with the codec's matrices in fp64, and rotates with angles of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import converted_of, plan_of, stats_of, tokens
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from clla.artifacts.plan import Plan, encoded_slots
from clla.modeling.cache_clla import CllaCache
from clla.modeling.group_clla import LatentGroup
from clla.modeling.modeling_clla import CllaForCausalLM

TOKENS = 100_000
STEPS = ((0, 2000), (20_000, 200), (60_000, 50), (99_000, 50))  # (from which length on, how many single tokens)
CHUNK, WINDOW, BLOCK, SINKS, THETA = 1024, 48, 16, 4, 10_000.0
BOOKKEEPING = 32  # bytes: padding and offsets of one sequence
LAYERS, VALUES, D = 2, 32, 16


def nearest(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
    """Attention to the newest tokens only: what is tested is the cache, and all pairs would take minutes."""
    count = query.shape[2]
    key, value = key[:, :, -count - 64 :], value[:, :, -count - 64 :]
    hidden = torch.ones(count, key.shape[2], dtype=torch.bool).triu(key.shape[2] - count + 1)
    weights = (query @ key.mT * scaling).masked_fill(hidden, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2), None


def small() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=260,
        max_position_embeddings=2 * TOKENS,
    )
    return LlamaForCausalLM(config).float().eval().requires_grad_(False)


def converted_model() -> tuple[CllaForCausalLM, Plan]:
    model = small()
    stats = stats_of(model, band=LAYERS, batches=2)
    plan = plan_of(
        stats, model, bits=(8, 4, 4, 2), groups=((0, 1),), tier_size=8, window=WINDOW, sinks=SINKS, flush_block=BLOCK
    )
    converted = converted_of(model, plan, stats, prefill_chunk=CHUNK)
    AttentionInterface.register("nearest", nearest)
    AttentionMaskInterface.register("nearest", lambda *_, **__: None)
    converted.source.set_attn_implementation("nearest")
    return converted, plan


@contextmanager
def recorded(model: CllaForCausalLM, wanted: set[int]) -> Iterator[dict[int, list[Tensor]]]:
    """Keys before RoPE and values [n] of each layer, for the slots wanted, as the projections give them."""
    found: dict[int, list[Tensor]] = {slot: [torch.empty(0)] * 2 * LAYERS for slot in sorted(wanted)}
    starts = [0] * 2 * LAYERS

    def keep(place: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            start = starts[place]
            starts[place] += output.shape[1]
            for slot in range(start, starts[place]) if output.shape[1] == 1 else found:
                if slot in found and start <= slot < starts[place]:
                    found[slot][place] = output[0, slot - start].clone()

        return hook

    projections = [p for layer in model.source.model.layers for p in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
    handles = [projection.register_forward_hook(keep(place)) for place, projection in enumerate(projections)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def calls() -> Iterator[tuple[int, int]]:
    """Slots [start, stop) of every forward pass."""
    start = 0
    for begin, count in (*STEPS, (TOKENS, 0)):
        while start < begin:
            yield start, min(start + CHUNK, begin)
            start = min(start + CHUNK, begin)
        for _ in range(count):
            yield start, start + 1
            start += 1


def rotated(key: Tensor, position: int) -> Tensor:
    """One key [d] in fp64, turned to its position; angles rounded to fp32, as models have them."""
    frequencies = 1.0 / THETA ** (torch.arange(0, D, 2) / D)
    angles = (frequencies * position).double()
    a, b = key.double().chunk(2)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()))


def check_row(group: LatentGroup, row: Tensor, inputs: Tensor) -> None:
    """The row decodes to the latent of these keys and values, as well as its bits allow."""
    codec = group.codec
    latent = codec.encoder.double() @ (inputs.double() - codec.offset.double())
    kept = group.layout.unpack(row).double()
    expected = group.layout.rounded(latent.float()).double()
    scale = latent.abs().max()
    differing = (kept - expected).abs() > 1e-4 * scale
    assert differing.sum() <= 1, "at most a component on the edge between two codes"
    assert (kept - latent).norm() <= 1.02 * (expected - latent).norm() + 1e-4 * scale


@pytest.mark.slow
def test_a_hundred_thousand_tokens() -> None:
    model, plan = converted_model()
    cache = model.new_cache()
    group: LatentGroup = cache.groups[0]
    dice = torch.Generator().manual_seed(0)
    picked = set(torch.randint(TOKENS, (400,), generator=dice).tolist())
    near = set(range(SINKS + 2)) | set(range(2990, 3010)) | set(range(TOKENS - 2 * WINDOW, TOKENS))
    ids, singles, length = tokens(1, TOKENS), 0, 0
    with torch.no_grad(), recorded(model, picked | near) as found:
        for start, stop in calls():
            model(ids[:, start:stop], past_key_values=cache, logits_to_keep=1)
            singles, length = singles + (stop == start + 1), stop
            assert plan.bytes_at(length) <= cache.nbytes <= plan.bytes_at(length) + BOOKKEEPING
            assert group.encoded == encoded_slots(length, WINDOW, BLOCK) and group.encoded + group.filled == length
    assert length == TOKENS and singles >= 2300
    assert cache.get_seq_length() == TOKENS and cache.timeline.length + cache.timeline.incoming == TOKENS
    check_contents(cache, group, found)


def check_contents(cache: CllaCache, group: LatentGroup, found: dict[int, list[Tensor]]) -> None:
    held = group.held
    assert held is not None and held.rows.shape == (1, group.encoded, group.layout.row_bytes)
    encoded = [slot for slot in found if slot < group.encoded]
    assert len(encoded) > 300 and len(found) - len(encoded) >= WINDOW
    assert torch.equal(cache.timeline.positions(0, TOKENS), torch.arange(TOKENS)[None])
    decoded = read(cache, group)
    for slot, parts in found.items():
        exact = [torch.cat((rotated(parts[2 * layer], slot), parts[2 * layer + 1].double())) for layer in (0, 1)]
        if slot < group.encoded:
            check_row(group, held.rows[0, slot], torch.cat(parts))
        for layer in range(LAYERS):
            seen = decoded[layer][:, slot].flatten().double()
            if slot < SINKS or slot >= group.encoded:
                torch.testing.assert_close(seen, exact[layer], atol=1e-5, rtol=1e-5)
                continue
            latent = group.layout.unpack(held.rows[0, slot]).double()
            plain = group.codec.decoder[layer].double() @ latent + group.codec.mean[layer].double()
            expected = torch.cat((rotated(plain[:D], slot), plain[D:]))
            torch.testing.assert_close(seen, expected, atol=1e-4, rtol=1e-4)


def read(cache: CllaCache, group: LatentGroup) -> list[Tensor]:
    """What each layer attends to, [2, T, d] of keys and values, before one more token (which is not looked at)."""
    cache.timeline.begin(torch.tensor([[TOKENS]]), None)
    new = torch.zeros(1, 1, 1, D)
    read = [torch.cat(cache.update(new, new, layer))[:, 0, :TOKENS] for layer in group.layers]
    assert not math.isnan(float(read[0].sum()))
    return read
