"""Quantize latents to a few bits per component and store them packed.

A latent of r components is cut into tiers of `tier_size` neighbours, each with one bit width, never
increasing; the tiers of one width form a class, those of 8 bits several (`begins_scale`). One token's latent is
one row of bytes: a scale for every class (8 bits, in steps of an eighth of an octave), then every class's codes.
Codes are symmetric mid-rise (half-integer levels) with the step that is best for a Gaussian (Max, 1960), times
the scale. Codes of b bits are a stream: component c of its class fills the bits from c·b on, lowest first, so any
component is found in at most two bytes, by a shift and a mask.

Latents have unit variance by construction and are nearly Gaussian. A scale for every tier buys less than
the bits it takes; one scale for the whole row ruins frequent tokens whose size differs between the first
components and the rest, and so does one for a long class of 8 bits (docs/lab-notes.md).

Shape legend: … any leading dims (batch, tokens), r components, N bytes per row.
"""

import hashlib
import math
from typing import Optional, Union

import torch
from torch import Tensor, nn

from .sizes_clla import WORD_BITS
from .spec_clla import GroupSpec

# Best uniform step for a unit Gaussian by bits; 16 bits never clip (see `quantization_step`).
GAUSSIAN_STEP = {1: 1.5958, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
WIDE_BITS = 8  # of this width the first components do not share a scale with the rest; 16 bits never clip
ROPE_TIER = 8  # components of a rotary key come in multiples of it
SCALE_STEPS_PER_OCTAVE = 8
SCALE_BIAS = 128
_TABLES: "dict[tuple[int, torch.dtype, torch.device], Tensor]" = {}
_STEPS: "dict[tuple[tuple[tuple[int, int, int], ...], torch.device], Tensor]" = {}
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
        tier_bits: bits per component, one entry a coded tier, never increasing.
        tier_size: components per tier, a multiple of 8.

    Raises:
        ValueError: widths or sizes that cannot be packed.
    """

    def __init__(self, tier_bits: "tuple[int, ...]", tier_size: int) -> None:
        if tier_size % 8 or tier_size <= 0:
            raise ValueError(f"tier_size is {tier_size}; a multiple of 8 is expected")
        if any(b not in WORD_BITS for b in tier_bits) or list(tier_bits) != sorted(tier_bits, reverse=True):
            raise ValueError(f"tier bits {tier_bits}: widths among {sorted(WORD_BITS)}, never increasing, are expected")
        self.tier_bits, self.tier_size = tuple(tier_bits), tier_size
        self.rank = len(self.tier_bits) * tier_size
        # (bits, first component, last component + 1) of each class
        self.classes: list[tuple[int, int, int]] = []
        for i, bits in enumerate(self.tier_bits):
            begins = begins_scale(i, bits, self.tier_bits[i - 1] if i else None)
            first = i * tier_size if begins else self.classes.pop()[1]
            self.classes.append((bits, first, (i + 1) * tier_size))
        self.row_bytes = len(self.classes) + sum(tier_size * b // 8 for b in self.tier_bits)

    @property
    def parts(self) -> "tuple[RowLayout, ...]":
        """What lies side by side in a row, as of `JoinedLayout`."""
        return (self,)

    def pack(self, latents: Tensor) -> Tensor:
        """Quantize latents [..., r] into rows [..., N] of uint8."""
        scales, streams = [], []
        for bits, first, stop in self.classes:
            scale, codes = quantize(latents[..., first:stop], bits)
            scales.append(scale)
            streams.append(pack_bits(codes, bits))
        if not scales:
            return torch.zeros(*latents.shape[:-1], 0, dtype=torch.uint8, device=latents.device)
        return torch.cat(scales + streams, dim=-1)

    def unpack(
        self,
        rows: Tensor,
        dtype: torch.dtype = torch.float32,
        *,
        out: "Optional[Tensor]" = None,
        rank: "Optional[int]" = None,
    ) -> Tensor:
        """Latents [..., r] from rows [..., N] of uint8, in a dtype or into `out`.

        With `rank`, a multiple of 8, the first components alone, for which no other bytes are read.
        """
        rank = self.rank if rank is None else rank
        latents = rows.new_empty(*rows.shape[:-1], rank, dtype=dtype) if out is None else out
        dtype = latents.dtype
        read = [(bits, first, min(stop, rank)) for bits, first, stop in self.classes if first < rank]
        position = len(self.classes)
        scales = nn.functional.embedding(rows[..., : len(read)].int(), scale_table(rows.device))[..., 0]
        scales = scales * class_steps(tuple(self.classes), rows.device)[: len(read)]
        rounded = scales.to(dtype)
        for i, (bits, first, stop) in enumerate(read):
            end = position + (stop - first) * bits // 8
            levels = unpack_levels(rows[..., position:end], bits, dtype)
            scale = (rounded if levels.dtype == dtype else scales)[..., i : i + 1]
            if torch.compiler.is_compiling():  # no compiler knows the other
                latents[..., first:stop] = levels * scale
            else:
                torch.mul(levels, scale, out=latents[..., first:stop])
            position = end
        return latents

    def rounded(self, latents: Tensor) -> Tensor:
        """What `unpack` gives of `pack`, without the packing; [..., r], dtype kept."""
        parts = [latents[..., :0]]
        for bits, first, stop in self.classes:
            parts.append(dequantize(*quantize(latents[..., first:stop], bits), bits).to(latents.dtype))
        return torch.cat(parts, dim=-1)


class JoinedLayout:
    """A row of two parts side by side: a latent, and a rotary key behind it.

    Args:
        latent: layout of the first part.
        rotary: of the second.
    """

    def __init__(self, latent: RowLayout, rotary: RowLayout) -> None:
        self.parts = (latent, rotary)
        self.rank, self.row_bytes = latent.rank + rotary.rank, latent.row_bytes + rotary.row_bytes

    def pack(self, latents: Tensor) -> Tensor:
        """As `RowLayout.pack`."""
        return torch.cat([part.pack(x) for part, x in zip(self.parts, self._split(latents), strict=True)], dim=-1)

    def unpack(self, rows: Tensor, dtype: torch.dtype = torch.float32, *, out: "Optional[Tensor]" = None) -> Tensor:
        """As `RowLayout.unpack`."""
        latents = rows.new_empty(*rows.shape[:-1], self.rank, dtype=dtype) if out is None else out
        found = rows.split([part.row_bytes for part in self.parts], dim=-1)
        for part, own, place in zip(self.parts, found, self._split(latents), strict=True):
            part.unpack(own, out=place)
        return latents

    def rounded(self, latents: Tensor) -> Tensor:
        """As `RowLayout.rounded`."""
        return torch.cat([part.rounded(x) for part, x in zip(self.parts, self._split(latents), strict=True)], dim=-1)

    def _split(self, latents: Tensor) -> "tuple[Tensor, ...]":
        return latents.split([part.rank for part in self.parts], dim=-1)


Layout = Union[RowLayout, JoinedLayout]


def layout_of(group: GroupSpec) -> Layout:
    """Layout of a token's row in one layer group."""
    latent = RowLayout(group.tier_bits, group.tier_size)
    if group.rope_bits is None or not group.rope_pairs:
        return latent
    return JoinedLayout(latent, RowLayout((group.rope_bits,) * (group.rotary_width // ROPE_TIER), ROPE_TIER))


def quantize(x: Tensor, bits: int) -> "tuple[Tensor, Tensor]":
    """Scale codes [..., 1] (uint8) and codes [..., size] (int32) of one class, the scale of least error."""
    x = x.float()
    half = 1 << (bits - 1)
    start = _encode_scale(x.square().mean(-1, keepdim=True).sqrt())
    best_error = scale = codes = torch.empty(0)
    for offset in SCALE_OFFSETS:
        tried = torch.where(start > 0, (start.int() + offset).clamp(1, 255), 0).to(torch.uint8)
        step = quantization_step(bits, x.shape[-1]) * decode_scale(tried)
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
    return (codes + (0.5 - (1 << (bits - 1)))) * (quantization_step(bits, codes.shape[-1]) * decode_scale(scale))


def quantization_step(bits: int, size: int) -> float:
    if bits == 16:  # no component exceeds sqrt(size) times the RMS; the margin is for the scale's rounding
        return 2.0 * 1.1 * math.sqrt(size) / 65536
    return GAUSSIAN_STEP[bits]


def _encode_scale(rms: Tensor) -> Tensor:
    """8-bit logarithmic code of a scale; 0 stands for zero."""
    code = (rms.log2() * SCALE_STEPS_PER_OCTAVE).round() + SCALE_BIAS
    return torch.where(rms > 0, code.clamp(1, 255), 0.0).to(torch.uint8)


def decode_scale(code: Tensor) -> Tensor:
    exponent = (code.float() - SCALE_BIAS) / SCALE_STEPS_PER_OCTAVE
    return torch.where(code > 0, exponent.exp2(), 0.0)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Bytes [..., size·bits/8] of codes [..., size]; size is a multiple of 8."""
    at_once = 64 // max(bits, 8)  # codes whose bits fill whole bytes of an int64
    places = torch.arange(at_once, device=codes.device)
    words = (codes.long().unflatten(-1, (-1, at_once)) << (places * bits)).sum(-1, keepdim=True)
    octets = torch.arange(at_once * bits // 8, device=codes.device)
    return ((words >> (octets * 8)) & 255).to(torch.uint8).flatten(-2)


def unpack_bits(data: Tensor, bits: int) -> Tensor:
    """Codes [..., size] (int32), from what `pack_bits` gives."""
    return _codes_of_words(_words(data, WORD_BITS[bits]), bits).flatten(-2)


def unpack_levels(data: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Half-integer levels [..., size] of packed codes, exact in any dtype that can hold them (16 bits: fp32)."""
    if bits == 16:
        return unpack_bits(data, bits) + (0.5 - (1 << 15))
    table = _table(bits, dtype, data.device)
    return nn.functional.embedding(_words(data, WORD_BITS[bits]), table).flatten(-2)


def class_steps(classes: "tuple[tuple[int, int, int], ...]", device: torch.device) -> Tensor:
    """Step of each class, [C] fp32. Made once: a list would be copied to the device in every call."""
    key = (classes, device)
    if key not in _STEPS:
        with torch.inference_mode(False):
            steps = [quantization_step(bits, stop - first) for bits, first, stop in classes]
            _STEPS[key] = torch.tensor(steps, dtype=torch.float32, device=device)
    return _STEPS[key]


def scale_table(device: torch.device) -> Tensor:
    """Scales [256, 1] of their codes, fp32."""
    return _table(0, torch.float32, device)


def _table(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Levels [2^w, w/bits] of every word of w bits; with `bits` 0 the scales [256, 1] of their codes. Made once."""
    key = (bits, dtype, device)
    if key not in _TABLES:
        with torch.inference_mode(False):
            if bits:
                words = torch.arange(1 << WORD_BITS[bits], dtype=torch.int32, device=device)
                table = _codes_of_words(words, bits) + (0.5 - (1 << (bits - 1)))
            else:
                table = decode_scale(torch.arange(256, device=device))[:, None]
            _TABLES[key] = table.to(dtype)
    return _TABLES[key]


def _codes_of_words(words: Tensor, bits: int) -> Tensor:
    """Codes [..., w/bits] of words [...] of w bits (int32)."""
    places = torch.arange(WORD_BITS[bits] // bits, dtype=torch.int32, device=words.device)
    return (words[..., None] >> (places * bits)) & ((1 << bits) - 1)


def _words(data: Tensor, width: int) -> Tensor:
    """Cut a stream of bytes [..., N] into words [..., 8N/width] of `width` bits (int32)."""
    data = data.to(torch.int32)
    if width == 8:
        return data
    period = width // math.gcd(width, 8)  # bytes after which words begin with a byte again
    octets, words = data.unflatten(-1, (-1, period)).unbind(-1), []
    for start in range(0, 8 * period, width):
        byte, shift = divmod(start, 8)
        word, read = octets[byte] >> shift if shift else octets[byte], 8 - shift
        if read < width:
            word, read = word | (octets[byte + 1] << read), read + 8
        words.append(word & ((1 << width) - 1) if read > width else word)
    return torch.stack(words, dim=-1).flatten(-2)


def tensor_digest(tensors: "dict[str, Tensor]") -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
