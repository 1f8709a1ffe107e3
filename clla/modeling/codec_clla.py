"""Keys and values of a layer group to latents and back, with a codec's matrices.

Shape legend: B sequences, T tokens, H key-value heads, d head dim, n = 2·H·d, G layers of a group, r rank.
"""

from typing import Any, Optional

import torch
from torch import Tensor, nn

from .rotary_clla import Rotation


def encode(x: Tensor, codec: Any) -> Tensor:
    """Latents (x - offset) Eᵀ, [..., r], of a group's inputs. The difference is taken in fp32."""
    return nn.functional.linear((x.float() - codec.offset.float()).to(codec.encoder.dtype), codec.encoder)


def decode(
    latents: Tensor,
    codec: Any,
    index: int,
    rotation: Optional[Rotation],
    heads: int,
    dtype: torch.dtype,
    *,
    layer: int,
) -> Tensor:
    """Keys after RoPE and values [B, 2H, T, d] of the model's `layer`, number `index` of its group, from [B, T, r]."""
    flat = nn.functional.linear(latents, codec.decoder[index], codec.mean[index])  # [B, T, n]
    both = flat.to(dtype).unflatten(-1, (2 * heads, -1)).transpose(1, 2)
    if rotation is None:
        return both
    keys = rotation.rotate(both[:, :heads], layer)
    return torch.cat((keys.to(dtype), both[:, heads:]), dim=1)


def before_rope(layers: "dict[int, Tensor]", rotation: Optional[Rotation], heads: int) -> Tensor:
    """Keys before RoPE and values of a group's layers, [B, T, n·G] in fp32, from [B, 2H, T, d] each after RoPE."""
    parts = []
    for layer, both in layers.items():
        keys, values = both[:, :heads].float(), both[:, heads:].float()
        if rotation is not None:
            keys = rotation.unrotate(keys, layer)
        parts.append(torch.cat((keys, values), dim=1).transpose(1, 2).flatten(2))
    return torch.cat(parts, dim=-1)
