"""ThinK (arXiv 2407.21018, https://arxiv.org/abs/2407.21018): keys lose the channels that queries hardly use.

In every head the channels with the largest mean(q²) · mean(k²) stay: queries of the newest tokens, averaged over
the query heads of the key-value head. The newest keys stay whole, and so do all values. What is pruned is not
stored: a pruned key is its kept channels.

Against the paper: it chooses channels once, after the prompt. In a stream every `block` tokens get their own
choice once `recent` more tokens have come, by the `queries` newest at that moment, whatever the chunks are. Until
then they are exact, so up to recent + block - 1 keys are whole.

Shape legend: B sequences, H_q query heads, H key-value heads, T tokens, S keys held, n blocks of T_b tokens,
d head dim, c channels kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clla.baselines.attending import AttendingCache, AttendingLayer
from clla.baselines.settings import check_at_least
from clla.errors import UsageError


def channel_scores(query: Tensor, key: Tensor) -> Tensor:
    """[B, H, d] fp32: mean(q²) · mean(k²) of queries [B, H_q, T, d] and keys [B, H, S, d].

    The square root is the Frobenius norm of the channel's part of the logits, up to a constant.
    """
    grouped = query.float().unflatten(1, (key.shape[1], -1))
    return grouped.square().mean((2, 3)) * key.float().square().mean(2)


def prune(key: Tensor, scores: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """The best channels [B, H, T_b, c] of keys [B, H, T_b, d], and their indices [B, H, c], in as few bytes as fit."""
    indices = scores.topk(kept, -1).indices.sort(-1).values
    smallest = torch.uint8 if key.shape[-1] <= 256 else torch.int16
    return key.take_along_dim(indices[:, :, None], -1), indices.to(smallest)


def restore(pruned: Tensor, indices: Tensor, head_dim: int) -> Tensor:
    """Keys [B, H, n·T_b, d] with zeros in the pruned channels, of [B, H, n, T_b, c] and indices [B, H, n, c]."""
    keys = pruned.new_zeros(*pruned.shape[:-1], head_dim)
    return keys.scatter_(-1, indices.long()[..., None, :].expand_as(pruned), pruned).flatten(2, 3)


class ThinkLayer(AttendingLayer):
    """`keys` are the newest, whole; `pruned` the older ones; `queries` the newest, which the next block asks."""

    def __init__(self, ratio: float, recent: int, queries: int, block: int) -> None:
        super().__init__()
        self.ratio, self.recent, self.asked, self.block = ratio, recent, queries, block
        self.pruned: Tensor | None = None  # [B, H, n, T_b, c]
        self.indices: Tensor | None = None  # [B, H, n, c]
        self.queries: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        if self.pruned is None or self.indices is None:
            return keys, values
        return torch.cat((restore(self.pruned, self.indices, keys.shape[-1]), keys), 2), values

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, plain: Callable[[], Tensor]) -> Tensor:
        newest = query if self.queries is None else torch.cat((self.queries, query), 2)
        while self.keys is not None and self.keys.shape[2] >= self.recent + self.block:
            due = newest.shape[2] - (self.keys.shape[2] - self.recent - self.block)  # queries when the block was full
            self._prune_block(newest[:, :, max(0, due - self.asked) : due])
        self.queries = newest[:, :, -self.asked :].clone()  # a view would keep the whole chunk
        return plain()

    def _prune_block(self, query: Tensor) -> None:
        assert self.keys is not None
        oldest, self.keys = self.keys[:, :, : self.block], self.keys[:, :, self.block :].clone()
        kept = oldest.shape[-1] - int(oldest.shape[-1] * self.ratio)
        pruned, indices = prune(oldest, channel_scores(query, oldest), kept)
        self.pruned = _append(self.pruned, pruned[:, :, None])
        self.indices = _append(self.indices, indices[:, :, None])

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self.indices is None else self.indices.nbytes)  # no floats, as the others are


def _append(held: Tensor | None, new: Tensor) -> Tensor:
    return new if held is None else torch.cat((held, new), 2)


class ThinkCache(AttendingCache):
    """Keys lose about `ratio` of their bytes, values none. For `ObservedModel`.

    Args:
        config: the model's text config.
        ratio: of the channels that are pruned.
        recent: newest keys that stay whole at least.
        queries: newest queries that choose the channels.
        block: tokens that share a choice.

    Raises:
        UsageError: a setting that prunes everything or asks nobody.
    """

    def __init__(self, config: Any, *, ratio: float, recent: int = 32, queries: int = 32, block: int = 128) -> None:
        if not 0 <= ratio < 1:
            raise UsageError(f"ratio is {ratio}", expected="at least 0 and less than 1", remedy="choose another ratio")
        check_at_least(0, recent=recent)
        check_at_least(1, queries=queries, block=block)
        super().__init__(config, lambda _: ThinkLayer(ratio, recent, queries, block))
