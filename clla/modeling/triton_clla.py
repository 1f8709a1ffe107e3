"""What the Triton kernels share: when they run, how programs are cut, and how a block of a packed row is unpacked."""

from __future__ import annotations  # kernels are defined where there is no Triton, too

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

from .quantize_clla import SCALE_BIAS, SCALE_STEPS_PER_OCTAVE, Layout, quantization_step

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: PyTorch alone computes
    triton = tl = None

COMPONENTS = 32  # of a block
COLUMNS = 128  # channels of one half of the pairs that a program holds, all its heads together
LEAST = 16  # rows and columns of the smallest product of the matrix units
QUERY_ROWS = 128  # that one program of `packed_sums` takes
# A compiler sees each launch as one operation. Every checkpoint may bring its own copy of this module, named after its
# folder: the operations of each copy have names of their own, made of signs that any name can be made of.
NAMESPACE = "clla_" + hashlib.sha256(f"{__name__} {__file__}".encode()).hexdigest()[:16]


def constant(value):
    """A number that kernels may use as it is."""
    return tl.constexpr(value) if tl is not None else value


STEPS_PER_OCTAVE, BIAS = constant(SCALE_STEPS_PER_OCTAVE), constant(SCALE_BIAS)


def on_gpu(x: Tensor) -> bool:
    """Whether kernels can read this."""
    return x.is_cuda and triton is not None


def jit(**options):
    """`triton.jit`, or nothing where there is no Triton."""
    return triton.jit(**options) if triton is not None else lambda function: function


def flat_layout(layout: Layout) -> list[int]:
    """Byte of the scale, first byte of the codes, bits, first and last component + 1 of all classes in one list."""
    found, byte, component = [], 0, 0
    for part in layout.parts:
        codes = byte + len(part.classes)
        for number, (bits, first, stop) in enumerate(part.classes):
            found += [byte + number, codes, bits, component + first, component + stop]
            codes += (stop - first) * bits // 8
        byte, component = byte + part.row_bytes, component + part.rank
    return found


def tile_of(count: int, programs: int, key_bytes: int, device: torch.device) -> "tuple[int, int]":
    """Tokens of a tile and warps of a program: large tiles read decoders less often, small ones fill the GPU.

    Keys in fp32, or of very wide heads, leave room for small ones alone; `key_bytes` are one token's half.
    """
    if key_bytes > 2 * COLUMNS:
        return 32, 4
    for tile, warps in ((128, 8), (64, 8)):
        if triton.cdiv(count, tile) * programs >= 2 * processors(device):
            return tile, warps
    return 32, 4


def needs_wide_offsets(data: Tensor) -> bool:
    """Whether the bytes of one sequence need more than 32 bits to count."""
    return data.shape[1] * data.stride(1) >= 1 << 31


@lru_cache(maxsize=None)
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@lru_cache(maxsize=None)  # never given back: recorded graphs hold their addresses
def block_table(classes: tuple[int, ...], size: int, rank: int, device: torch.device) -> Tensor:
    """Blocks of at most `size` components below `rank`, [blocks, 6] int32: byte of the scale, first byte, bits,
    first component, components, and the step's fp32."""
    found = []
    for i in range(0, len(classes), 5):
        scale, byte, bits, first, stop = classes[i : i + 5]
        step = int(torch.tensor(quantization_step(bits, stop - first), dtype=torch.float32).view(torch.int32))
        for start in range(first, min(stop, rank), size):
            at = byte + (start - first) * bits // 8
            found.append((scale, at, bits, start, min(size, stop - start, rank - start), step))
    return torch.tensor(found, dtype=torch.int32, device=device).reshape(-1, 6)


@jit()
def row_places(index, token, valid, stride, INDEXED: tl.constexpr, WIDE: tl.constexpr):
    """Numbers and first bytes of the rows [T] that are read in the places `token` of a sequence's index, or of all."""
    place = token
    if INDEXED:
        place = tl.load(index + token, mask=valid, other=0).to(tl.int32)
    return place, (place.to(tl.int64) * stride if WIDE else place * stride)


@jit()
def block_latents(data, row, valid, blocks, block, row_bytes, T: tl.constexpr, R: tl.constexpr):
    """Latents [T, R] of a block of components, in fp32, of rows at `row` [T] from `data`."""
    scale_byte, first_byte = tl.load(blocks + block * 6), tl.load(blocks + block * 6 + 1)
    bits = tl.load(blocks + block * 6 + 2)
    size = tl.load(blocks + block * 6 + 4)
    step = tl.load(blocks + block * 6 + 5).to(tl.float32, bitcast=True)
    at = tl.arange(0, R)
    byte = first_byte + (at * bits >> 3)
    shift = at * bits & 7
    mask = valid[:, None] & (at < size)[None, :]
    low = tl.load(data + (row[:, None] + byte[None, :]), mask=mask, other=0).to(tl.int32)
    crosses = (shift + bits > 8) & (byte + 1 < row_bytes)
    high = tl.load(data + (row[:, None] + (byte + 1)[None, :]), mask=mask & crosses[None, :], other=0).to(tl.int32)
    code = ((low | (high << 8)) >> shift[None, :]) & ((1 << bits) - 1)
    level = code.to(tl.float32) + (0.5 - (1 << (bits - 1)).to(tl.float32))  # half integers
    scale = tl.load(data + (row + scale_byte), mask=valid, other=0).to(tl.float32)
    scale = tl.where(scale > 0, tl.exp2((scale - BIAS) / STEPS_PER_OCTAVE) * step, 0.0)
    return level * scale[:, None]


@jit()
def block_components(blocks, block, R: tl.constexpr):
    """Numbers of a block's components [R], and which there are; classes are whole tiers, multiples of 8."""
    part = tl.arange(0, R)
    first, size = tl.multiple_of(tl.load(blocks + block * 6 + 3), 8), tl.multiple_of(tl.load(blocks + block * 6 + 4), 8)
    return first + part, part < size


@jit()
def decoder_part(weights, stride, component, component_mask, channel, channel_mask):
    """Decoder [R, C] of components and channels."""
    at = channel.to(tl.int64)[None, :] * (stride * 8) + component[:, None]
    return tl.load(weights + at, mask=component_mask[:, None] & channel_mask[None, :], other=0.0)
