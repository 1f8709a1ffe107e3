"""Read packed latents without ever holding decoded keys and values: logits by blocks, values in latent space.

The logits of a query are those of the decoded and rotated keys, made for a block of tokens at a time. The values
are linear in the latents, so attention sums latents, Σ p·z, and decodes that one sum: old tokens cost the decoding
of their keys alone. What is small a token (logits and weights of a layer's heads) is kept, so that one softmax runs
over old and exact tokens together and nothing has to be merged. `decode_triton_clla.py` has the same on a GPU.

Shape legend: B sequences, H key-value heads, M query rows a key-value head (its query heads times queries),
K rows, t rows of a block, d head dim, p rotary dim, r rank, N bytes a row.
"""

from typing import Iterator, Optional

import torch
from torch import Tensor, nn

from .decode_triton_clla import on_gpu, packed_logits, packed_sums
from .quantize_clla import RowLayout
from .rotary_clla import Turns

BLOCK = 4096  # rows unpacked at once
HELD_BYTES = 1 << 26  # unpacked latents up to this size stay for the other layers of their group


class LatentRows:
    """The old tokens of one layer group as one forward pass reads them; made anew for each.

    Args:
        data: [B, K, N] uint8.
        layout: of a row.
        dtype: in which latents are unpacked.
        hidden: [B], so many rows at the front nobody may see (padding, and sinks, which are exact).
        turns: rotation to the rows' positions; None for models without.
        used: [1], so many rows of `data` hold a token; None for all.
        index: [B, K'], the rows that are read; None for all.
    """

    def __init__(
        self,
        data: Tensor,
        layout: RowLayout,
        dtype: torch.dtype,
        hidden: Tensor,
        turns: "Optional[Turns]" = None,
        used: "Optional[Tensor]" = None,
        index: "Optional[Tensor]" = None,
    ) -> None:
        self.data, self.layout, self.dtype = data, layout, dtype
        self.hidden, self.turns, self.used, self.index = hidden, turns, used, index
        self._unpacked: "Optional[Tensor]" = None

    @property
    def count(self) -> int:
        """Rows that are read."""
        return self.data.shape[1] if self.index is None else self.index.shape[1]

    def chosen(self, index: Tensor) -> "LatentRows":
        """Only the rows `index` [B, K'] of them."""
        found = LatentRows(self.data, self.layout, self.dtype, self.hidden, self.turns, self.used, index)
        if not on_gpu(self.data):  # there the kernels follow the index
            found.data = _rows_of(self.data, index)
            found.turns = None if self.turns is None else self.turns.at(index)
            if self._unpacked is not None:
                found._unpacked = _rows_of(self._unpacked, index)
        return found

    def logits(
        self, query: Tensor, decoder: Tensor, mean: Tensor, out: Tensor, *, turned: bool, rank: "Optional[int]" = None
    ) -> None:
        """Products of queries and decoded keys, not scaled.

        Args:
            query: [B, H, M, d] after RoPE.
            decoder: [H·d, r], of the keys.
            mean: [H·d].
            out: [B, H, M, K] fp32 that is written, -inf where a row may not be seen.
            turned: whether this layer's keys are rotated.
            rank: the first components alone; None for all.
        """
        turns = self.turns if turned else None
        rank = rank or self.layout.rank
        if on_gpu(self.data):
            packed_logits(self, query, decoder, mean, turns, out, rank)
            return
        heads = query.shape[1]
        if turns is not None:
            query = turns.paired(query.mT).mT
            decoder, mean = (turns.paired(x.unflatten(0, (heads, -1))).flatten(0, 1) for x in (decoder, mean[:, None]))
            mean = mean[:, 0]
        for start, latents in self.blocks():
            keys = nn.functional.linear(latents[..., :rank], decoder[:, :rank], mean).float().unflatten(-1, (heads, -1))
            if turns is not None:
                keys = turns.turn(keys, start)  # [B, t, H, d]
            torch.matmul(query.float(), keys.permute(0, 2, 3, 1), out=out[..., start : start + keys.shape[1]])
        places = self.index if self.index is not None else torch.arange(self.count, device=out.device)[None]
        unseen = places < self.hidden[:, None]
        if self.used is not None:
            unseen = unseen | (places >= self.used)
        out.masked_fill_(unseen[:, None, None], float("-inf"))

    def sums(self, weights: Tensor) -> Tensor:
        """Σ p·z [B, H, M, r] of weights [B, H, M, K] fp32."""
        if on_gpu(self.data):
            return packed_sums(self, weights)
        flat = weights.flatten(1, 2).to(self.dtype)
        total = flat.new_zeros(*flat.shape[:2], self.layout.rank, dtype=torch.float32)
        for start, latents in self.blocks():
            total += flat[..., start : start + latents.shape[1]] @ latents
        return total.unflatten(1, weights.shape[1:3])

    def blocks(self) -> "Iterator[tuple[int, Tensor]]":
        """First row and latents [B, t, r] of each block of rows; all at once where that is small enough to keep."""
        if self._unpacked is None and len(self.data) * self.count * self.layout.rank * 4 <= 2 * HELD_BYTES:
            self._unpacked = self.layout.unpack(self.data, self.dtype)
        if self._unpacked is not None:
            yield 0, self._unpacked
            return
        for start in range(0, self.count, BLOCK):
            yield start, self.layout.unpack(self.data[:, start : start + BLOCK], self.dtype)


def _rows_of(table: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, K'] of [B, K, x]."""
    return table.gather(1, index[:, :, None].expand(-1, -1, table.shape[2]))
