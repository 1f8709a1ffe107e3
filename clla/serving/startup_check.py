"""Before the engine serves anything: one layer through its pages, beside the same layer on the cache of transformers.

What may differ between versions is how the engine rotates keys and where its pages lie; both would ruin a text without
an error. So random keys and values of one layer group are rotated by the engine's own module, written to pages in a
random order, and the attention to them is compared with that of `modeling/group_clla.py`.

Shape legend: T tokens, H key-value heads, d head dim.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clla.errors import CllaError
from clla.modeling.decoupled_clla import DecoupledGroup
from clla.modeling.group_clla import LatentGroup
from clla.modeling.observe_clla import Attention
from clla.modeling.positions_clla import Timeline
from clla.modeling.spec_clla import CacheSpec, GroupSpec
from clla.serving.attention import DecoupledReader, GroupReader
from clla.serving.pages import Batch, write_exact

QUERIES = 3  # new tokens, few enough to read latents
LOGITS = 3.0  # their deviation
TOLERANCE = {torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.05}  # of the output's size; codes may differ


def check_one_layer(group: GroupReader, spec: GroupSpec, cache: CacheSpec, rotary: Any, block: int) -> None:
    """Compare the paths for the last layer of a group.

    Args:
        group: with its codec loaded.
        spec: of the group.
        cache: of the whole cache.
        rotary: the engine's module that rotates keys; None where keys are not rotated, or by a module of transformers.
        block: tokens per page.

    Raises:
        CllaError: they differ.
    """
    group.bucket = 1  # the reference turns every key to its own position
    found, wanted = _outputs(group, spec, cache, rotary, block)
    group.bucket = None
    error = float((found - wanted).norm() / wanted.norm())
    if not error <= TOLERANCE[group.codec.encoder.dtype]:
        raise CllaError(
            f"the engine's attention differs from the reference by {error:.1%} in a check with random tokens",
            expected="no difference but rounding",
            remedy="this model and this version of vLLM do not fit together: run it with clla generate, and open an "
            "issue that names both",
        )


class Pretended(NamedTuple):
    """Random tokens of one layer group, as many as are before a step and in it.

    Attributes:
        hidden: [T, h], attention inputs of the first layer.
        query: [T, H_q, d] of the last layer before RoPE, of all the model's heads.
        both: layer -> keys before RoPE and values [2H, T, d].
    """

    hidden: Tensor
    query: Tensor
    both: dict[int, Tensor]


@torch.no_grad()
def _outputs(group: GroupReader, spec: GroupSpec, cache: CacheSpec, rotary: Any, block: int) -> tuple[Tensor, Tensor]:
    """Attention outputs [T, H, d] of the engine's path and of the reference, with one query head a key-value head."""
    random = torch.Generator().manual_seed(0)
    before = cache.window + 2 * cache.flush_block + 5
    tokens = _pretended(group, before + QUERIES, random)
    return (
        _of_the_engine(group, tokens, before, rotary, block, random)[:, : len(group.heads)],
        _of_the_reference(group, spec, cache, tokens, before),
    )


def _of_the_reference(group: GroupReader, spec: GroupSpec, cache: CacheSpec, tokens: Pretended, before: int) -> Tensor:
    """Of `modeling/group_clla.py` or `decoupled_clla.py`."""
    layer, total = group.layers[-1], len(tokens.hidden)
    positions = torch.arange(total, device=tokens.hidden.device)[None]
    scaling, dtype = group.head_dim**-0.5, tokens.hidden.dtype
    timeline = Timeline(group.rope)
    kind = DecoupledGroup if isinstance(group, DecoupledReader) else LatentGroup
    reference = kind(spec, replace(cache, kv_dtype=str(dtype).removeprefix("torch.")), group.codec, timeline, None)
    query = tokens.query.transpose(0, 1)[None]
    query = group.rope(positions).rotate(query, layer) if group.rope else query
    for start, stop in ((0, before), (before, total)):
        timeline.begin(positions[:, start:stop], None)
        if group.from_input:
            reference.observe(tokens.hidden[None, start:stop])
        rotation = group.rope(positions[:, start:stop]) if group.rope else None
        for index, both in tokens.both.items():
            keys, values = both[None, :, start:stop].chunk(2, dim=1)
            keys = rotation.rotate(keys, index) if rotation else keys
            found = reference.update(keys, values, index)
            if isinstance(reference, DecoupledGroup):
                plain = Attention(_nothing, "sdpa", None, (query, *found), None, {})
                asked = query[:, :, start:stop]
                decoupled = reference.attend_decoupled(index, asked, found, plain, scaling, total)
        reference.settle()
        timeline.end()
    if isinstance(reference, DecoupledGroup):
        return decoupled[0, :, group.heads].float()
    keys, values = (x[0, group.heads].float() for x in found)
    seen = torch.ones(QUERIES, total, dtype=torch.bool, device=keys.device).tril(before)
    own = query[0, group.heads, before:].float()
    return nn.functional.scaled_dot_product_attention(own, keys, values, attn_mask=seen, scale=scaling).transpose(0, 1)


