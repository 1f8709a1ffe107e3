"""Logits of absorbed queries and packed rows on a GPU: rows are unpacked in registers, once for all query heads.

Every row stands for one key of r + p channels that all heads of a layer share, so the queries of all heads are the
columns of one product of the matrix units; nothing is decoded or rotated. The helpers are those of
`attention_triton_clla.py`, whose `sums_kernel` adds up the latents afterwards.

Shape legend: B sequences, M query rows (heads times new tokens), K rows, N bytes per row, r + p components.
T tokens of a tile, R components of a block, QUERIES query rows of a program.
"""

from __future__ import annotations  # kernels are defined where there is no Triton, too

from typing import Any, Optional

import torch
from torch import Tensor

from .rows_clla import PackedRows
from .triton_clla import (
    COMPONENTS,
    LEAST,
    NAMESPACE,
    QUERY_ROWS,
    block_components,
    block_latents,
    block_table,
    decoder_part,
    flat_layout,
    jit,
    needs_wide_offsets,
    row_places,
    tile_of,
    tl,
    triton,
)


def absorbed_logits(rows: PackedRows, query: Tensor, scaling: float) -> Tensor:
    """Logits [B, H_q, T, K] in fp32 of queries [B, H_q, T, r + p]; -inf where a row is masked."""
    launch = _LOGITS if torch.compiler.is_compiling() else _launch
    tensors = (rows.data, query.flatten(1, 2).contiguous(), rows.hidden, rows.used)
    logits = launch(*tensors, flat_layout(rows.layout), rows.layout.row_bytes, query.shape[2], scaling)
    return logits.unflatten(1, query.shape[1:3])


def _launch(
    data: Tensor,
    query: Tensor,
    hidden: Tensor,
    used: Optional[Tensor],
    classes: list[int],
    row_bytes: int,
    tokens: int,
    scaling: float,
) -> Tensor:
    batch, query_rows, width = query.shape
    assert width % 8 == 0, "queries are read 8 components at a time"
    count = data.shape[1]
    out = query.new_empty(batch, query_rows, count, dtype=torch.float32)
    at_once = min(QUERY_ROWS, max(LEAST, triton.next_power_of_2(query_rows)))
    slices = triton.cdiv(query_rows, at_once)
    tile, warps = tile_of(count, batch * slices, at_once * query.itemsize, query.device)
    blocks = block_table(tuple(classes), COMPONENTS, width, query.device)
    with torch.cuda.device_of(query):
        absorbed_kernel[(triton.cdiv(count, tile), slices, batch)](
            data,
            blocks,
            query,
            out,
            hidden,
            hidden if used is None else used,
            scaling,
            count,
            row_bytes,
            len(blocks),
            query_rows,
            tokens,
            *data.stride()[:2],
            query.stride(0) // 8,  # widths are multiples of 8; so the compiler knows
            query.stride(1) // 8,
            *out.stride()[:2],
            WIDE=needs_wide_offsets(data),
            LIMITED=used is not None,
            T=tile,
            R=COMPONENTS,
            QUERIES=at_once,
            num_warps=warps,
            num_stages=3,
        )
    return out


_LOGITS = torch.library.custom_op(
    f"{NAMESPACE}::absorbed_logits",
    _launch,
    mutates_args=(),
    schema="(Tensor data, Tensor query, Tensor hidden, Tensor? used, int[] classes, int row_bytes, int tokens, "
    "float scaling) -> Tensor",
)


@_LOGITS.register_fake
def _logits_like(data: Tensor, query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(*query.shape[:2], data.shape[1], dtype=torch.float32)


@jit(do_not_specialize=["count", "block_count"])
def absorbed_kernel(
    data,
    blocks,
    query,
    out,
    hidden,
    used,
    scaling,
    count,
    row_bytes,
    block_count,
    query_rows,
    tokens,
    data_stride_batch,
    data_stride_row,
    query_stride_batch,
    query_stride_row,
    out_stride_batch,
    out_stride_row,
    WIDE: tl.constexpr,
    LIMITED: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Logits [T, QUERIES] of one tile of rows and some query rows of one sequence."""
    batch, begin = tl.program_id(2).to(tl.int64), tl.program_id(0) * T
    token = begin + tl.arange(0, T)
    valid = token < count
    place, row = row_places(data, token, valid, data_stride_row, False, WIDE)
    asked = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    asked_mask = asked < query_rows
    data += batch * data_stride_batch
    query += batch * query_stride_batch * 8
    first, stop = tl.load(hidden + batch).to(tl.int32), count
    if LIMITED:
        stop = tl.load(used).to(tl.int32)
    # Nothing to unpack where no row may be seen.
    block_count = tl.where((begin + T > first) & (begin < stop), block_count, 0)
    logits = tl.zeros((T, QUERIES), tl.float32)
    for block in range(0, block_count):
        component, wanted = block_components(blocks, block, R)
        latent = block_latents(data, row, valid, blocks, block, row_bytes, T, R).to(query.dtype.element_ty)
        asking = decoder_part(query, query_stride_row, component, wanted, asked, asked_mask)
        logits = tl.dot(latent, asking, logits, input_precision="ieee")
    newest = stop - tokens + asked % tokens  # the last row that each query sees
    seen = (place >= first)[:, None] & (place[:, None] <= newest[None, :])
    to = batch * out_stride_batch + asked.to(tl.int64) * out_stride_row
    logits = tl.where(seen, logits * scaling, float("-inf"))
    tl.store(out + to[None, :] + token[:, None], logits, mask=valid[:, None] & asked_mask[None, :])
