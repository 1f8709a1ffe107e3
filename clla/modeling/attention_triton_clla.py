"""Attention over packed latents on a GPU, in two kernels; neither decoded keys nor values are ever written.

`packed_logits` rebuilds the keys of a tile of tokens on the matrix units, rotates them in registers and multiplies
them with the queries, several key-value heads in one program, so that a latent is unpacked once for all of them.
`packed_sums` adds up latents with the softmax's weights, for all heads at once; decoding those sums is one small
product (`attention_clla.py`). Between the two lie the logits, a few bytes per token and head: a rank of thousands, as
wide models have it, does not fit into registers as an accumulator, so one kernel with an online softmax would have to
unpack and rebuild every tile once for each slice of the rank. The time goes to rebuilding keys, r·H·d products a
token; everything else is small beside it.

Rows are read in blocks of components that share a class, so that width, first byte and scale are scalars: component j
of a block lies at bit j·b, in at most two bytes.

Shape legend: B sequences, H key-value heads, M query rows per head, K rows read, N bytes per row, d head dim, P rotary
pairs of it, r rank, S splits of the rows. T tokens of a tile, R components of a block, HEADS heads of a program.
"""

from __future__ import annotations  # kernels are defined where there is no Triton, too

from typing import Optional

import torch
from torch import Tensor

from .quantize_clla import Layout
from .rows_clla import PackedRows
from .triton_clla import (
    COLUMNS,
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
    processors,
    row_places,
    tile_of,
    tl,
    triton,
)

TOKENS = 64  # of a tile that `packed_sums` takes at a time
QUERIES = 64  # query rows that a tile's keys are multiplied with at once, where the matrix units do it
# Softmax weights are added up times this, so that fp16 can hold those of long texts, too: to 1e-9 in full precision.
WEIGHT_SCALE = 2.0**14


def packed_logits(
    rows: PackedRows,
    query: Tensor,
    decoder: Tensor,
    mean: Tensor,
    factors: Optional[Tensor],
    out: Tensor,
    rank: int,
    interleaved: bool,
    scaling: float,
) -> None:
    """Logits of queries and the decoded keys of all rows that are read.

    Args:
        rows: K of them are read.
        query: [B, H, M, d] after RoPE.
        decoder: [2·H·d, r] of the layer, keys first.
        mean: [2·H·d], likewise.
        factors: [B or 1, K, p/2, 2], cosines and sines of the rows' positions; None where keys are not rotated.
        out: [B, H, M, K] fp32 that is written, -inf where a row is masked.
        rank: the first components that count.
        interleaved: whether rotated pairs are neighbours.
        scaling: of the products.
    """
    tensors = (rows.data, query, decoder, mean, factors, rows.hidden, rows.used, rows.index, out)
    launch = _LOGITS if torch.compiler.is_compiling() else _launch_logits
    launch(*tensors, flat_layout(rows.layout), rows.layout.row_bytes, rank, interleaved, scaling)


def packed_sums(rows: PackedRows, weights: Tensor, rank: Optional[int] = None) -> Tensor:
    """Σ p·z [B, H·M, r] in fp32 of weights [B, H, M, K] fp32; of the first `rank` components, or of all."""
    launch = _SUMS if torch.compiler.is_compiling() else _launch_sums
    tensors = (rows.data, weights.flatten(1, 2), rows.index)
    return launch(*tensors, flat_layout(rows.layout), rows.layout.row_bytes, rank or rows.layout.rank, rows.dtype)


