"""Apply and undo rotary position embedding (RoPE, arXiv 2104.09864) on cached keys.

Shape legend: B batch, H key-value heads, T tokens, d head dim, p rotary dim (p <= d).
"""

import torch
from torch import Tensor


def _swap(x: Tensor, interleaved: bool) -> Tensor:
    """Quarter turn of every rotary pair: (a, b) -> (-b, a)."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate(keys: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate keys to their positions, as the source model does.

    Args:
        keys: [B, H, T, d] before RoPE.
        cos: [B or 1, T, p] cosines, as the model's rotary embedding returns them.
        sin: [B or 1, T, p] sines.
        interleaved: pairs are neighbouring channels instead of the two halves.

    Returns:
        [B, H, T, d]; channels beyond p pass through (partial rotary).
    """
    p = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotary, rest = keys[..., :p], keys[..., p:]
    turned = rotary * cos + _swap(rotary, interleaved) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def unrotate(keys: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Inverse of `rotate`, in fp32 inside: exact for scaled rotations (yarn) and rounded cos and sin.

    Args and shapes as `rotate`, with keys after RoPE.
    """
    p = cos.shape[-1]
    cos, sin = cos.unsqueeze(1).float(), sin.unsqueeze(1).float()
    rotary, rest = keys[..., :p].float(), keys[..., p:]
    turned = (rotary * cos - _swap(rotary, interleaved) * sin) / (cos.square() + sin.square())
    turned = turned.to(keys.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
