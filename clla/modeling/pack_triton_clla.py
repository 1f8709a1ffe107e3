"""Quantize latents and write them as packed rows in one kernel: the twin of `RowLayout.pack`.

One program takes a block of tokens and one class of components: their RMS, the error with every scale that is
tried, then the codes with the best and their bytes. It reads its part of the latents three times, from the L1
cache but for the first, so that classes of any size take the same few registers.

Rows equal those of `RowLayout.pack` but where fp32 cannot tell two scales or two levels apart: sums are
taken in another order, and the search multiplies by the reciprocal of the step. Codes are divided as there.

Shape legend: B batch, T tokens, r components, K rows, N bytes per row, C classes, L tokens per program, R components at
a time, O scales tried at once, G = R/8.
"""

from __future__ import annotations  # kernels are defined where there is no Triton, too

from functools import lru_cache
from typing import Callable, NamedTuple, Optional, Union

import torch
from torch import Tensor

from .quantize_clla import (
    SCALE_OFFSETS,
    JoinedLayout,
    RowLayout,
    decode_scale,
    quantization_step,
)
from .triton_clla import BIAS, STEPS_PER_OCTAVE, jit, on_gpu, tl, triton

SCALE_CODES = 256


class Block(NamedTuple):
    """What a program takes at once: L tokens, R components of each."""

    L: int
    R: int


MANY_TOKENS = 1024  # from here on there are programs enough when each takes several tokens
FEW, MANY = Block(1, 256), Block(4, 64)
# What packs latents on a CPU in place of PyTorch where clla is installed: as `RowLayout.pack`, or gives None.
COMPILED: "Optional[Callable[..., Optional[Tensor]]]" = None


def packed(latents: Tensor, layout: Union[RowLayout, JoinedLayout]) -> Tensor:
    """Rows [B, T, N] of latents [B, T, r], where they are; by kernels on a GPU, if they know the layout."""
    if not isinstance(layout, (RowLayout, JoinedLayout)) or not on_gpu(latents):
        found = None
        if COMPILED is not None and not torch.compiler.is_compiling():
            found = COMPILED(latents, layout)
        return layout.pack(latents) if found is None else found
    rows = latents.new_empty(*latents.shape[:2], layout.row_bytes, dtype=torch.uint8)
    component, byte = 0, 0
    for part in layout.parts:
        own = latents[..., component : component + part.rank]
        pack_rows(own, part, rows[..., byte : byte + part.row_bytes], 0)
        component, byte = component + part.rank, byte + part.row_bytes
    return rows