def _of_the_engine(
    group: GroupReader, tokens: Pretended, before: int, rotary: Any, block: int, random: torch.Generator
) -> Tensor:
    """Through pages, in an order of their own."""
    layer, total, device = group.layers[-1], len(tokens.hidden), tokens.hidden.device
    positions = torch.arange(total, device=device)
    count = -(-total // block) + 2
    table = torch.randperm(count, generator=random)[: -(-total // block)].to(device, torch.int32)[None]
    slots = table[0, positions // block].long() * block + positions % block
    pages = torch.zeros(count, 1, block, group.stop, dtype=torch.uint8, device=device)
    # Without a window new tokens are read from their latents as well, so all are written first.
    early = before if group.window else total
    first = Batch([0, early], [early], table, slots[:early], positions[:early])
    both = {}
    for index, found in tokens.both.items():
        keys, values = found.chunk(2)
        both[index] = torch.cat((_rotated(group, keys, index, rotary), values))
    if group.from_input:
        group.write_inputs(tokens.hidden[:early], (first, pages))
    else:
        group.write({index: x[:, :early] for index, x in both.items()}, (first, pages))
    exact = torch.zeros(count, len(group.heads), block, 2 * group.head_dim, dtype=tokens.hidden.dtype, device=device)
    keys, values = (x[group.heads].transpose(0, 1) for x in both[layer].chunk(2))
    write_exact(exact, slots, keys, values)
    batch = Batch([0, QUERIES], [total], table, slots[before:], positions[before:])
    query = _rotated(group, tokens.query.transpose(0, 1), layer, rotary).transpose(0, 1)
    query = query[before:, group.heads]
    output = torch.empty_like(query)
    group.attend(layer, query, (batch, exact), (batch, pages), group.head_dim**-0.5, output)
    return output.float()


def _rotated(group: GroupReader, keys: Tensor, layer: int, rotary: Any) -> Tensor:
    """Keys or queries [H, T, d] of a layer as the engine's module rotates them, or that of transformers without one."""
    if group.rope is None or layer in group.rope.plain_layers:
        return keys
    positions = torch.arange(keys.shape[1], device=keys.device)
    if rotary is None:
        return group.rope(positions[None]).rotate(keys[None])[0]
    flat = keys.transpose(0, 1).flatten(1)
    flat = flat.clone(memory_format=torch.contiguous_format)  # it is rotated in place
    _, flat = rotary(positions, flat.clone(), flat)
    return flat.unflatten(1, (keys.shape[0], -1)).transpose(0, 1)


def _nothing(*_: Any) -> Any:
    raise AssertionError("the model's own attention is not asked for")


def _pretended(group: GroupReader, total: int, random: torch.Generator) -> Pretended:
    """Tokens as large as those of the model."""
    device, dtype = group.codec.encoder.device, group.codec.encoder.dtype
    both = _random_layers(group, total, random)
    keys = both[group.layers[-1]][: group.kv_heads].float()
    query = torch.randn(total, group.kv_heads, group.head_dim, generator=random, dtype=torch.float32).to(device)
    # So that logits differ by a few: to equal weights no rotation matters.
    query = (query * (LOGITS * group.head_dim**0.5 / keys.square().sum(-1).mean().sqrt())).to(dtype)
    if not group.from_input:
        return Pretended(torch.empty(total, 0, device=device, dtype=dtype), query, both)
    # Inputs that give latents of the size that codecs are made for: the encoder's directions in equal parts.
    encoder = group.codec.encoder.float()
    latents = torch.randn(total, len(encoder), generator=random, dtype=torch.float32).to(device)
    hidden = latents @ torch.linalg.pinv(encoder).mT + group.codec.offset.float()
    return Pretended(hidden.to(dtype), query, both)


def _random_layers(group: GroupReader, total: int, random: torch.Generator) -> dict[int, Tensor]:
    """Keys before RoPE and values [2H, T, d] of each layer, as large as those of the model."""
    device, dtype = group.codec.encoder.device, group.codec.encoder.dtype
    found = {}
    for index, layer in enumerate(group.layers):
        size, mean = group.codec.decoder[index].float().norm(dim=1), group.codec.mean[index].float()
        both = torch.randn(total, len(mean), generator=random, dtype=torch.float32).to(device) * size + mean
        found[layer] = both.to(dtype).unflatten(1, (2 * group.kv_heads, -1)).transpose(0, 1)
    return found
