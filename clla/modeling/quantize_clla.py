"""Quantize latents to a few bits a component and store them packed.

A latent of r components is cut into tiers of `tier_size` neighbours, each with one bit width, never
increasing; the tiers of one width form a class, those of 8 bits several (`begins_scale`). One token's latent is
one row of bytes: a scale for every class (8 bits, in steps of an eighth of an octave), then every class's codes
in planes. Codes are symmetric mid-rise (half-integer levels) with the step that is best for a Gaussian (Max,
1960), times the scale. In a plane of w bits, byte j holds components j, j + m, j + 2m, … of its class (m = bytes
in the plane), so a reader needs shifts and masks only. Widths that do not divide 8 are split into planes that do
(3 = 2 + 1).

Latents have unit variance by construction and are nearly Gaussian. A scale for every tier buys less than
the bits it takes; one scale for the whole row ruins frequent tokens whose size differs between the first
components and the rest, and so does one for a long class of 8 bits (docs/lab-notes.md).

Shape legend: … any leading dims (batch, tokens), r components, N bytes a row.
"""

import hashlib
import math
from typing import Optional

import torch
from torch import Tensor

# Best uniform step for a unit Gaussian by bits; 16 bits never clip (see `_step`).
GAUSSIAN_STEP = {1: 1.5958, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,), 16: (8, 8)}
WIDE_BITS = 8  # of this width the first components do not share a scale with the rest; 16 bits never clip
SCALE_STEPS_PER_OCTAVE = 8
SCALE_BIAS = 128
SCALE_OFFSETS = (0, -1, 1, -2, 2, 3)  # steps around the RMS that are tried; the RMS itself wins ties


def begins_scale(tier: int, bits: int, before: "Optional[int]") -> bool:
    """Whether a scale of its own begins with a tier: where widths change, and at tiers 1, 3, 7, 15 … of 8 bits.

    Args:
        tier: its number in the row.
        bits: its width.
        before: the width of the tier before; None for the first.
    """
    return bits != before or (bits == WIDE_BITS and tier & (tier + 1) == 0)