def pack_rows(latents: Tensor, layout: RowLayout, out: Tensor, first_row: Union[int, Tensor]) -> None:
    """Write `layout.pack(latents)` to `out[:, first_row : first_row + T]`.

    The first call of its kind (layout, device, dtype, strides, few or many tokens) compiles and makes tables: before
    a CUDA graph records it, it must have run once.

    Args:
        latents: [B, T, r], fp32, bf16 or fp16, any strides.
        layout: of rank r and N bytes per row.
        out: [B, K, N] uint8, any strides but for the bytes of a row, which are neighbours.
        first_row: where the first token goes; as a tensor of one int32 or int64 on the same device it is read by
            the kernel, so that a CUDA graph may be replayed for other rows; then the caller sees that they exist.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    batch, length, _ = latents.shape
    _check(latents, layout, out, first_row)
    tokens, classes = batch * length, len(layout.classes)
    if not tokens or not classes:
        return
    tables = _tables(tuple(layout.classes), latents.device)
    block = MANY if tokens >= MANY_TOKENS else FEW
    with torch.cuda.device_of(latents):
        pack_kernel[(triton.cdiv(tokens, block.L), classes)](
            latents,
            out,
            first_row,
            *tables,
            tokens,
            length,
            *latents.stride(),
            *out.stride()[:2],
            LAST_CODE=SCALE_CODES - 1,
            TRIES=len(SCALE_OFFSETS),
            ROW_ON_DEVICE=isinstance(first_row, Tensor),
            **block._asdict(),
            O=triton.next_power_of_2(len(SCALE_OFFSETS)),
            num_warps=4,
            enable_fp_fusion=False,  # PyTorch rounds products, too
        )


def _check(latents: Tensor, layout: RowLayout, out: Tensor, first_row: Union[int, Tensor]) -> None:
    batch, length, rank = latents.shape
    if rank != layout.rank or (out.shape[0], out.shape[2]) != (batch, layout.row_bytes):
        expected = f"[{batch}, {length}, {layout.rank}] and [{batch}, K, {layout.row_bytes}]"
        raise ValueError(f"latents {list(latents.shape)} and rows {list(out.shape)}: {expected} are expected")
    if out.dtype != torch.uint8 or (out.stride(2) != 1 and out.shape[2] > 1):
        raise ValueError(f"rows are {out.dtype} of strides {out.stride()}; uint8, bytes side by side, is expected")
    if latents.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"latents are {latents.dtype}; float32, bfloat16 or float16 is expected")
    if out.device != latents.device:
        raise ValueError(f"rows are on {out.device}, latents on {latents.device}; one device is expected")
    if not isinstance(first_row, Tensor):
        if not 0 <= first_row <= out.shape[1] - length:
            raise ValueError(f"{length} tokens from row {first_row} on do not fit into {out.shape[1]} rows")
    elif first_row.numel() != 1 or first_row.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"first_row is {first_row.dtype} {list(first_row.shape)}; one int32 or int64 is expected")
    elif first_row.device != latents.device:
        raise ValueError(f"first_row is on {first_row.device}, latents on {latents.device}; one device is expected")


@lru_cache(maxsize=None)  # never given back: recorded graphs hold their addresses
def _tables(classes: tuple[tuple[int, int, int], ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Bits, first component, size and first byte of each class [C, 4], steps by scale code [C, 256], offsets tried."""
    codes = torch.arange(SCALE_CODES, device=device)
    described, steps, position = [], [], len(classes)
    for bits, first, stop in classes:
        described.append((bits, first, stop - first, position))
        steps.append(quantization_step(bits, stop - first) * decode_scale(codes))
        position += (stop - first) * bits // 8
    offsets = torch.tensor(SCALE_OFFSETS, dtype=torch.int32, device=device)
    return torch.tensor(described, dtype=torch.int32, device=device), torch.stack(steps), offsets


@jit()
def _read(x, valid, at, stride, size):
    """Components `at` [R] of tokens [L, R], zeros where there are none."""
    mask = valid[:, None] & (at < size)[None, :]
    return tl.load(x[:, None] + at.to(tl.int64)[None, :] * stride, mask=mask, other=0.0).to(tl.float32)


@jit()
def _start(x, valid, stride, size, L: tl.constexpr, R: tl.constexpr):
    """Scale code [L] next to the RMS, not yet cut off above; 0 for zeros and NaNs."""
    squares = tl.zeros((L, R), tl.float32)
    for begin in range(0, size, R):
        part = _read(x, valid, begin + tl.arange(0, R), stride, size)
        squares += part * part
    rms = tl.sqrt_rn(tl.div_rn(tl.sum(squares, 1), size.to(tl.float32)))
    code = tl.floor(tl.log2(rms) * STEPS_PER_OCTAVE + 0.5) + BIAS
    return tl.where(rms > 0, tl.maximum(code, 1.0), 0.0)


@jit()
def _error(x, valid, stride, size, half, step, L: tl.constexpr, R: tl.constexpr, O: tl.constexpr):  # noqa: E741
    """Squared error [L, O] of a class with each of the steps [L, O]."""
    inverse = 1.0 / step  # inf where all is zero or NaN, and the only step tried 0
    squares = tl.zeros((L, O, R), tl.float32)
    for begin in range(0, size, R):
        at = begin + tl.arange(0, R)
        part = _read(x, valid, at, stride, size)[:, None, :]
        level = tl.minimum(tl.maximum(tl.floor(part * inverse[:, :, None]), -half), half - 1)
        error = (level + 0.5) * step[:, :, None] - part
        squares += tl.where((at < size)[None, None, :], error * error, 0.0)
    return tl.sum(squares, 2)


