"""Read packed latents without ever holding decoded keys and values: logits by blocks, values in latent space.

The logits of a query are those of the decoded and rotated keys, made for a block of tokens at a time. The values
are linear in the latents, so attention sums latents, Σ p·z, and decodes that one sum: old tokens cost the decoding
of their keys alone. What is small a token (logits and weights of a layer's heads) is kept, so that one softmax runs
over old and exact tokens together and nothing has to be merged.

Shape legend: B sequences, H key-value heads, M query rows per key-value head (its query heads times queries),
K rows, t rows of a block, d head dim, p rotary dim, r rank, N bytes per row.
"""

from typing import Any, Callable, Iterator, NamedTuple, Optional

import torch
from torch import Tensor, nn

from .quantize_clla import Layout
from .rotary_clla import Turns
from .rows_clla import PackedRows, Workspace, full_product

# Rows that are not read in full are judged, and summed up, by the first max(JUDGING_RANK, rank / JUDGING_SHARE)
# components (docs/lab-notes.md).
JUDGING_RANK, JUDGING_SHARE = 64, 4
# From so many rows on, a part of them is read in full: the largest of a number and a share (docs/lab-notes.md).
SELECT_FROM, SELECT_LEAST, SELECT_SHARE = 8192, 256, 32
# What reads latents on a CPU in place of PyTorch where clla is installed: as `LatentRows.attended`, or gives None.
COMPILED: "Optional[Callable[..., Optional[Tensor]]]" = None