class RowLayout:
    """Where each tier's codes lie in a row of bytes.

    Args:
        tier_bits: bits a component, one entry a coded tier, never increasing.
        tier_size: components a tier, a multiple of 8.

    Raises:
        ValueError: widths or sizes that cannot be packed.
    """

    def __init__(self, tier_bits: "tuple[int, ...]", tier_size: int) -> None:
        if tier_size % 8 or tier_size <= 0:
            raise ValueError(f"tier_size is {tier_size}; a multiple of 8 is expected")
        if any(b not in PLANES for b in tier_bits) or list(tier_bits) != sorted(tier_bits, reverse=True):
            raise ValueError(f"tier bits {tier_bits}: widths among {sorted(PLANES)}, never increasing, are expected")
        self.tier_bits, self.tier_size = tuple(tier_bits), tier_size
        self.rank = len(self.tier_bits) * tier_size
        # (bits, first component, last component + 1) of each class
        self.classes: list[tuple[int, int, int]] = []
        for i, bits in enumerate(self.tier_bits):
            begins = begins_scale(i, bits, self.tier_bits[i - 1] if i else None)
            first = i * tier_size if begins else self.classes.pop()[1]
            self.classes.append((bits, first, (i + 1) * tier_size))
        self.row_bytes = len(self.classes) + sum(tier_size * b // 8 for b in self.tier_bits)

    def pack(self, latents: Tensor) -> Tensor:
        """Quantize latents [..., r] into rows [..., N] of uint8."""
        scales, planes = [], []
        for bits, first, stop in self.classes:
            scale, codes = quantize(latents[..., first:stop], bits)
            scales.append(scale)
            planes += to_planes(codes, bits)
        if not scales:
            return torch.zeros(*latents.shape[:-1], 0, dtype=torch.uint8, device=latents.device)
        return torch.cat(scales + planes, dim=-1)

    def unpack(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Latents [..., r] from rows [..., N] of uint8."""
        position, parts = len(self.classes), []
        for i, (bits, first, stop) in enumerate(self.classes):
            codes, position = from_planes(rows, bits, stop - first, position)
            parts.append(dequantize(rows[..., i : i + 1], codes, bits).to(dtype))
        if not parts:
            return torch.zeros(*rows.shape[:-1], 0, dtype=dtype, device=rows.device)
        return torch.cat(parts, dim=-1)

    def rounded(self, latents: Tensor) -> Tensor:
        """What `unpack` gives of `pack`, without the packing; [..., r], dtype kept."""
        parts = [latents[..., :0]]
        for bits, first, stop in self.classes:
            parts.append(dequantize(*quantize(latents[..., first:stop], bits), bits).to(latents.dtype))
        return torch.cat(parts, dim=-1)


def quantize(x: Tensor, bits: int) -> "tuple[Tensor, Tensor]":
    """Scale codes [..., 1] (uint8) and codes [..., size] (int32) of one class, the scale of least error."""
    x = x.float()
    half = 1 << (bits - 1)
    start = _encode_scale(x.square().mean(-1, keepdim=True).sqrt())
    best_error = scale = codes = torch.empty(0)
    for offset in SCALE_OFFSETS:
        tried = torch.where(start > 0, (start.int() + offset).clamp(1, 255), 0).to(torch.uint8)
        step = _step(bits, x.shape[-1]) * _decode_scale(tried)
        # A zero scale (all zeros) must not divide: its codes are never used.
        level = torch.where(step > 0, x / step, 0.0).floor().clamp(-half, half - 1)
        error = ((level + 0.5) * step - x).square().sum(-1, keepdim=True)
        if offset == 0:
            best_error, scale, codes = error, tried, level + half
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        scale, codes = torch.where(better, tried, scale), torch.where(better, level + half, codes)
    return scale, codes.to(torch.int32)


def dequantize(scale: Tensor, codes: Tensor, bits: int) -> Tensor:
    """Components [..., size] (fp32) of one class, from what `quantize` gives."""
    return (codes + (0.5 - (1 << (bits - 1)))) * (_step(bits, codes.shape[-1]) * _decode_scale(scale))


def _step(bits: int, size: int) -> float:
    if bits == 16:  # no component exceeds sqrt(size) times the RMS; the margin is for the scale's rounding
        return 2.0 * 1.1 * math.sqrt(size) / 65536
    return GAUSSIAN_STEP[bits]


def _encode_scale(rms: Tensor) -> Tensor:
    """8-bit logarithmic code of a scale; 0 stands for zero."""
    code = (rms.log2() * SCALE_STEPS_PER_OCTAVE).round() + SCALE_BIAS
    return torch.where(rms > 0, code.clamp(1, 255), 0.0).to(torch.uint8)


def _decode_scale(code: Tensor) -> Tensor:
    exponent = (code.float() - SCALE_BIAS) / SCALE_STEPS_PER_OCTAVE
    return torch.where(code > 0, exponent.exp2(), 0.0)


def to_planes(codes: Tensor, bits: int) -> "list[Tensor]":
    """Planes [..., size * w / 8] of uint8, one for each width w of `PLANES[bits]`, of codes [..., size]."""
    planes, shift = [], 0
    for width in PLANES[bits]:
        per_byte = 8 // width
        field = (codes >> shift) & ((1 << width) - 1)
        field = field.unflatten(-1, (per_byte, -1))  # [..., per_byte, m]
        byte = sum(field[..., i, :] << (width * i) for i in range(per_byte))
        planes.append(byte.to(torch.uint8))
        shift += width
    return planes


def from_planes(rows: Tensor, bits: int, size: int, position: int) -> "tuple[Tensor, int]":
    """Codes [..., size] whose planes begin at byte `position` of rows [..., N], and the byte after them."""
    codes, shift = torch.zeros((), dtype=torch.int32 if bits > 8 else torch.uint8, device=rows.device), 0
    for width in PLANES[bits]:
        per_byte = 8 // width
        byte = rows[..., position : position + size // per_byte]
        position += size // per_byte
        fields = [(byte >> (width * i)) & ((1 << width) - 1) for i in range(per_byte)]
        codes = codes | (torch.cat(fields, dim=-1).to(codes.dtype) << shift)
        shift += width
    return codes, position


def tensor_digest(tensors: "dict[str, Tensor]") -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
