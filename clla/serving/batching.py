"""Sequences of one step that are computed side by side, their old tokens padded at the front to one length.

With as many new tokens as all others each, as it is where every sequence continues by one, they take one product
instead of one each.

Shape legend: S sequences, T new tokens of each, K rows of the longest, E exact tokens of the longest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from clla.modeling.rotary_clla import Rope, Rotation, Turns
from clla.serving.pages import Batch, slots_at

PADDING = 8  # a sequence joins longer ones if it is padded by no more than this part of their rows,
NEAR = 64  # or by no more than this many rows


@dataclass
class Side:
    """Attributes: sequences: their numbers in the batch; old: number of their tokens that are read from latents."""

    sequences: list[int]
    old: list[int]
    batch: Batch
    rope: Rope | None

    @property
    def count(self) -> int:
        """T."""
        return self.batch.counts[self.sequences[0]]

    @property
    def rows(self) -> int:
        """K."""
        return max(self.old)

    @cached_property
    def queries(self) -> Tensor:
        """[S, T], where their new tokens are in the flat batch."""
        starts = torch.tensor([self.batch.starts[i] for i in self.sequences])
        return (starts[:, None] + torch.arange(self.count)).to(self.batch.table.device)

    @cached_property
    def places(self) -> Tensor:
        """[S, K], the tokens that the rows are; padding names token 0."""
        old = torch.tensor(self.old, device=self.batch.table.device)
        return (old[:, None] - self.rows + torch.arange(self.rows, device=old.device)).clamp(min=0)

    @cached_property
    def rotation(self) -> Rotation | None:
        """To the rows."""
        return None if self.rope is None else self.rope(self.places)

    @cached_property
    def turns(self) -> Turns | None:
        """The same."""
        return None if self.rotation is None else Turns.of(self.rotation)

    @property
    def fronts(self) -> list[int]:
        """[S], rows before each sequence's first token."""
        return [self.rows - old for old in self.old]

    def means(self, bucket: int) -> Turns | None:
        """Rotations of buckets of tokens, [1, C], the same for all sequences."""
        if self.rope is None:
            return None
        count = -(-self.rows // bucket) * bucket
        key = ("means", count, bucket)
        if key not in self.batch.memo:
            every = torch.arange(count, device=self.batch.table.device)
            self.batch.memo[key] = Turns.of(self.rope(every[None])).means(bucket, [0])
        found: Turns = self.batch.memo[key]
        return found

    @cached_property
    def positions(self) -> Tensor:
        """[S, T], of the new tokens."""
        total = torch.tensor([self.batch.lengths[i] for i in self.sequences], device=self.batch.table.device)
        return total[:, None] - self.count + torch.arange(self.count, device=total.device)

    @cached_property
    def asking(self) -> Rotation | None:
        """Rotation to the new tokens."""
        return None if self.rope is None else self.rope(self.positions)

    def slots(self, size: int) -> Tensor:
        """[S, K] of the rows, in pages of `size` tokens."""
        return slots_at(self.table(self.batch), self.places, size)

    def hidden_rows(self, sinks: int) -> list[int]:
        """Number of each sequence's rows that are padding, or sinks, which are read exactly."""
        return [self.rows - old + min(sinks, old) for old in self.old]

    def hidden(self, sinks: int) -> Tensor:
        """The same, [S] int32."""
        return torch.tensor(self.hidden_rows(sinks), dtype=torch.int32, device=self.batch.table.device)

    def exact(self, batch: Batch, sinks: int, size: int, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Slots [S, sinks + E] of the exact tokens, and what new tokens may see of them, [S, T, sinks + E].

        Args:
            batch: of the exact pages; its block table differs from that of the latents.
            sinks: first tokens that are exact.
            size: tokens per page.
            window: number of the others that a new token sees, itself among them; None for all.
        """
        device = batch.table.device
        old = torch.tensor(self.old, device=device)[:, None]
        lengths = [batch.lengths[i] for i in self.sequences]
        width = max(total - old for total, old in zip(lengths, self.old, strict=True))
        total = torch.tensor(lengths, device=device)[:, None]
        first = torch.arange(sinks, device=device).expand(len(old), -1)
        near = total - width + torch.arange(width, device=device)  # [S, E]
        asks = self.positions[:, :, None]
        seen = (near >= old)[:, None] & (near[:, None] <= asks)
        if window is not None:
            seen &= near[:, None] > asks - window
        seen = torch.cat(((first < old)[:, None].expand(-1, self.count, -1), seen), dim=2)
        places = torch.cat((torch.minimum(first, (old - 1).clamp(min=0)), near.clamp(min=0)), dim=1)
        return slots_at(self.table(batch), places, size), seen

    def table(self, batch: Batch) -> Tensor:
        """[S, blocks] of a batch."""
        return batch.table[self.sequences]


def sides(
    old: list[int], batch: Batch, few: int, most_rows: int, rope: Rope | None, read: list[int] | None = None
) -> list[Side]:
    """All sequences of a step, those of at most `few` new tokens side by side.

    Args:
        old: tokens of each sequence of the batch that are read from latents.
        batch: of the latents.
        few: sequences with more new tokens stay alone.
        most_rows: no more rows, padding included, of several sequences at once.
        rope: of the model.
        read: rows that each takes to read; by default the old ones.
    """
    counts, found, rows = batch.counts, list[Side](), old if read is None else read
    # The longest first, so that each sequence is compared with the longest of its side.
    for i in sorted((i for i, count in enumerate(counts) if count), key=lambda i: (counts[i], -rows[i])):
        last = found[-1] if found else None
        if last is not None and last.count == counts[i] <= few:
            longest = rows[last.sequences[0]]
            fits = longest * (len(last.sequences) + 1) <= most_rows
            if fits and longest - rows[i] <= max(NEAR, longest // PADDING):
                last.sequences.append(i)
                last.old.append(old[i])
                continue
        found.append(Side([i], [old[i]], batch, rope))
    return found