def judging_rank(layout: Layout) -> int:
    """Components, the most important first, in which rows are read that are not read in full."""
    return min(layout.rank, max(JUDGING_RANK, -(-layout.rank // JUDGING_SHARE // 8) * 8))


def rows_in_full(count: int, wanted: "Optional[int]" = None) -> "Optional[int]":
    """How many of `count` rows are read in full; None for all.

    Args:
        count: rows.
        wanted: what the user asks for: 0 for all; None for the default.
    """
    if wanted is not None:
        return wanted or None
    return None if count < SELECT_FROM else max(SELECT_LEAST, count // SELECT_SHARE)


def bias_of(seen: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What is added to logits, of this dtype whatever the default one is: 0 where `seen`, -inf elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


class Buckets(NamedTuple):
    """Neighbouring rows that queries meet with one rotation.

    Attributes:
        size: rows of a bucket.
        means: rotations [B or 1, C] of each; None for models without.
        fronts: [B], rows before each sequence's first bucket.
    """

    size: int
    means: "Optional[Turns]"
    fronts: "list[int]"

    def spans(self, start: int, stop: int, front: int) -> "Iterator[tuple[int, int, int, int]]":
        """Number of the first bucket, of buckets, first row and rows of each bucket, of stretches of equal length."""
        at = max(start, front)
        while at < stop:
            number, inside = divmod(at - front, self.size)
            whole = 0 if inside else (stop - at) // self.size
            length = self.size if whole else min(stop - at, self.size - inside)
            yield number, max(whole, 1), at, length
            at += max(whole, 1) * length


class LatentRows(PackedRows):
    """The old tokens of one layer group, whose keys are decoded and rotated.

    Args:
        data, layout, used, workspace: as of `PackedRows`.
        codec: with `decoder` [G, 2·H·d, r] and `mean` [G, 2·H·d] of the group's layers, keys first.
        hidden: [B], number of rows at the front that no query may see (padding, and sinks, which are exact).
        reach: at least the largest of them.
        turns: rotation to the rows' positions; None for models without.
        index: [B, K'], the rows that are read; None for all.
        buckets: neighbouring rows that queries meet with one rotation; None where each has its own.
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
        buckets: "Optional[Buckets]" = None,
    ) -> None:
        super().__init__(data, layout, codec.decoder.dtype, hidden, used, workspace)
        self.codec, self.reach, self.index, self.buckets = codec, reach, index, buckets
        self.turns = None if turns is None else turns.to(data.device)
        self._unseen: "Optional[Tensor]" = None
        self.native: Any = None  # what `COMPILED` keeps for the layers of the group
        self.whole = self.parts * (1 if buckets is None else buckets.size)

    @property
    def count(self) -> int:
        """Rows that are read."""
        return self.data.shape[1] if self.index is None else self.index.shape[1]

    def chosen(self, index: Tensor) -> "LatentRows":
        """Only the rows `index` [B, K'] of them."""
        like = self.data, self.layout, self.codec, self.hidden, index.shape[1], self.turns, self.used
        found = LatentRows(*like, index, self.workspace)
        found.data = _rows_of(self.data, index)
        found.turns = None if self.turns is None else self.turns.at(index)
        found._unpacked = found._opened(found.data)
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
        rank, heads = rank or self.layout.rank, query.shape[1]
        turns = self.turns if turned else None
        decoder, mean = (x[layer].chunk(2)[0] for x in (self.codec.decoder, self.codec.mean))  # [H·d, r], [H·d]
        query = query.float() * scaling
        for start, latents in self.blocks(rank):
            keys = nn.functional.linear(latents, decoder[:, :rank], mean).float()
            keys = keys.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, H, t, d]
            stop = start + keys.shape[2]
            if turns is not None:
                keys = turns.part(start, stop).turned(keys)
            out[..., start:stop] = query @ keys.mT
        self._hide(out)

    def estimated(
        self,
        query: Tensor,
        layer: int,
        out: Tensor,
        *,
        scaling: float,
        turned: bool,
        rank: "Optional[int]" = None,
    ) -> None:
        """As `logits`, but with one rotation for every bucket of neighbouring rows, so that no key is made.

        Queries are turned once for each bucket and go through the decoder; they meet the latents themselves.
        """
        buckets = self.buckets
        if buckets is None:  # without buckets a row's key costs less than a query
            self.logits(query, layer, out, scaling=scaling, turned=turned, rank=rank)
            return
        asked = query.float() * scaling  # [B, H, M, d]
        if turned:
            assert buckets.means is not None
            asked = buckets.means.to(query.device).asked_of(asked)  # [B, H, M, C, d]
        else:
            asked = asked[:, :, :, None]
        for start, latents in self.filled_blocks(rank):
            count = min(latents.shape[1], self.count - start)
            if not turned:  # one bucket, whatever its length
                out[..., start : start + count] = self._met(asked, latents[:, None], layer)[..., :count]
            elif not any(buckets.fronts):
                number, some = start // buckets.size, latents.shape[1] // buckets.size
                part = asked[:, :, :, number : number + some]
                part = nn.functional.pad(part, (0, 0, 0, some - part.shape[3]))  # for what is filled up
                met = self._met(part, latents.unflatten(1, (some, -1)), layer)
                out[..., start : start + count] = met[..., :count]
            else:
                for b in range(len(query)):
                    for number, some, first, length in buckets.spans(start, start + count, buckets.fronts[b]):
                        own = latents[b : b + 1, first - start : first - start + some * length]
                        part = asked[b : b + 1, :, :, number : number + some]
                        met = self._met(part, own.unflatten(1, (some, length)), layer)
                        out[b : b + 1, ..., first : first + some * length] = met
        self._hide(out)

    def _met(self, asked: Tensor, latents: Tensor, layer: int) -> Tensor:
        """Logits [B, H, M, C·t] of queries [B, H, M, C, d], one for each bucket, and latents [B, C, t, r]."""
        (batch, heads, rows, some), half = asked.shape[:4], self.codec.decoder.shape[1] // 2
        decoder = self.codec.decoder[layer, :half, : latents.shape[-1]].unflatten(0, (heads, -1))  # [H, d, r]
        mean = self.codec.mean[layer, :half].unflatten(0, (heads, -1, 1)).float()  # [H, d, 1]
        absorbed = asked.permute(1, 2, 0, 3, 4).flatten(1, 3).to(decoder.dtype) @ decoder  # [H, M·B·C, r]
        # Buckets become the batch of the next product where they lie: as many bytes as the latents, at least.
        absorbed = absorbed.unflatten(1, (rows, -1)).flatten(0, 1).transpose(0, 1)  # [B·C, H·M, r]
        found = full_product(absorbed, latents.flatten(0, 1).mT).unflatten(0, (batch, some))
        found = found.unflatten(2, (heads, rows)).permute(0, 2, 3, 1, 4)  # [B, H, M, C, t]
        return (found + asked @ mean[:, None]).flatten(3)

    def attended(
        self,
        query: Tensor,
        exact: Tensor,
        bias: Tensor,
        layer: int,
        *,
        scaling: float,
        turned: bool,
        most: "Optional[int]" = None,
    ) -> Tensor:
        """Attention [B, H, M, d] to these rows and exact tokens in one softmax, fp32.

        Args:
            query: [B, H, M, d] after RoPE; M counts query heads first, then their T tokens.
            exact: [B, 2H, E, d], keys (after RoPE) and values of the exact tokens.
            bias: [B or 1, T, E] fp32, added to the logits of the exact tokens: -inf where they are masked.
            layer: its number in the group.
            scaling: of the logits.
            turned: whether this layer's keys are rotated.
            most: rows that are read in full; of the others, which weigh less, the first components. None for all.
        """
        if COMPILED is not None and not torch.compiler.is_compiling():
            found = COMPILED(self, query, exact, bias, layer, scaling=scaling, turned=turned, most=most)
            if found is not None:
                return found
        keys, values = exact.float().chunk(2, dim=1)
        near = (query.float() * scaling @ keys.mT).unflatten(2, (-1, bias.shape[1]))
        near = (near + bias[:, None, None]).flatten(2, 3)  # [B, H, M, E]
        count, best = self.count, None
        logits = near.new_empty(*near.shape[:3], count + near.shape[3])
        logits[..., count:] = near
        if count:
            few = None if most is None or most >= count else judging_rank(self.layout)
            self.estimated(query, layer, logits[..., :count], scaling=scaling, turned=turned, rank=few)
            if few is not None:
                best = self.chosen(logits.softmax(-1)[..., :count].sum((1, 2)).topk(most, sorted=False).indices)
                found = logits.new_empty(*logits.shape[:3], best.count)
                best.logits(query, layer, found, scaling=scaling, turned=turned)
                logits.scatter_(-1, best.places(logits), found)
        weights = logits.softmax(-1)
        out = weights[..., count:] @ values
        return out if not count else out + self.values(weights[..., :count], layer, best)

    def places(self, like: Tensor) -> Tensor:
        """Numbers of the chosen rows [B, H, M, K'] for gathering from [B, H, M, …]."""
        assert self.index is not None
        return self.index[:, None, None].expand(-1, *like.shape[1:3], -1)

    def values(self, weights: Tensor, layer: int, best: "Optional[LatentRows]" = None) -> Tensor:
        """Σ p·v [B, H, M, d] of decoded values and weights [B, H, M, K] fp32; in fp32.

        Args:
            weights: of all rows.
            layer: its number in the group.
            best: those that are read in full, of which the others are read in the first components; None for all.
        """
        heads = weights.shape[1]
        decoder, mean = (x[layer].chunk(2)[1] for x in (self.codec.decoder, self.codec.mean))  # [H·d, r], [H·d]
        few = None if best is None else judging_rank(self.layout)
        sums = self._sums(weights.flatten(1, 2), few)
        if best is not None:
            chosen = weights.gather(-1, best.places(weights)).flatten(1, 2)
            sums = torch.cat((sums, best._sums(chosen)[..., few:]), dim=-1)
        # Every head's sum through every head's decoder: the product is small, and one is faster than H.
        every = nn.functional.linear(sums.to(decoder.dtype), decoder)  # [B, H·M, H·d]
        own = every.unflatten(2, (heads, -1)).unflatten(1, (heads, -1)).diagonal(dim1=1, dim2=3)  # [B, M, d, H]
        total = weights.sum(-1, keepdim=True)
        return own.permute(0, 3, 1, 2).float().addcmul(total, mean.unflatten(0, (heads, 1, -1)).float())

    def _hide(self, logits: Tensor) -> None:
        """Write -inf to the logits [B, H, M, K] of rows that are masked."""
        if self._unseen is None:
            self._unseen = self._unseen_rows(logits.device)[:, None, None]
        logits[..., : self._unseen.shape[-1]].masked_fill_(self._unseen, float("-inf"))

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
