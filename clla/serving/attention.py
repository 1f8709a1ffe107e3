"""Attention of one layer over the engine's pages: packed latents of everything old, exact sinks, window and new tokens.

What is read from where follows `modeling/group_clla.py`: with c tokens before this step's, latents stand for the
tokens before E(c), the multiple of `flush_block` that leaves at least the window exact; sinks stay exact. Without a
window latents stand for all tokens, the new ones too. A group's latents of the new tokens are written when its last
layer has run or, where they come from the first layer's input, before any has.

Shape legend: T tokens, S sequences, H key-value heads of this rank, d head dim, n = 2·H·d, r rank, K rows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clla.modeling.absorbed_clla import (
    AbsorbedRows,
    absorbed_query,
    decoded_rows,
    decoded_sums,
    rotary_key,
    split_query,
)
from clla.modeling.attention_clla import Buckets, LatentRows, bias_of, rows_in_full
from clla.modeling.codec_clla import before_rope, decode, encode
from clla.modeling.group_clla import reading_tokens
from clla.modeling.pack_triton_clla import packed
from clla.modeling.quantize_clla import layout_of
from clla.modeling.rotary_clla import Rope, bucket_length
from clla.modeling.sizes_clla import leaving_slots
from clla.modeling.spec_clla import CacheSpec, GroupSpec
from clla.serving.batching import Side, sides
from clla.serving.pages import Batch, Pages, read_exact, read_rows, slots_of, write_rows

BUCKET = "CLLA_ROTATION_BUCKET"  # in the environment: old tokens with one rotation, 1 for each its own


@dataclass
class Decoder:
    """The part of a group's codec that reads: of the heads of one rank."""

    decoder: Tensor  # [G, n, r]
    mean: Tensor  # [G, n]
    rope_query: Tensor | None  # [G, H, P, 2], where keys are decoupled


