"""Read packed latents without ever holding decoded keys and values: logits by blocks, values in latent space.

The logits of a query are those of the decoded and rotated keys, made for a block of tokens at a time. The values
are linear in the latents, so attention sums latents, Σ p·z, and decodes that one sum: old tokens cost the decoding
of their keys alone. What is small a token (logits and weights of a layer's heads) is kept, so that one softmax runs
over old and exact tokens together and nothing has to be merged. `attention_triton_clla.py` has the same on a GPU.

Shape legend: B sequences, H key-value heads, M query rows per key-value head (its query heads times queries),
K rows, t rows of a block, d head dim, p rotary dim, r rank, N bytes per row.
"""

from typing import Any, Optional

import torch
from torch import Tensor, nn

from .attention_triton_clla import packed_logits, packed_sums
from .quantize_clla import Layout
from .rotary_clla import Turns
from .rows_clla import PackedRows, Workspace


class LatentRows(PackedRows):
    """The old tokens of one layer group, whose keys are decoded and rotated.

    Args:
        data, layout, used, workspace: as of `PackedRows`.
        codec: with `decoder` [G, 2·H·d, r] and `mean` [G, 2·H·d] of the group's layers, keys first.
        hidden: [B], number of rows at the front that no query may see (padding, and sinks, which are exact).
        reach: at least the largest of them.
        turns: rotation to the rows' positions; None for models without.
        index: [B, K'], the rows that are read; None for all.
    """

    def __init__(
        self,
        data: Tensor,
        layout: Layout,
        codec: Any,
        hidden: Tensor,
        reach: int,
        turns: "Optional[Turns]" = None,
        used: "Optional[Tensor]" = None,
        index: "Optional[Tensor]" = None,
        workspace: "Optional[Workspace]" = None,
    ) -> None:
        super().__init__(data, layout, codec.decoder.dtype, hidden, used, workspace)
        self.codec, self.reach, self.index = codec, reach, index
        self.turns = None if turns is None else turns.to(data.device)
        self._paired: "Optional[tuple[Tensor, Tensor]]" = None
        self._unseen: "Optional[Tensor]" = None
        self._factors: "Optional[Tensor]" = None

    @property
    def count(self) -> int:
        """Rows that are read."""
        return self.data.shape[1] if self.index is None else self.index.shape[1]

    def chosen(self, index: Tensor) -> "LatentRows":
        """Only the rows `index` [B, K'] of them."""
        like = self.data, self.layout, self.codec, self.hidden, index.shape[1], self.turns, self.used
        found = LatentRows(*like, index, self.workspace)
        found._factors = self._factors
        if not self.by_kernels:  # they follow the index
            found.data = _rows_of(self.data, index)
            found.turns = None if self.turns is None else self.turns.at(index)
            found._paired = self._paired
            if (whole := self._whole()) is not None:
                found._unpacked = _rows_of(whole, index)
        return found

    def logits(
        self,
        query: Tensor,
        layer: int,
        out: Tensor,
        *,
        scaling: float,
        turned: bool,
        rank: "Optional[int]" = None,
    ) -> None:
        """Products of queries and decoded keys, times `scaling`.

        Args:
            query: [B, H, M, d] after RoPE.
            layer: its number in the group.
            out: [B, H, M, K] fp32 that is written, -inf where a row is masked.
            scaling: of the products.
            turned: whether this layer's keys are rotated.
            rank: the first components alone; None for all.
        """
        turns, rank, heads = self.turns if turned else None, rank or self.layout.rank, query.shape[1]
        if self.by_kernels:
            decoder, mean = self.codec.decoder[layer], self.codec.mean[layer]
            factors = None if turns is None else self.factors(decoder.dtype)
            interleaved = turns is not None and turns.interleaved
            packed_logits(self, query, decoder, mean, factors, out, rank, interleaved, scaling)
            return
        decoder, mean = self._key_decoders(heads, turns)
        query = query.float() * scaling
        query = query if turns is None else turns.paired(query.mT).mT
        for start, latents in self.blocks():
            keys = self._decoded(latents[..., :rank], decoder[layer, :, :rank], mean[layer])
            keys = keys.unflatten(-1, (heads, -1))  # [B, t, H, d]
            if turns is not None:
                turns.turn(keys, start)
            keys, part = keys.permute(0, 2, 3, 1), out[..., start : start + keys.shape[1]]
            if torch.compiler.is_compiling():  # no compiler knows the other, which spares a copy of the keys
                part.copy_(query @ keys)
            else:
                torch.matmul(query, keys, out=part)
        if self._unseen is None:
            self._unseen = self._unseen_rows(out.device)[:, None, None]
        out[..., : self._unseen.shape[-1]].masked_fill_(self._unseen, float("-inf"))

    def weights(
        self,
        query: Tensor,
        near: Tensor,
        layer: int,
        *,
        scaling: float,
        turned: bool,
        rank: "Optional[int]" = None,
    ) -> Tensor:
        """What queries give these rows and exact tokens in one softmax, [B, H, M, K + E].

        Args:
            near: [B, H, M, E] fp32, logits of the exact tokens, -inf where they are masked.
            query, layer, scaling, turned, rank: as of `logits`.
        """
        logits = near.new_empty(*near.shape[:3], self.count + near.shape[3])
        logits[..., self.count :] = near
        if self.count:
            self.logits(query, layer, logits[..., : self.count], scaling=scaling, turned=turned, rank=rank)
        return logits.softmax(-1)

    def summed(self, weights: Tensor, exact: Tensor, layer: int) -> Tensor:
        """Σ p·v [B, H, M, d] over these rows and exact tokens, fp32.

        Args:
            weights: [B, H, M, K + E] from `weights`.
            exact: [B, H, E, d] fp32, values of the exact tokens.
            layer: its number in the group.
        """
        out = weights[..., self.count :] @ exact
        if self.count:
            out += self.values(weights[..., : self.count], layer)
        return out

    def values(self, weights: Tensor, layer: int) -> Tensor:
        """Σ p·v [B, H, M, d] of decoded values and weights [B, H, M, K] fp32; in fp32."""
        heads = weights.shape[1]
        decoder, mean = (x[layer].chunk(2)[1] for x in (self.codec.decoder, self.codec.mean))  # [H·d, r], [H·d]
        sums = packed_sums(self, weights) if self.by_kernels else self._sums(weights.flatten(1, 2))
        # Every head's sum through every head's decoder: the product is small, and one is faster than H.
        every = nn.functional.linear(sums.to(decoder.dtype), decoder)  # [B, H·M, H·d]
        own = every.unflatten(2, (heads, -1)).unflatten(1, (heads, -1)).diagonal(dim1=1, dim2=3)  # [B, M, d, H]
        total = weights.sum(-1, keepdim=True)
        return own.permute(0, 3, 1, 2).float().addcmul(total, mean.unflatten(0, (heads, 1, -1)).float())

    def factors(self, dtype: torch.dtype) -> Tensor:
        """Cosines and sines of all rows [B or 1, K, p/2, 2], as the kernels read them."""
        assert self.turns is not None
        if self._factors is None:
            self._factors = torch.view_as_real(self.turns.factors).to(dtype).contiguous()
        return self._factors

    def _decoded(self, latents: Tensor, decoder: Tensor, mean: Tensor) -> Tensor:
        """latents [B, t, r] · decoder [H·d, r]ᵀ + mean [H·d] in fp32, [B, t, H·d]."""
        if torch.compiler.is_compiling():
            return nn.functional.linear(latents, decoder, mean).float()
        rows = latents.flatten(0, 1)
        keys = self.workspace.take("keys", (len(rows), len(decoder)), latents.dtype, latents.device)
        torch.addmm(mean, rows, decoder.mT, out=keys)
        if keys.dtype != torch.float32:
            keys = self.workspace.take("keys in fp32", keys.shape, torch.float32, keys.device).copy_(keys)
        return keys.unflatten(0, latents.shape[:2])

    def _key_decoders(self, heads: int, turns: "Optional[Turns]") -> "tuple[Tensor, Tensor]":
        """Decoders [G, H·d, r] and means [G, H·d] of the keys of all layers, channels as `turns` wants them."""
        half = self.codec.decoder.shape[1] // 2
        decoder, mean = self.codec.decoder[:, :half], self.codec.mean[:, :half]
        if turns is None:
            return decoder, mean
        if self._paired is None:
            decoder = turns.paired(decoder.unflatten(1, (heads, -1))).flatten(1, 2)
            mean = turns.paired(mean.unflatten(1, (heads, -1))[..., None]).flatten(1)
            self._paired = decoder, mean
        return self._paired

    def _unseen_rows(self, device: torch.device) -> Tensor:
        """[B, …] masked rows, as many as there is need to look at."""
        places = self.index
        if places is None:
            places = torch.arange(self.count if self.used is not None else min(self.reach, self.count), device=device)
        unseen = places < self.hidden[:, None]
        return unseen if self.used is None else unseen | (places >= self.used)


def _rows_of(table: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, K'] of [B, K, x]."""
    return table.gather(1, index[:, :, None].expand(-1, -1, table.shape[2]))
