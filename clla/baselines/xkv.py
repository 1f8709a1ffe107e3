"""xKV: neighbouring layers share the token basis of a truncated SVD (arXiv 2503.18893).

https://arxiv.org/abs/2503.18893 (xKV: Cross-Layer SVD for KV-Cache Compression)

Keys before RoPE of a group of layers, side by side as one matrix [tokens, G·H·d], are factored into a basis A
[tokens, r], which the layers share, and a reconstruction R [r, G·H·d]; so are values, at 1.5 times the rank.

Against the paper: it factors the prompt once and keeps what is generated exact. A stream has no prompt, so every
block of tokens is factored when it is complete. R is thus paid once a block, r·G·H·d numbers instead of once:
at a block of that many tokens as a group has columns it costs as much as A. The first tokens stay exact, being
outliers. Selective reconstruction of the paper's second version, which saves time and no memory, is left out.

Bytes of a group at itemsize b: (r_k + r_v)·(block + G·H·d)·b a block, 2·G·H·d·b a sink or a token of the unfinished
block.

Shape legend: G layers of a group, B sequences, H key-value heads, T tokens of a block, S sinks, d head dim,
n = G·H·d columns, r rank, p rotary dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clla.baselines.grouped import GroupedCache, GroupStore, before_rope, rotation_from
from clla.baselines.settings import check_at_least
from clla.modeling.rotary_clla import Rope, Rotation
from clla.source.families import split_layers

VALUE_RANK = 1.5  # rank of values to that of keys, as in the paper


def truncated_svd(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors [B, T, r] and [B, r, n] (fp32) of the best approximation of [B, T, n]; r is at most full.

    Taken from the eigenvectors of the smaller Gram matrix, in fp64 as it squares the condition.
    """
    x = x.double()
    rank = min(rank, *x.shape[1:])
    if x.shape[1] <= x.shape[2]:
        basis = torch.linalg.eigh(x @ x.mT).eigenvectors[..., -rank:]
        return basis.float(), (basis.mT @ x).float()
    rows = torch.linalg.eigh(x.mT @ x).eigenvectors[..., -rank:].mT
    return (x @ rows.mT).float(), rows.float()


class SvdStore(GroupStore):
    """One group of layers. Args as `XkvCache`."""

    def __init__(self, layers: list[int], rope: Rope | None, *, rank: int, block: int, sinks: int) -> None:
        super().__init__(layers, block=block, sinks=sinks)
        self.rope, self.rank, self.sinks = rope, rank, sinks
        self.sink: Tensor | None = None  # [G, B, 2H, S, d]
        self.blocks: list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] = []  # factors of keys and values

    def compress(self, block: Tensor) -> None:
        if self.sink is None:
            self.sink, block = block[:, :, :, : self.sinks].clone(), block[:, :, :, self.sinks :]
        keys, values = block.float().chunk(2, dim=2)  # [G, B, H, T, d]
        keys = before_rope(keys, self.layers, self._rotation(len(self.blocks), block.device))
        ranks = self.rank, round(VALUE_RANK * self.rank)
        key_factors, value_factors = (
            self._factor(half, rank, block.dtype) for half, rank in zip((keys, values), ranks, strict=True)
        )
        self.blocks.append((key_factors, value_factors))

    def past(self, index: int) -> list[Tensor]:
        if self.sink is None:
            return []
        parts = [self.sink[index]]
        heads, head_dim = parts[0].shape[1] // 2, parts[0].shape[3]
        columns = slice(index * heads * head_dim, (index + 1) * heads * head_dim)
        for number, factors in enumerate(self.blocks):
            keys, values = (
                (basis.float() @ rows[..., columns].float()).unflatten(-1, (heads, head_dim)).transpose(1, 2)
                for basis, rows in factors
            )
            rotation = self._rotation(number, keys.device)
            if rotation is not None:
                keys = rotation.rotate(keys, self.layers[index])
            parts.append(torch.cat((keys, values), dim=1))
        return parts

    def tensors(self) -> list[Tensor]:
        factors = [t for block in self.blocks for pair in block for t in pair]
        return factors if self.sink is None else [self.sink, *factors]

    def _factor(self, layers: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Factors of [G, B, H, T, d] in the storage dtype."""
        basis, rows = truncated_svd(layers.permute(1, 3, 0, 2, 4).flatten(2), rank)
        return basis.to(dtype), rows.to(dtype)

    def _rotation(self, number: int, device: torch.device) -> Rotation | None:
        """The rotation to a block's positions."""
        return rotation_from(self.rope, self.sinks + number * self.block, self.block, device)


class XkvCache(GroupedCache):
    """Cache whose layers are factored in groups; positions are counted from zero, without padding.

    Args:
        config: the model's text config.
        rope: rotations of the model; None for models without.
        rank: of keys; values get 1.5 times as much. More than full rank is full rank.
        group_size: neighbouring layers with full attention that share a basis; the last group may have fewer.
        block: tokens factored at a time.
        sinks: first tokens that stay exact.

    Raises:
        UsageError: a setting out of range.
    """

    def __init__(
        self,
        config: Any,
        rope: Rope | None,
        *,
        rank: int,
        group_size: int = 4,
        block: int = 1024,
        sinks: int = 4,
    ) -> None:
        check_at_least(1, rank=rank, group_size=group_size, block=block)
        check_at_least(0, sinks=sinks)
        full, _ = split_layers(config)
        super().__init__(
            config,
            [
                SvdStore(list(full[i : i + group_size]), rope, rank=rank, block=block, sinks=sinks)
                for i in range(0, len(full), group_size)
            ],
        )