class GroupReader:
    """One layer group: its codec, its place in a token's latent row, and what its layers do with both.

    Args:
        group: its layers and the widths of its latent.
        spec: of the whole cache.
        first: byte of a token's row where the group's part begins.
        codec: the group's codec module.
        rope: rotation of keys; None without.
        heads: key-value heads of the model that this rank has, as indices.
        query_heads: of this rank.
        most_rows: of several sequences side by side, at most this number is read at once.
    """

    def __init__(
        self,
        group: GroupSpec,
        spec: CacheSpec,
        first: int,
        codec: Any,
        rope: Rope | None,
        heads: list[int],
        query_heads: int,
        most_rows: int,
    ) -> None:
        self.layers = list(group.layers)
        self.layout: Any = layout_of(group)
        self.first, self.stop = first, first + self.layout.row_bytes
        self.window, self.block, self.sinks = spec.window, spec.flush_block, spec.sinks
        self.kv_heads, self.head_dim, self.from_input = spec.heads, spec.head_dim, spec.from_first
        self.codec, self.rope, self.heads, self.most_rows = codec, rope, heads, most_rows
        # Up to this number of new tokens of a sequence read latents; more decode them once.
        few = reading_tokens(self.kv_heads, self.head_dim, self.kv_heads * query_heads // len(heads))
        self.few = few if self.window or group.rope_pairs else 0
        self._decoder: Decoder | None = None
        self.bucket: int | None = None  # neighbours with one rotation; from the rotations at first use

    @property
    def decoder(self) -> Decoder:
        """Made at first use, when the weights are loaded."""
        if self._decoder is None:
            decoder, mean = self.codec.decoder.detach(), self.codec.mean.detach()
            query = getattr(self.codec, "rope_query", None)
            query = None if query is None else query.detach()
            if len(self.heads) < self.kv_heads:
                chosen = torch.tensor(self.heads, device=decoder.device)
                rows = torch.arange(2 * self.kv_heads * self.head_dim, device=decoder.device)
                rows = rows.unflatten(0, (2, self.kv_heads, self.head_dim))[:, chosen].flatten()
                decoder, mean = decoder[:, rows].contiguous(), mean[:, rows].contiguous()
                query = None if query is None else query[:, chosen]
            self._decoder = Decoder(decoder, mean, query)
        return self._decoder

    @property
    def reads_exact(self) -> bool:
        """Whether any token is read exactly."""
        return bool(self.window or self.sinks)

    def old(self, total: int, count: int) -> int:
        """How many of `total` tokens, the last `count` of them new, are read from their latents."""
        return leaving_slots(total - count, self.window, self.block) if self.window else total

    def write(self, both: dict[int, Tensor], latents: Pages) -> None:
        """Encode the step's tokens and put their rows into the pages.

        Args:
            both: layer -> keys after RoPE and values [2H, T, d] of all the model's heads.
            latents: batch of the latents, and pages [P, 1, b, bytes].
        """
        rotation = None if self.rope is None else self.rope(latents[0].positions[None])
        inputs = before_rope({layer: x[None] for layer, x in both.items()}, rotation, self.kv_heads)
        self._put(encode(inputs, self.codec), latents)

    def write_inputs(self, hidden: Tensor, latents: Pages) -> None:
        """The same from the attention inputs [T, h] of the group's first layer."""
        self._put(encode(hidden[None], self.codec), latents)

    def _put(self, found: Tensor, latents: Pages) -> None:
        write_rows(latents[1], latents[0].slots, packed(found, self.layout)[0], self.first)

    def attend(
        self, layer: int, query: Tensor, exact: Pages | None, latents: Pages, scaling: float, output: Tensor
    ) -> None:
        """Attention of a step's new tokens.

        Args:
            layer: of the model.
            query: [T, H_q, d] after RoPE.
            exact: this layer's batch and pages [P, H, b, 2d]; None where nothing is read exactly.
            latents: the latents' batch and pages [P, 1, b, bytes].
            scaling: of the logits.
            output: [T, H_q, d] that is written.
        """
        batch, index = latents[0], self.layers.index(layer)
        for side in self._sides(batch):
            attend = self._attend_latents if side.count <= self.few else self._attend_decoded
            output[side.queries] = attend(index, query[side.queries], side, exact, latents, scaling).to(output.dtype)
        if layer == self.layers[-1]:
            for key in [key for key in batch.memo if key[0] == self.first]:
                del batch.memo[key]

    def _sides(self, batch: Batch) -> list[Side]:
        """Which sequences are read together; the same for all groups."""
        key = ("sides", self.few, self.most_rows)
        if key not in batch.memo:
            old = [self.old(total, count) for total, count in zip(batch.lengths, batch.counts, strict=False)]
            batch.memo[key] = sides(old, batch, self.few, self.most_rows, self.rope)
        found: list[Side] = batch.memo[key]
        return found

    def _data(self, side: Side, latents: Pages) -> Tensor:
        """Packed rows [S, K, N]."""
        pages = latents[1]
        return read_rows(pages, side.slots(pages.shape[2]), self.first, self.stop).contiguous()

    def _rows(self, side: Side, latents: Pages) -> Any:
        """The old tokens of some sequences, gathered and unpacked once for all layers of the group."""
        memo, key = latents[0].memo, (self.first, side.sequences[0])
        if key not in memo:
            memo[key] = self._opened(side, self._data(side, latents))
        return memo[key]

    def _opened(self, side: Side, data: Tensor) -> LatentRows | AbsorbedRows:
        """Readable rows of packed ones [S, K, N]."""
        hidden, reach = side.hidden(self.sinks), max(side.hidden_rows(self.sinks))
        if self.bucket is None:
            self.bucket = int(os.environ.get(BUCKET, 0)) or bucket_length(self.rope, self.head_dim)
        buckets = None
        if self.bucket > 1:
            buckets = Buckets(self.bucket, side.means(self.bucket), side.fronts)
        return LatentRows(data, self.layout, self.decoder, hidden, reach, side.turns, buckets=buckets)

    def _turned(self, index: int) -> bool:
        return self.rope is not None and self.layers[index] not in self.rope.plain_layers

    def _attend_latents(
        self, index: int, query: Tensor, side: Side, exact: Pages | None, latents: Pages, scaling: float
    ) -> Tensor:
        """Few queries [S, T, H_q, d]: logits of decoded keys, values summed in latent space, one softmax."""
        assert exact is not None, "without exact tokens keys and values are decoded"
        rows, heads, tokens = self._rows(side, latents), len(self.heads), query.shape[1]
        memo, key = exact[0].memo, ("exact", side.sequences[0])
        if key not in memo:  # layers whose pages are in the same blocks
            slots, seen = side.exact(exact[0], self.sinks, exact[1].shape[2])
            memo[key] = slots, bias_of(seen)  # [S, T, E]
        slots, bias = memo[key]
        both = read_exact(exact[1], slots)  # [S, 2H, E, d]
        q = query.transpose(1, 2).unflatten(1, (heads, -1)).flatten(2, 3)  # [S, H, M, d]
        most = rows_in_full(rows.count)
        out = rows.attended(q, both, bias, index, scaling=scaling, turned=self._turned(index), most=most)
        return out.unflatten(2, (-1, tokens)).flatten(1, 2).transpose(1, 2)

    def _attend_decoded(
        self, index: int, query: Tensor, side: Side, exact: Pages | None, latents: Pages, scaling: float
    ) -> Tensor:
        """Many queries [1, T, H_q, d] of one sequence: keys and values of the old tokens, decoded once."""
        heads, dtype, old = len(self.heads), query.dtype, side.rows
        near = sinks = query.new_empty(2 * heads, 0, self.head_dim)
        if exact is not None:
            (batch, pages), sequence = exact, side.sequences[0]
            table, size = batch.table[sequence], exact[1].shape[2]
            near = read_exact(pages, slots_of(table, old, batch.lengths[sequence], size)).to(dtype)
            sinks = read_exact(pages, slots_of(table, 0, min(self.sinks, old), size)).to(dtype)
        both = near
        if old:
            both = near.new_empty(len(near), old + near.shape[1], near.shape[2])
            both[:, old:] = near
            for start, found in self._rows(side, latents).blocks():
                stop = start + found.shape[1]
                turn = None if side.rotation is None else side.rotation.part(start, stop)
                decoded = decode(found, self.decoder, index, turn, heads, dtype, layer=self.layers[index])
                both[:, start:stop] = decoded[0]
            both[:, : sinks.shape[1]] = sinks
        keys, values = both.chunk(2)
        return _plain(query[0], keys, values, scaling)[None]


class DecoupledReader(GroupReader):
    """A group with keys in two parts: one without position, decoded from latents, and a rotary key beside them."""

    def __init__(self, group: GroupSpec, *args: Any) -> None:
        super().__init__(group, *args)
        self.pairs, self.rank = group.rope_pairs, group.rank

    def write_inputs(self, hidden: Tensor, latents: Pages) -> None:
        """Latents and rotary keys of attention inputs [T, h]."""
        assert self.rope is not None, "keys are rotated"
        rotation = self.rope(latents[0].positions[None])
        found = encode(hidden[None], self.codec), rotary_key(hidden[None], self.codec, self.pairs, rotation)
        self._put(torch.cat(found, dim=-1), latents)

    def _opened(self, side: Side, data: Tensor) -> AbsorbedRows:
        return AbsorbedRows(data, self.layout, self.decoder.decoder.dtype, side.hidden(self.sinks))

    def _split(self, index: int, query: Tensor, side: Side) -> tuple[Tensor, Tensor]:
        """Position-free and rotary part of queries [S, T, H_q, d], tokens behind heads."""
        like = side.asking
        assert like is not None, "keys are rotated"
        turn = like if self._turned(index) else None
        return split_query(query.transpose(1, 2), self.decoder, index, self.pairs, turn, like)

    def _attend_latents(
        self, index: int, query: Tensor, side: Side, exact: Pages | None, latents: Pages, scaling: float
    ) -> Tensor:
        (for_keys, for_values), mean = self.decoder.decoder[index].chunk(2), self.decoder.mean[index].chunk(2)[1]
        asking = absorbed_query(*self._split(index, query, side), for_keys)
        sums = self._rows(side, latents).sums(asking, scaling)
        return decoded_sums(sums, for_values, mean, len(self.heads))

    def _attend_decoded(
        self, index: int, query: Tensor, side: Side, exact: Pages | None, latents: Pages, scaling: float
    ) -> Tensor:
        heads = len(self.heads)
        rows = torch.cat([block for _, block in self._rows(side, latents).blocks()], dim=1)
        keys, values = decoded_rows(rows, self.decoder, index, heads, self.rank, query.dtype)
        asking = torch.cat(self._split(index, query, side), dim=-1)[0].transpose(0, 1)
        return _plain(asking, keys[0], values[0], scaling)[None, ..., : self.head_dim]


def _plain(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Attention [T, H_q, d] of the last T tokens to keys and values [H, K, d]."""
    tokens, total = query.shape[0], keys.shape[1]
    seen = None
    if tokens > 1:
        seen = torch.ones(tokens, total, dtype=torch.bool, device=query.device).tril(total - tokens)
    out: Tensor = nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=seen,
        scale=scaling,
        enable_gqa=query.shape[1] != keys.shape[0],
    )
    return out[0].transpose(0, 1)