@jit()
def _write(x, valid, stride, size, bits, half, step, stream, L: tl.constexpr, R: tl.constexpr):
    """Codes of a class with the steps [L], as bytes from `stream` [L] on."""
    eight = tl.arange(0, 8)
    for begin in range(0, size, R):
        at = begin + tl.arange(0, R)
        level = tl.where(step[:, None] > 0, tl.div_rn(_read(x, valid, at, stride, size), step[:, None]), 0.0)
        code = tl.minimum(tl.maximum(tl.floor(level), -half), half - 1) + half
        code = tl.reshape(code.to(tl.int32), (L, R // 8, 8))
        group = begin // 8 + tl.arange(0, R // 8)
        mask = valid[:, None, None] & (group < size // 8)[None, :, None]
        to = stream[:, None, None] + (group * bits)[None, :, None]  # 8 codes of b bits are b bytes
        if bits == 16:
            tl.store(to + 2 * eight[None, None, :], (code & 255).to(tl.uint8), mask=mask)
            tl.store(to + 2 * eight[None, None, :] + 1, (code >> 8).to(tl.uint8), mask=mask)
        else:
            words = tl.sum(code.to(tl.int64) << (eight * bits)[None, None, :], 2)
            octets = (words[:, :, None] >> (eight * 8)[None, None, :]) & 255
            tl.store(to + eight[None, None, :], octets.to(tl.uint8), mask=mask & (eight < bits)[None, None, :])


@jit(do_not_specialize=["first_row", "tokens", "length"])
def pack_kernel(
    latents,
    out,
    first_row,
    classes,
    steps,
    offsets,
    tokens,
    length,
    latents_stride_batch,
    latents_stride_token,
    latents_stride_component,
    out_stride_batch,
    out_stride_row,
    LAST_CODE: tl.constexpr,
    TRIES: tl.constexpr,
    ROW_ON_DEVICE: tl.constexpr,
    L: tl.constexpr,
    R: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
):
    """One class of `L` of all tokens, these counted through the batch; grid [tokens / L, C]."""
    which = tl.program_id(1)
    bits = tl.load(classes + 4 * which)
    first = tl.load(classes + 4 * which + 1).to(tl.int64)
    size = tl.load(classes + 4 * which + 2)
    position = tl.load(classes + 4 * which + 3)
    half = (1 << (bits - 1)).to(tl.float32)
    steps += which * (LAST_CODE + 1)

    token = tl.program_id(0) * L + tl.arange(0, L)
    valid = token < tokens
    sequence, slot = (token // length).to(tl.int64), (token % length).to(tl.int64)
    x = latents + sequence * latents_stride_batch + slot * latents_stride_token + first * latents_stride_component
    row = slot + (tl.load(first_row) if ROW_ON_DEVICE else first_row)
    row = out + sequence * out_stride_batch + row * out_stride_row

    start = _start(x, valid, latents_stride_component, size, L, R)
    start = tl.minimum(start, LAST_CODE * 1.0).to(tl.int32)[:, None]
    tries = tl.arange(0, O)[None, :]
    tried = tl.maximum(start + tl.load(offsets + tries, mask=tries < TRIES, other=0), 1)
    tried = tl.where(start > 0, tl.minimum(tried, LAST_CODE), 0)  # [L, O]
    error = _error(x, valid, latents_stride_component, size, half, tl.load(steps + tried), L, R, O)
    error = tl.where(tries < TRIES, error, float("inf"))
    # The first of the least: the RMS itself wins ties. NaNs have no least error, but only 0 is tried for them.
    best = tl.min(tl.where(error == tl.min(error, 1)[:, None], tries, O - 1), 1)
    scale = tl.sum(tl.where(tries == best[:, None], tried, 0), 1)  # [L]
    tl.store(row + which, scale.to(tl.uint8), mask=valid)
    _write(x, valid, latents_stride_component, size, bits, half, tl.load(steps + scale), row + position, L, R)
