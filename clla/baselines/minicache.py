"""MiniCache: neighbouring layers of the upper half share a direction a token (arXiv 2405.14366).

https://arxiv.org/abs/2405.14366 (MiniCache: KV Cache Compression in Depth Dimension for Large Language Models)

Keys (after RoPE) and values of two layers are merged token by token and head by head: their directions are
interpolated on the sphere, each layer keeps its own length. Tokens in which the layers are unlike are retained.

The paper contradicts itself there. Its text keeps the token pairs that differ most; its equation keeps those
with d_i < d_min + (d_max - d_min)·γ, which are the most alike. Both are here (`retention`).

Against the paper: it merges the prompt at once and takes d_min and d_max over all of it. A stream has no such
moment, so tokens are merged in blocks, each with its own d_min and d_max, and up to block - 1 newest tokens are
exact. The distance of a token is the mean over its heads, keys and values apart, so that one index serves all
heads. Retained tokens leave their merged direction behind: it is stored and counted, but never read.
4-bit quantization, which the paper may add on top, is left out.

Bytes of two layers at itemsize b: a merged token costs 2H·(d + 2)·b, an exact one 4H·d·b, and a retained key or
value 2H·d·b + 4 on top.

Shape legend: B sequences, H key-value heads, T tokens of a block, M merged tokens, R retained tokens, d head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from clla.baselines.grouped import GroupedCache, GroupStore
from clla.baselines.settings import check_at_least, check_one_of
from clla.errors import UsageError
from clla.source.families import split_layers

Retention = Literal["prose", "equation"]
FLAT = 1e-4  # sine of an angle at which two directions count as parallel or opposite


def angle(pair: Tensor) -> Tensor:
    """Angle [...] in radians between the two vectors of [2, ..., d]; accurate for small ones, unlike acos."""
    previous, current = nn.functional.normalize(pair, dim=-1)
    return 2 * torch.atan2((previous - current).norm(dim=-1), (previous + current).norm(dim=-1))


def slerp(pair: Tensor, t: float) -> Tensor:
    """Unit direction [..., d], the share t of the way from the first to the second vector of [2, ..., d].

    Parallel vectors are interpolated straight. Between opposite ones no way is shortest: the second's is taken.
    A zero vector has no direction: the other's is taken.
    """
    omega = angle(pair)[..., None]
    sine = omega.sin()
    flat, parallel = sine.abs() < FLAT, omega < 1
    first = torch.where(flat, (1 - t) * parallel, ((1 - t) * omega).sin() / sine)
    second = torch.where(flat, torch.where(parallel, t, 1.0), (t * omega).sin() / sine)
    previous, current = nn.functional.normalize(pair, dim=-1)
    return nn.functional.normalize(first * previous + second * current, dim=-1)


def retained(pair: Tensor, gamma: float, retention: Retention) -> Tensor:
    """Tokens [B, T] (bool) of a block [2, B, H, T, d] that stay exact in both layers."""
    distance = angle(pair).mean(1) / torch.pi
    low, high = distance.amin(-1, keepdim=True), distance.amax(-1, keepdim=True)
    margin = (high - low) * gamma
    return distance > high - margin if retention == "prose" else distance < low + margin


@dataclass(frozen=True)
class Merged:
    """Keys or values of two layers.

    Attributes:
        direction: [B, H, M, d].
        length: [2, B, H, M].
        index: [R] int32, slot · B + sequence of each retained token.
        exact: [2, R, H, d], the retained tokens.
    """

    direction: Tensor
    length: Tensor
    index: Tensor
    exact: Tensor

    @classmethod
    def of(cls, pair: Tensor, *, t: float, gamma: float, retention: Retention) -> Merged:
        """Merge a block [2, B, H, T, d]; everything is stored in its dtype."""
        wide = pair.float()
        slot, sequence = retained(wide, gamma, retention).T.nonzero(as_tuple=True)
        return cls(
            direction=slerp(wide, t).to(pair.dtype),
            length=wide.norm(dim=-1).to(pair.dtype),
            index=(slot * pair.shape[1] + sequence).int(),
            exact=pair.permute(0, 3, 1, 2, 4)[:, slot, sequence],
        )

    def extended(self, new: Merged) -> Merged:
        """This, and a block that came after it."""
        batch, _, slots, _ = self.direction.shape
        return Merged(
            direction=torch.cat((self.direction, new.direction), dim=2),
            length=torch.cat((self.length, new.length), dim=3),
            index=torch.cat((self.index, new.index + slots * batch)),
            exact=torch.cat((self.exact, new.exact), dim=1),
        )

    def restore(self, layer: int) -> Tensor:
        """The first or second layer's vectors [B, H, M, d]."""
        whole = (self.direction.float() * self.length[layer].float()[..., None]).to(self.direction.dtype)
        batch = whole.shape[0]
        whole[self.index % batch, :, self.index // batch] = self.exact[layer]
        return whole


class PairStore(GroupStore):
    """Two neighbouring layers. Args as `MiniCacheCache`."""

    def __init__(self, layers: list[int], *, t: float, gamma: float, retention: Retention, block: int) -> None:
        super().__init__(layers, block=block)
        self.t, self.gamma, self.retention = t, gamma, retention
        self.merged: list[Merged] = []  # keys, values

    def compress(self, block: Tensor) -> None:
        new = [Merged.of(half, t=self.t, gamma=self.gamma, retention=self.retention) for half in block.chunk(2, dim=2)]
        if self.merged:
            new = [old.extended(part) for old, part in zip(self.merged, new, strict=True)]
        self.merged = new

    def past(self, index: int) -> list[Tensor]:
        return [torch.cat([half.restore(index) for half in self.merged], dim=1)] if self.merged else []

    def tensors(self) -> list[Tensor]:
        return [t for half in self.merged for t in (half.direction, half.length, half.index, half.exact)]


class MiniCacheCache(GroupedCache):
    """Cache whose upper layers are merged in pairs; an odd last layer stays exact.

    Args:
        config: the model's text config.
        start: lowest layer that may be merged; the middle one of those with full attention if None.
        t: share of the way from the lower layer's direction to the upper's.
        gamma: share of the range of distances whose tokens are retained; 0 retains none.
        retention: `prose` retains the most distant tokens, `equation` the nearest.
        block: tokens merged at a time.

    Raises:
        UsageError: a setting out of range, or no two layers to merge.
    """

    def __init__(
        self,
        config: Any,
        *,
        start: int | None = None,
        t: float = 0.6,
        gamma: float = 0.05,
        retention: Retention = "prose",
        block: int = 64,
    ) -> None:
        check_at_least(1, block=block)
        check_one_of(get_args(Retention), retention=retention)
        check_at_least(0, t=t, gamma=gamma)
        if t > 1:
            raise UsageError(f"t is {t}", expected="t between 0 and 1", remedy="lower t")
        full, _ = split_layers(config)
        start = full[len(full) // 2] if start is None else start
        upper = [layer for layer in full if layer >= start]
        if len(upper) < 2:
            raise UsageError(
                f"{len(upper)} layers with full attention from layer {start} on",
                expected="at least two layers to merge",
                remedy="lower start",
            )
        super().__init__(
            config,
            [
                PairStore(list(pair), t=t, gamma=gamma, retention=retention, block=block)
                for pair in zip(upper[::2], upper[1::2], strict=False)
            ],
        )
