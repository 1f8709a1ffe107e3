"""Unpack rows to latents on a GPU: the twin of `RowLayout.unpack`.

Rows are unpacked once for all layers of a group and every product over them is the library's (`attention_clla.py`):
kernels that unpacked what they multiplied did so again in every layer, which took longer than to write latents down and
read them (docs/lab-notes.md).

Rows are read in blocks of components that share a class, so that width, first byte and scale are scalars: component j
of a block lies at bit j·b, in at most two bytes.

Shape legend: B sequences, K rows, N bytes per row, r components. T rows of a tile, R components of a block.
"""

from __future__ import annotations  # kernels are defined where there is no Triton, too

from functools import lru_cache
from typing import Optional

import torch
from torch import Tensor

from .quantize_clla import JoinedLayout, Layout, RowLayout, quantization_step
from .triton_clla import BIAS, NAMESPACE, STEPS_PER_OCTAVE, flat_layout, jit, on_gpu, tl, triton

ROWS, COMPONENTS = 32, 64  # of a program


def unpacked(
    data: Tensor, layout: Layout, dtype: torch.dtype, *, rank: Optional[int] = None, out: Optional[Tensor] = None
) -> Tensor:
    """Latents of packed rows, where they are; by the kernel on a GPU, if it knows the layout.

    Args:
        data: [B, K, N] uint8.
        layout: of a row.
        dtype: of the result.
        rank: the first components alone, a multiple of 8; None for all.
        out: [B, K' >= K, rank] that is written, zeros behind the rows; None for a new one of K.

    Returns:
        `out`, or the new tensor.
    """
    rank = rank or layout.rank
    if out is None:
        out = data.new_empty(*data.shape[:2], rank, dtype=dtype)
    if isinstance(layout, (RowLayout, JoinedLayout)) and on_gpu(data):
        launch = _UNPACK if torch.compiler.is_compiling() else _launch
        launch(data, out, flat_layout(layout), layout.row_bytes)
        return out
    count = data.shape[1]
    if isinstance(layout, RowLayout):
        layout.unpack(data, out=out[:, :count], rank=rank)
    elif rank == layout.rank:
        layout.unpack(data, out=out[:, :count])
    else:
        out[:, :count] = layout.unpack(data, dtype)[..., :rank]
    out[:, count:] = 0
    return out


def _launch(data: Tensor, out: Tensor, classes: list[int], row_bytes: int) -> None:
    batch, count, rank = out.shape
    blocks = block_table(tuple(classes), rank, data.device)
    if not batch * count * len(blocks):
        return
    with torch.cuda.device_of(data):
        unpack_kernel[(triton.cdiv(count, ROWS), len(blocks), batch)](
            data,
            out,
            blocks,
            data.shape[1],
            count,
            row_bytes,
            *data.stride()[:2],
            *out.stride()[:2],
            WIDE=needs_wide_offsets(data),
            T=ROWS,
            R=COMPONENTS,
            num_warps=4,
        )


_UNPACK = torch.library.custom_op(
    f"{NAMESPACE}::unpack",
    _launch,
    mutates_args=("out",),
    schema="(Tensor data, Tensor(a!) out, int[] classes, int row_bytes) -> ()",
)


def make_tables(layout: Layout, ranks: "tuple[int, ...]", device: torch.device) -> None:
    """Make what launches for these rows look up, for a number of components of a row."""
    for rank in ranks:
        block_table(tuple(flat_layout(layout)), rank, device)


def needs_wide_offsets(data: Tensor) -> bool:
    """Whether the bytes of one sequence need more than 32 bits to count."""
    return data.shape[1] * data.stride(1) >= 1 << 31


@lru_cache(maxsize=None)  # never given back: recorded graphs hold their addresses
def block_table(classes: tuple[int, ...], rank: int, device: torch.device) -> Tensor:
    """Blocks of components below `rank`, [blocks, 6] int32: byte of the scale, first byte, bits, first component,
    components, and the step's fp32."""
    found = []
    for i in range(0, len(classes), 5):
        scale, byte, bits, first, stop = classes[i : i + 5]
        step = int(torch.tensor(quantization_step(bits, stop - first), dtype=torch.float32).view(torch.int32))
        for start in range(first, min(stop, rank), COMPONENTS):
            at = byte + (start - first) * bits // 8
            found.append((scale, at, bits, start, min(COMPONENTS, stop - start, rank - start), step))
    with torch.inference_mode(False):
        return torch.tensor(found, dtype=torch.int32, device=device).reshape(-1, 6)


@jit(do_not_specialize=["count", "length"])
def unpack_kernel(
    data,
    out,
    blocks,
    count,
    length,
    row_bytes,
    data_stride_batch,
    data_stride_row,
    out_stride_batch,
    out_stride_row,
    WIDE: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
):
    """One block of components of a tile of `length` rows of one sequence, of which `count` are there."""
    blocks += tl.program_id(1) * 6
    scale_byte, first_byte, bits = tl.load(blocks), tl.load(blocks + 1), tl.load(blocks + 2)
    first, size = tl.multiple_of(tl.load(blocks + 3), 8), tl.multiple_of(tl.load(blocks + 4), 8)
    step = tl.load(blocks + 5).to(tl.float32, bitcast=True)
    row, batch = tl.program_id(0) * T + tl.arange(0, T), tl.program_id(2).to(tl.int64)
    there = row < count
    data += batch * data_stride_batch
    place = row.to(tl.int64) * data_stride_row if WIDE else row * data_stride_row
    at = tl.arange(0, R)
    byte, shift = first_byte + (at * bits >> 3), at * bits & 7
    mask = there[:, None] & (at < size)[None, :]
    low = tl.load(data + (place[:, None] + byte[None, :]), mask=mask, other=0).to(tl.int32)
    crosses = (shift + bits > 8) & (byte + 1 < row_bytes)
    high = tl.load(data + (place[:, None] + (byte + 1)[None, :]), mask=mask & crosses[None, :], other=0).to(tl.int32)
    code = ((low | (high << 8)) >> shift[None, :]) & ((1 << bits) - 1)
    level = code.to(tl.float32) + (0.5 - (1 << (bits - 1)).to(tl.float32))  # half integers
    scale = tl.load(data + (place + scale_byte), mask=there, other=0).to(tl.float32)
    scale = tl.where(scale > 0, tl.exp2((scale - BIAS) / STEPS_PER_OCTAVE) * step, 0.0)
    to = out + batch * out_stride_batch + row.to(tl.int64)[:, None] * out_stride_row + (first + at)[None, :]
    tl.store(to, level * scale[:, None], mask=(row < length)[:, None] & (at < size)[None, :])
