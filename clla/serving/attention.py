"""Attention of one layer over the engine's pages: packed latents of everything old, exact sinks, window and new tokens.

What is read from where follows `modeling/group_clla.py`: with c tokens before this step's, latents stand for the
tokens before E(c), the multiple of `flush_block` that leaves at least the window exact; sinks stay exact. A group's
latents of the new tokens are written when its last layer has run.

Shape legend: T tokens, H key-value heads of this rank, d head dim, n = 2·H·d, E old tokens, S sinks, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clla.modeling.codec_clla import before_rope, decode, encode
from clla.modeling.decode_clla import LatentRows
from clla.modeling.group_clla import leaving_slots, reading_tokens
from clla.modeling.pack_triton_clla import packed
from clla.modeling.quantize_clla import RowLayout
from clla.modeling.rotary_clla import Rope, Rotation, Turns
from clla.serving.pages import Batch, read_exact, read_rows, slots_of, write_rows


@dataclass
class Decoder:
    """The part of a group's codec that reads: of the heads of one rank."""

    decoder: Tensor  # [G, n, r]
    mean: Tensor  # [G, n]


class GroupReader:
    """One layer group: its codec, its place in a token's latent row, and what its layers do with both.

    Args:
        spec: `layers` and `tier_bits` of the group.
        settings: the config's `clla` block.
        first: byte of a token's row where the group's part begins.
        codec: the group's codec module.
        rope: rotation of keys; None without.
        heads: key-value heads of the model that this rank has, as indices.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        settings: dict[str, Any],
        first: int,
        codec: Any,
        rope: Rope | None,
        heads: list[int],
    ) -> None:
        self.layers = list(spec["layers"])
        self.layout = RowLayout(tuple(spec["tier_bits"]), settings["tier_size"])
        self.first, self.stop = first, first + self.layout.row_bytes
        self.window, self.block, self.sinks = settings["window"], settings["flush_block"], settings["sinks"]
        self.kv_heads, self.head_dim = settings["kv"]["num_key_value_heads"], settings["kv"]["head_dim"]
        self.codec, self.rope, self.heads = codec, rope, heads
        self._decoder: Decoder | None = None

    @property
    def decoder(self) -> Decoder:
        """Made at first use, when the weights are loaded."""
        if self._decoder is None:
            decoder, mean = self.codec.decoder.detach(), self.codec.mean.detach()
            if len(self.heads) < self.kv_heads:
                chosen = torch.tensor(self.heads, device=decoder.device)
                rows = torch.arange(2 * self.kv_heads * self.head_dim, device=decoder.device)
                rows = rows.unflatten(0, (2, self.kv_heads, self.head_dim))[:, chosen].flatten()
                decoder, mean = decoder[:, rows].contiguous(), mean[:, rows].contiguous()
            self._decoder = Decoder(decoder, mean)
        return self._decoder

    def old(self, before: int) -> int:
        """E(c): of `before` tokens, so many are read from their latents."""
        return leaving_slots(before, self.window, self.block)

    def write(self, both: dict[int, Tensor], latents: Batch, pages: Tensor) -> None:
        """Encode the step's tokens and put their rows into the pages.

        Args:
            both: layer -> keys after RoPE and values [2H, T, d] of all the model's heads.
            latents: where the rows go.
            pages: [P, 1, b, bytes].
        """
        rotation = self._rotation(latents.positions[None])
        inputs = before_rope({layer: x[None] for layer, x in both.items()}, rotation, self.kv_heads)
        rows = packed(encode(inputs, self.codec), self.layout)
        write_rows(pages, latents.slots, rows[0], self.first)

    def attend(
        self,
        layer: int,
        query: Tensor,
        sequence: int,
        exact: tuple[Batch, Tensor],
        latents: tuple[Batch, Tensor],
        scaling: float,
    ) -> Tensor:
        """Attention of one sequence's new tokens.

        Args:
            layer: of the model.
            query: [T, H_q, d] after RoPE.
            sequence: its number in the batch.
            exact: this layer's batch and pages [P, H, b, 2d].
            latents: the latents' batch and pages [P, 1, b, bytes].
            scaling: of the logits.

        Returns:
            [T, H_q, d] in fp32 or the model's dtype.
        """
        batch, pages = exact
        total, count = batch.lengths[sequence], query.shape[0]
        old, table, size = self.old(total - count), batch.table[sequence], pages.shape[2]
        near = read_exact(pages, slots_of(table, old, total, size))
        if not old:
            return _plain(query, near, scaling)
        sinks = read_exact(pages, slots_of(table, 0, min(self.sinks, old), size))
        few = count <= reading_tokens(self.kv_heads, self.head_dim, self.kv_heads * query.shape[1] // len(self.heads))
        rows = self._rows(latents, sequence, old)
        attend = self._attend_latents if few else self._attend_decoded
        found: Tensor = attend(self.layers.index(layer), query, rows, sinks, near, scaling)
        if layer == self.layers[-1]:
            latents[0].memo.pop((self.first, sequence), None)
        return found

    def _rotation(self, positions: Tensor) -> Rotation | None:
        return None if self.rope is None else self.rope(positions)

    def _rows(self, latents: tuple[Batch, Tensor], sequence: int, old: int) -> tuple[LatentRows, Rotation | None]:
        """The old tokens of a sequence, gathered and unpacked once for all layers of the group."""
        batch, pages = latents
        key = (self.first, sequence)
        if key not in batch.memo:
            slots = slots_of(batch.table[sequence], 0, old, pages.shape[2])
            data = read_rows(pages, slots, self.first, self.stop)[None].contiguous()
            rotation = self._rotation(torch.arange(old, device=data.device)[None])
            hidden = torch.tensor([min(self.sinks, old)], dtype=torch.int32, device=data.device)
            turns = None if rotation is None else Turns.of(rotation)
            batch.memo[key] = (LatentRows(data, self.layout, self.decoder, hidden, self.sinks, turns), rotation)
        found: tuple[LatentRows, Rotation | None] = batch.memo[key]
        return found

    def _turned(self, index: int) -> bool:
        return self.rope is not None and self.layers[index] not in self.rope.plain_layers

    def _attend_latents(
        self,
        index: int,
        query: Tensor,
        old: tuple[LatentRows, Rotation | None],
        sinks: Tensor,
        near: Tensor,
        scaling: float,
    ) -> Tensor:
        """Few queries: logits of decoded keys, values summed in latent space, one softmax."""
        rows, heads, tokens = old[0], len(self.heads), query.shape[0]
        exact = torch.cat((sinks, near), dim=1)[None].float()  # [1, 2H, S + t, d]
        q = query.transpose(0, 1).unflatten(0, (heads, -1)).flatten(1, 2)[None]  # [1, H, M, d]
        close = (q.float() * scaling @ exact[:, :heads].mT).unflatten(2, (-1, tokens))  # [1, H, M/T, T, S + t]
        ahead = torch.ones(tokens, near.shape[1], dtype=torch.bool, device=q.device).triu(near.shape[1] - tokens + 1)
        close = close.masked_fill(nn.functional.pad(ahead, (sinks.shape[1], 0)), float("-inf")).flatten(2, 3)
        weights = rows.weights(q, close, index, scaling=scaling, turned=self._turned(index))
        out = rows.summed(weights, exact[:, heads:], index)[0]
        return out.unflatten(1, (-1, tokens)).flatten(0, 1).transpose(0, 1)

    def _attend_decoded(
        self,
        index: int,
        query: Tensor,
        old: tuple[LatentRows, Rotation | None],
        sinks: Tensor,
        near: Tensor,
        scaling: float,
    ) -> Tensor:
        """Many queries: keys and values of the old tokens, decoded once."""
        rows, rotation = old
        heads, dtype, layer = len(self.heads), near.dtype, self.layers[index]
        both = near.new_empty(near.shape[0], rows.count + near.shape[1], near.shape[2])
        both[:, rows.count :] = near
        for start, latents in rows.blocks():
            stop = start + latents.shape[1]
            turn = None if rotation is None else rotation.part(start, stop)
            both[:, start:stop] = decode(latents, self.decoder, index, turn, heads, dtype, layer=layer)[0]
        both[:, : sinks.shape[1]] = sinks
        return _plain(query, both, scaling)


def _plain(query: Tensor, both: Tensor, scaling: float) -> Tensor:
    """Attention [T, H_q, d] of the last T tokens to keys and values [2H, K, d]."""
    tokens, total = query.shape[0], both.shape[1]
    keys, values = both.to(query.dtype).chunk(2)
    seen = None
    if tokens > 1:
        seen = torch.ones(tokens, total, dtype=torch.bool, device=query.device).tril(total - tokens)
    grouped = query.shape[1] != keys.shape[0]
    out: Tensor = nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=seen,
        scale=scaling,
        enable_gqa=grouped,
    )
    return out[0].transpose(0, 1)
