"""Asymmetric min-max quantization of groups of neighbours to a few bits, packed.

Codes lie as in `clla.modeling.quantize_clla`; scale and minimum are fp16.

Shape legend: … any leading dims, g components per group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clla.modeling.quantize_clla import pack_bits, unpack_bits

TINY = 1e-6  # a constant group has no range; its codes are all zero
FP16_MAX = torch.finfo(torch.float16).max


def pack(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes [..., g * bits / 8] uint8 and fp16 (scale, minimum) [..., 2] of groups [..., g]."""
    x, levels = x.float(), (1 << bits) - 1
    low = x.amin(-1, keepdim=True).clamp(-FP16_MAX, FP16_MAX).half()
    # From the minimum as it is stored, so that the last level still reaches the maximum after a large offset rounds.
    scale = ((x.amax(-1, keepdim=True) - low.float()) / levels).clamp(TINY, FP16_MAX).half()
    codes = ((x - low.float()) / scale.float()).round().clamp(0, levels)
    return pack_bits(codes, bits), torch.cat((scale, low), -1)


def unpack(packed: Tensor, affine: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`, fp32."""
    codes = unpack_bits(packed, bits)
    scale, low = affine.float().split(1, -1)
    return torch.addcmul(low, codes.float(), scale)