def _launch_logits(
    data: Tensor,
    query: Tensor,
    decoder: Tensor,
    mean: Tensor,
    factors: Optional[Tensor],
    hidden: Tensor,
    used: Optional[Tensor],
    index: Optional[Tensor],
    out: Tensor,
    classes: list[int],
    row_bytes: int,
    rank: int,
    interleaved: bool,
    scaling: float,
) -> None:
    batch, heads, per_head, size = query.shape
    count = out.shape[3]
    assert rank % 8 == 0, "decoders are read 8 components at a time"
    pairs = 0 if factors is None else factors.shape[2]
    # Two halves of pairs, and what is not rotated: a head without rotation is all rest.
    half, rest = _padded(pairs), _padded(size - 2 * pairs)
    heads_at_once = min(max(1, COLUMNS // max(half, rest)), triton.next_power_of_2(heads))
    queries_at_once = max(LEAST, triton.next_power_of_2(heads_at_once * per_head))
    queries_at_once = min(queries_at_once, QUERIES if decoder.itemsize == 2 else LEAST)
    key_bytes = heads_at_once * max(half, rest) * decoder.itemsize
    tile, warps = tile_of(count, batch * triton.cdiv(heads, heads_at_once), key_bytes, query.device)
    blocks = block_table(tuple(classes), COMPONENTS, rank, query.device)
    with torch.cuda.device_of(query):
        logits_kernel[(triton.cdiv(count, tile), triton.cdiv(heads, heads_at_once), batch)](
            data,
            hidden if index is None else index,
            blocks,
            decoder,
            mean,
            mean if factors is None else factors,
            query,
            out,
            hidden,
            hidden if used is None else used,
            scaling,
            count,
            row_bytes,
            len(blocks),
            heads,
            *data.stride()[:2],
            0 if index is None else index.stride(0),
            decoder.stride(0) // 8,  # ranks are multiples of 8; so the compiler knows
            0 if factors is None or len(factors) == 1 else factors.stride(0),
            *query.stride()[:3],
            *out.stride()[:3],
            M=per_head,
            D=size,
            PAIRS=pairs,
            INTERLEAVED=interleaved,
            INDEXED=index is not None,
            WIDE=needs_wide_offsets(data),
            LIMITED=used is not None,
            HEADS=heads_at_once,
            HALF=half,
            REST=rest,
            T=tile,
            R=COMPONENTS,
            QUERIES=queries_at_once,
            num_warps=warps,
            num_stages=3,
        )


def _launch_sums(
    data: Tensor,
    weights: Tensor,
    index: Optional[Tensor],
    classes: list[int],
    row_bytes: int,
    rank: int,
    dtype: torch.dtype,
) -> Tensor:
    batch, query_rows, count = weights.shape
    blocks = block_table(tuple(classes), COMPONENTS, rank, weights.device)
    at_once = min(QUERY_ROWS, max(LEAST, triton.next_power_of_2(query_rows)))
    slices = triton.cdiv(query_rows, at_once)
    splits = _splits(count, batch * len(blocks) * slices, weights.device)
    out = weights.new_empty(splits, batch, query_rows, rank)
    with torch.cuda.device_of(weights):
        sums_kernel[(len(blocks) * slices, splits, batch)](
            data,
            data if index is None else index,
            blocks,
            weights,
            out,
            count,
            triton.cdiv(triton.cdiv(count, splits), TOKENS) * TOKENS,
            row_bytes,
            len(blocks),
            query_rows,
            *data.stride()[:2],
            0 if index is None else index.stride(0),
            *weights.stride()[:2],
            *out.stride()[:3],
            INDEXED=index is not None,
            WIDE=needs_wide_offsets(data),
            ELEMENT=getattr(tl, str(dtype).removeprefix("torch.")),
            WEIGHT_SCALE=WEIGHT_SCALE,
            T=TOKENS,
            R=COMPONENTS,
            QUERIES=at_once,
            num_warps=4,
            num_stages=3,
        )
    return out.sum(0) if splits > 1 else out[0]


_LAYOUT = "int[] classes, int row_bytes, int rank"
_LOGITS = torch.library.custom_op(
    f"{NAMESPACE}::packed_logits",
    _launch_logits,
    mutates_args=("out",),
    schema="(Tensor data, Tensor query, Tensor decoder, Tensor mean, Tensor? factors, Tensor hidden, Tensor? used, "
    f"Tensor? index, Tensor(a!) out, {_LAYOUT}, bool interleaved, float scaling) -> ()",
)
_SUMS = torch.library.custom_op(
    f"{NAMESPACE}::packed_sums",
    _launch_sums,
    mutates_args=(),
    schema=f"(Tensor data, Tensor weights, Tensor? index, {_LAYOUT}, ScalarType dtype) -> Tensor",
)


@_SUMS.register_fake
def _sums_like(
    data: Tensor,
    weights: Tensor,
    index: Optional[Tensor],
    classes: list[int],
    row_bytes: int,
    rank: int,
    dtype: torch.dtype,
) -> Tensor:
    return weights.new_empty(*weights.shape[:2], rank)


def make_tables(layout: Layout, ranks: "tuple[int, ...]", device: torch.device) -> None:
    """Make what launches for these rows look up, for a number of components of a row."""
    for rank in ranks:
        block_table(tuple(flat_layout(layout)), COMPONENTS, rank, device)


def _padded(channels: int) -> int:
    return max(LEAST, triton.next_power_of_2(channels)) if channels else 0


def _splits(count: int, programs: int, device: torch.device) -> int:
    """Into how many parts the rows are cut, so that the GPU is full, each at least a few tiles long."""
    return max(1, min(triton.cdiv(2 * processors(device), programs), triton.cdiv(count, 4 * TOKENS)))


@jit()
def _queries(query, column_head, column_mask, head, channel, mask):
    """Queries [C, Q] at `query` [Q]: a column holds a query row of one head, and zeros at channels of other heads."""
    own = (head[:, None] == column_head[None, :]) & mask[:, None] & column_mask[None, :]
    return tl.load(query[None, :] + channel[:, None], mask=own, other=0.0)


@jit(do_not_specialize=["count", "block_count"])
def logits_kernel(
    data,
    index,
    blocks,
    decoder,
    mean,
    factors,
    query,
    out,
    hidden,
    used,
    scaling,
    count,
    row_bytes,
    block_count,
    heads,
    data_stride_batch,
    data_stride_row,
    index_stride_batch,
    decoder_stride,
    factors_stride_batch,
    query_stride_batch,
    query_stride_head,
    query_stride_row,
    out_stride_batch,
    out_stride_head,
    out_stride_row,
    M: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INDEXED: tl.constexpr,
    WIDE: tl.constexpr,
    LIMITED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Logits [T, HEADS·M] of one tile of rows and some heads of one sequence."""
    batch, first_head = tl.program_id(2).to(tl.int64), tl.program_id(1) * HEADS
    token = tl.program_id(0) * T + tl.arange(0, T)
    valid = token < count
    place, row = row_places(index + batch * index_stride_batch, token, valid, data_stride_row, INDEXED, WIDE)
    data += batch * data_stride_batch
    element = decoder.dtype.element_ty

    # Columns of the keys: head by head the first of each pair, the second, and what is not rotated.
    if PAIRS > 0:
        column = tl.arange(0, HEADS * HALF)
        pair, turned_head = column % HALF, first_head + column // HALF
        turned_mask = (pair < PAIRS) & (turned_head < heads)
        if INTERLEAVED:
            first, second = 2 * pair, 2 * pair + 1
        else:
            first, second = pair, pair + PAIRS
        keys_first = tl.zeros((T, HEADS * HALF), tl.float32)
        keys_second = tl.zeros((T, HEADS * HALF), tl.float32)
    if REST > 0:
        rest_column = tl.arange(0, HEADS * REST)
        rest, rest_head = 2 * PAIRS + rest_column % REST, first_head + rest_column // REST
        rest_mask = (rest < D) & (rest_head < heads)
        keys_rest = tl.zeros((T, HEADS * REST), tl.float32)

    if LIMITED:  # nothing to rebuild where no row is in use yet
        block_count = tl.where(tl.program_id(0) * T < tl.load(used), block_count, 0) if not INDEXED else block_count
    for block in range(0, block_count):
        component, wanted = block_components(blocks, block, R)
        latent = block_latents(data, row, valid, blocks, block, row_bytes, T, R).to(element)
        if PAIRS > 0:
            weights = decoder_part(decoder, decoder_stride, component, wanted, turned_head * D + first, turned_mask)
            keys_first = tl.dot(latent, weights, keys_first, input_precision="ieee")
            weights = decoder_part(decoder, decoder_stride, component, wanted, turned_head * D + second, turned_mask)
            keys_second = tl.dot(latent, weights, keys_second, input_precision="ieee")
        if REST > 0:
            weights = decoder_part(decoder, decoder_stride, component, wanted, rest_head * D + rest, rest_mask)
            keys_rest = tl.dot(latent, weights, keys_rest, input_precision="ieee")

    if PAIRS > 0:
        at = batch * factors_stride_batch + place.to(tl.int64)[:, None] * (2 * PAIRS) + 2 * pair[None, :]
        mask = valid[:, None] & (pair < PAIRS)[None, :]
        shift_first = tl.load(mean + turned_head * D + first, mask=turned_mask, other=0.0).to(tl.float32)
        shift_second = tl.load(mean + turned_head * D + second, mask=turned_mask, other=0.0).to(tl.float32)
        plain_first = (keys_first + shift_first[None, :]).to(element)  # half the registers
        plain_second = (keys_second + shift_second[None, :]).to(element)
        cos = tl.load(factors + at, mask=mask, other=0.0)
        sin = tl.load(factors + at + 1, mask=mask, other=0.0)
        turned_first = (plain_first.to(tl.float32) * cos - plain_second.to(tl.float32) * sin).to(element)
        turned_second = (plain_second.to(tl.float32) * cos + plain_first.to(tl.float32) * sin).to(element)
    if REST > 0:
        shift_rest = tl.load(mean + rest_head * D + rest, mask=rest_mask, other=0.0).to(tl.float32)
        plain_rest = (keys_rest + shift_rest[None, :]).to(element)

    seen = place >= tl.load(hidden + batch)
    if LIMITED:
        seen = seen & (place < tl.load(used))
    query += batch * query_stride_batch
    for begin in tl.static_range(0, HEADS * M, QUERIES):
        asked = begin + tl.arange(0, QUERIES)
        asked_head, asked_row = first_head + asked // M, asked % M
        asked_mask = (asked < HEADS * M) & (asked_head < heads)
        asked_at = query + asked_head * query_stride_head + asked_row * query_stride_row
        logits = tl.zeros((T, QUERIES), tl.float32)
        if PAIRS > 0:
            asking = _queries(asked_at, asked_head, asked_mask, turned_head, first, turned_mask)
            logits = tl.dot(turned_first, asking.to(element), logits, input_precision="ieee")
            asking = _queries(asked_at, asked_head, asked_mask, turned_head, second, turned_mask)
            logits = tl.dot(turned_second, asking.to(element), logits, input_precision="ieee")
        if REST > 0:
            asking = _queries(asked_at, asked_head, asked_mask, rest_head, rest, rest_mask)
            logits = tl.dot(plain_rest, asking.to(element), logits, input_precision="ieee")
        logits = tl.where(seen[:, None], logits * scaling, float("-inf"))
        to = batch * out_stride_batch + asked_head.to(tl.int64) * out_stride_head + asked_row * out_stride_row
        tl.store(out + to[None, :] + token[:, None], logits, mask=valid[:, None] & asked_mask[None, :])


@jit(do_not_specialize=["count", "per_split", "block_count"])
def sums_kernel(
    data,
    index,
    blocks,
    weights,
    out,
    count,
    per_split,
    row_bytes,
    block_count,
    query_rows,
    data_stride_batch,
    data_stride_row,
    index_stride_batch,
    weights_stride_batch,
    weights_stride_row,
    out_stride_split,
    out_stride_batch,
    out_stride_row,
    INDEXED: tl.constexpr,
    WIDE: tl.constexpr,
    ELEMENT: tl.constexpr,
    WEIGHT_SCALE: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Sums [QUERIES, R] of one block of components over one split of the rows of one sequence."""
    batch, split = tl.program_id(2).to(tl.int64), tl.program_id(1)
    block = tl.program_id(0) % block_count
    asked = tl.program_id(0) // block_count * QUERIES + tl.arange(0, QUERIES)
    asked_mask = asked < query_rows
    start = split * per_split
    stop = tl.minimum(start + per_split, count)
    sums = tl.zeros((QUERIES, R), tl.float32)
    data += batch * data_stride_batch
    for begin in range(start, stop, T):
        token = begin + tl.arange(0, T)
        valid = token < stop
        _, row = row_places(index + batch * index_stride_batch, token, valid, data_stride_row, INDEXED, WIDE)
        at = batch * weights_stride_batch + asked.to(tl.int64)[:, None] * weights_stride_row + token[None, :]
        share = tl.load(weights + at, mask=asked_mask[:, None] & valid[None, :], other=0.0) * WEIGHT_SCALE
        latent = block_latents(data, row, valid, blocks, block, row_bytes, T, R).to(ELEMENT)
        sums = tl.dot(share.to(ELEMENT), latent, sums, input_precision="ieee")
    component, wanted = block_components(blocks, block, R)
    to = split * out_stride_split + batch * out_stride_batch + asked.to(tl.int64)[:, None] * out_stride_row
    tl.store(out + to + component[None, :], sums / WEIGHT_SCALE, mask=asked_mask[:, None] & wanted[None, :])
