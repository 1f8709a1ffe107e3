"""Before the engine serves anything: one layer through its pages, beside the same layer on the cache of transformers.

What may differ between versions is how the engine rotates keys and where its pages lie; both would ruin a text without
an error. So random keys and values of one layer group are rotated by the engine's own module, written to pages in a
random order, and the attention to them is compared with that of `modeling/group_clla.py`.

Shape legend: T tokens, H key-value heads, d head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clla.errors import CllaError
from clla.modeling.group_clla import LatentGroup
from clla.modeling.timeline_clla import Timeline
from clla.serving.attention import GroupReader
from clla.serving.pages import Batch, write_exact

QUERIES = 3  # new tokens, few enough to read latents
TOLERANCE = {torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.05}  # of the output's size; codes may differ


def check_one_layer(
    group: GroupReader, spec: dict[str, Any], settings: dict[str, Any], rotary: Any, block: int
) -> None:
    """Compare the paths for the last layer of a group.

    Args:
        group: with its codec loaded.
        spec: of the group, in the config.
        settings: the config's `clla` block.
        rotary: the engine's module that rotates keys; None without.
        block: tokens a page.

    Raises:
        CllaError: they differ.
    """
    found, wanted = _outputs(group, spec, settings, rotary, block)
    error = float((found - wanted).norm() / wanted.norm())
    if not error <= TOLERANCE[group.codec.encoder.dtype]:
        raise CllaError(
            f"the engine's attention differs from the reference by {error:.1%} in a check with random tokens",
            expected="no difference but rounding",
            remedy="this model and this version of vLLM do not fit together: run it with clla generate, and open an "
            "issue that names both",
        )


@torch.no_grad()
def _outputs(
    group: GroupReader, spec: dict[str, Any], settings: dict[str, Any], rotary: Any, block: int
) -> tuple[Tensor, Tensor]:
    """Attention outputs [T, H, d] of the engine's path and of the reference."""
    device, dtype = group.codec.encoder.device, group.codec.encoder.dtype
    before = settings["window"] + 2 * settings["flush_block"] + 5
    total = before + QUERIES
    random = torch.Generator().manual_seed(0)
    positions = torch.arange(total, device=device)
    layers, ours = {}, {}
    for index, layer in enumerate(group.layers):
        keys, values = _random_layer(group, index, total, random)
        turned = group.rope is not None and layer not in group.rope.plain_layers
        layers[layer] = _rotated(keys, rotary if turned else None), values
        ours[layer] = group.rope(positions[None]).rotate(keys[None], layer)[0] if group.rope else keys, values
    query = torch.randn(total, group.kv_heads, group.head_dim, generator=random).to(device, dtype)[before:]
    scaling = group.head_dim**-0.5

    timeline = Timeline(group.rope)
    reference = LatentGroup(
        {**spec}, {**settings, "kv_dtype": str(dtype).removeprefix("torch.")}, group.codec, timeline, None
    )
    for start, stop in ((0, before), (before, total)):
        timeline.begin(positions[None, start:stop], None)
        for layer, (keys, values) in ours.items():
            both = reference.update(keys[None, :, start:stop], values[None, :, start:stop], layer)
        timeline.end()
    keys, values = (x[0, group.heads].float() for x in both)
    seen = torch.ones(QUERIES, total, dtype=torch.bool, device=device).tril(before)
    own = query[:, group.heads].transpose(0, 1).float()
    wanted = nn.functional.scaled_dot_product_attention(own, keys, values, attn_mask=seen, scale=scaling)

    count = -(-total // block) + 2
    table = (torch.randperm(count, generator=random)[: -(-total // block)]).to(device, torch.int32)[None]
    slots = table[0, positions // block].long() * block + positions % block
    pages = torch.zeros(count, 1, block, group.stop, dtype=torch.uint8, device=device)
    first = Batch([0, before], [before], table, slots[:before], positions[:before])
    group.write({layer: torch.cat(x)[:, :before] for layer, x in layers.items()}, first, pages)
    exact = torch.zeros(count, len(group.heads), block, 2 * group.head_dim, dtype=dtype, device=device)
    keys, values = (x[group.heads].transpose(0, 1) for x in layers[group.layers[-1]])
    write_exact(exact, slots, keys, values)
    batch = Batch([0, QUERIES], [total], table, slots[before:], positions[before:])
    out = group.attend(group.layers[-1], query[:, group.heads], 0, (batch, exact), (batch, pages), scaling)
    return out.float(), wanted.transpose(0, 1)


def _random_layer(group: GroupReader, index: int, total: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys before RoPE and values [H, T, d], as large as those of the model."""
    device, dtype = group.codec.encoder.device, group.codec.encoder.dtype
    size, mean = group.codec.decoder[index].float().norm(dim=1), group.codec.mean[index].float()
    both = torch.randn(total, len(mean), generator=random).to(device) * size + mean
    keys, values = both.to(dtype).unflatten(1, (2 * group.kv_heads, -1)).transpose(0, 1).chunk(2)
    return keys, values


def _rotated(keys: Tensor, rotary: Any) -> Tensor:
    """Keys [H, T, d] as the engine's module rotates them."""
    if rotary is None:
        return keys
    flat = keys.transpose(0, 1).flatten(1).contiguous()
    _, flat = rotary(torch.arange(keys.shape[1], device=keys.device), flat.clone(), flat)
    return flat.unflatten(1, (keys.shape[0], -1)).transpose(0, 1)
