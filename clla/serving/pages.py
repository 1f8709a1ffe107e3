"""Read and write the engine's pages: rows of tokens that lie wherever the block table says.

Shape legend: T tokens, S sequences, H key-value heads, d head dim, b tokens per block, P blocks of the pool, N bytes a
latent row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass
class Batch:
    """What a layer is told about the sequences of one step.

    Attributes:
        starts: first query of each sequence in the flat batch, and the end.
        lengths: tokens of each sequence, the new ones included.
        table: [sequences, blocks] int32, the blocks of this layer's pages.
        slots: [T] int64, where this layer's new tokens go (block · b + place).
        positions: [T] int64, of the new tokens.
        memo: what layers keep for each other within a step.
    """

    starts: list[int]
    lengths: list[int]
    table: Tensor
    slots: Tensor
    positions: Tensor
    memo: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def counts(self) -> list[int]:
        """New tokens of each sequence."""
        return [stop - start for start, stop in zip(self.starts, self.starts[1:], strict=False)]


Pages = tuple[Batch, Tensor]  # a step's batch, and the pages that it is in


def write_exact(pages: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Put keys and values [T, H, d] into pages [P, H, b, 2d]."""
    block, place = slots // pages.shape[2], slots % pages.shape[2]
    pages[block, :, place] = torch.cat((keys, values), dim=-1).to(pages.dtype)


def read_exact(pages: Tensor, slots: Tensor) -> Tensor:
    """Keys and values [..., 2H, T, d] of slots [..., T] of pages [P, H, b, 2d]."""
    heads, dim = pages.shape[1], pages.shape[3] // 2
    block, place = (x[..., None, :] for x in (slots // pages.shape[2], slots % pages.shape[2]))
    own = torch.arange(heads, device=pages.device)[:, None]
    steps = pages.stride()
    if any(step % dim for step in steps[:3]):  # pages that are padded to a size of others
        both = pages[block, own, place]  # [..., H, T, 2d]
        return torch.cat(both.chunk(2, dim=-1), dim=-3)
    # Lines of d numbers, copied once: a key, and its value in the next one.
    lines = pages.as_strided(
        (sum((n - 1) * step for n, step in zip(pages.shape, steps, strict=True)) // dim + 1, dim), (dim, 1)
    )
    keys = (block * steps[0] + own * steps[1] + place * steps[2]) // dim  # [..., H, T]
    index = torch.cat((keys, keys + 1), dim=-2)
    return lines.index_select(0, index.flatten()).view(*index.shape, dim)


def slots_at(table: Tensor, places: Tensor, size: int) -> Tensor:
    """Slots [S, T] of the tokens `places` [S, T] of sequences whose blocks of `size` tokens are `table` [S, blocks]."""
    return table.gather(1, places // size).long() * size + places % size


def slots_of(table: Tensor, start: int, stop: int, size: int) -> Tensor:
    """Slots of the tokens [start, stop) of one sequence whose blocks of `size` tokens are `table` [blocks]."""
    return slots_at(table[None], torch.arange(start, stop, device=table.device)[None], size)[0]


def write_rows(pages: Tensor, slots: Tensor, rows: Tensor, first: int) -> None:
    """Put latent rows [T, N] into pages [P, 1, b, bytes] from byte `first` of a token on."""
    block, place = slots // pages.shape[2], slots % pages.shape[2]
    pages[block, 0, place, first : first + rows.shape[1]] = rows


def read_rows(pages: Tensor, slots: Tensor, first: int, stop: int) -> Tensor:
    """Latent rows [..., T, stop - first] of slots [..., T] of pages [P, 1, b, bytes]."""
    block, place = slots // pages.shape[2], slots % pages.shape[2]
    return pages[block, 0, place, first:stop]
