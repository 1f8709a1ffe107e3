"""Quantize latents to a few bits a component and store them packed.

A latent of r components is cut into tiers of `tier_size` neighbours; each tier has one bit width and,
per token, one 8-bit scale (its RMS, in steps of an eighth of an octave). Codes are symmetric mid-rise
(half-integer levels) with the step that is best for a Gaussian (Max, 1960). One token's latent is one
row of bytes: the scales, then every bit width's codes in planes. In a plane of w bits, byte j holds
components j, j + m, j + 2m, … of its width class (m = bytes in the plane), so a reader needs shifts and
masks only. Widths that do not divide 8 are split into planes that do (3 = 2 + 1).

Shape legend: … any leading dims (batch, tokens), r components, N bytes a row.
"""

import hashlib
import math

import torch
from torch import Tensor

# Best uniform step for a unit Gaussian by bits; 16 bits never clip (see `_step`).
GAUSSIAN_STEP = {1: 1.5958, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,), 16: (8, 8)}
SCALE_STEPS_PER_OCTAVE = 8
SCALE_BIAS = 128


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
        self.num_tiers = len(self.tier_bits)
        self.rank = self.num_tiers * tier_size
        self.row_bytes = self.num_tiers + sum(tier_size * b // 8 for b in self.tier_bits)
        # (bits, first tier, last tier + 1) of each run of equal widths
        self.classes: list[tuple[int, int, int]] = []
        for i, bits in enumerate(self.tier_bits):
            if self.classes and self.classes[-1][0] == bits:
                self.classes[-1] = (bits, self.classes[-1][1], i + 1)
            else:
                self.classes.append((bits, i, i + 1))

    def pack(self, latents: Tensor) -> Tensor:
        """Quantize latents [..., r] into rows [..., N] of uint8."""
        tiers = latents.float().unflatten(-1, (self.num_tiers, self.tier_size))  # [..., tiers, size]
        scale_codes = _encode_scale(tiers.square().mean(-1).sqrt())
        scales = _decode_scale(scale_codes)
        parts = [scale_codes]
        for bits, first, stop in self.classes:
            step = _step(bits, self.tier_size) * scales[..., first:stop, None]
            half = 1 << (bits - 1)
            # A zero scale (an all-zero tier) must not divide: its codes are never used.
            level = torch.where(step > 0, tiers[..., first:stop, :] / step, 0.0).floor()
            codes = (level.clamp(-half, half - 1) + half).to(torch.int32).flatten(-2)
            parts += _to_planes(codes, bits)
        return torch.cat(parts, dim=-1)

    def unpack(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Latents [..., r] from rows [..., N] of uint8."""
        scales = _decode_scale(rows[..., : self.num_tiers])
        position = self.num_tiers
        parts = []
        for bits, first, stop in self.classes:
            size = (stop - first) * self.tier_size
            codes, position = _from_planes(rows, bits, size, position)
            step = _step(bits, self.tier_size) * scales[..., first:stop, None]
            level = codes.unflatten(-1, (stop - first, self.tier_size)) + (0.5 - (1 << (bits - 1)))
            parts.append((level * step).flatten(-2).to(dtype))
        if not parts:
            return torch.zeros(*rows.shape[:-1], 0, dtype=dtype, device=rows.device)
        return torch.cat(parts, dim=-1)


def _step(bits: int, tier_size: int) -> float:
    if bits == 16:  # no component exceeds sqrt(tier_size) times its tier's RMS; the margin is the scale's rounding
        return 2.0 * 1.1 * math.sqrt(tier_size) / 65536
    return GAUSSIAN_STEP[bits]


def _encode_scale(rms: Tensor) -> Tensor:
    """8-bit logarithmic code of a scale; 0 stands for zero."""
    code = (rms.log2() * SCALE_STEPS_PER_OCTAVE).round() + SCALE_BIAS
    return torch.where(rms > 0, code.clamp(1, 255), 0.0).to(torch.uint8)


def _decode_scale(code: Tensor) -> Tensor:
    exponent = (code.float() - SCALE_BIAS) / SCALE_STEPS_PER_OCTAVE
    return torch.where(code > 0, exponent.exp2(), 0.0)


def _to_planes(codes: Tensor, bits: int) -> "list[Tensor]":
    planes, shift = [], 0
    for width in PLANES[bits]:
        per_byte = 8 // width
        field = (codes >> shift) & ((1 << width) - 1)
        field = field.unflatten(-1, (per_byte, -1))  # [..., per_byte, m]
        byte = sum(field[..., i, :] << (width * i) for i in range(per_byte))
        planes.append(byte.to(torch.uint8))
        shift += width
    return planes


def _from_planes(rows: Tensor, bits: int, size: int, position: int) -> "tuple[Tensor, int]":
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
