"""KVTC: KV caches as images are coded, by a transform, bits where variance is, and an entropy code (arXiv 2511.01815).

Keys before RoPE of all layers and heads, and values likewise, are each one vector per token. Principal components of
calibration text decorrelate them; a dynamic program gives bits to components where they take the most squared error
away, within one budget for keys and values; the codes go through DEFLATE block by block. The first tokens and a window
of the newest stay exact.

Against the paper: components get the widths, scales and quantizer of this package, found by its own dynamic program,
which are at least as good as the paper's groups with shared shift and scale. The codes are kept compressed while the
model runs and are decoded for each forward pass, where the paper compresses caches that are put away.

Shape legend: L layers, B sequences, H key-value heads, T tokens, d head dim, p = L·H·d, r components, N bytes per row.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from clla.baselines.grouped import GroupedCache, GroupStore, before_rope, rotation_from
from clla.baselines.settings import check_at_least
from clla.errors import UsageError
from clla.modeling.hooks_clla import CACHE
from clla.modeling.quantize_clla import RowLayout
from clla.modeling.rotary_clla import Rope
from clla.plan.allocation import candidate, solve
from clla.recipe import PlanConfig
from clla.source.families import split_layers

DEFLATE_LEVEL = 6  # zlib's default
OVERSAMPLING, POWER_ROUNDS = 64, 2  # of the randomized decomposition (Halko et al., arXiv 0909.4061)


@dataclass(frozen=True)
class Transform:
    """Principal components of keys, or of values.

    Attributes:
        mean: [p].
        basis: [r, p], orthonormal rows, largest variance first.
        variances: [r].
        total: variance of all p coordinates.
    """

    mean: Tensor
    basis: Tensor
    variances: Tensor
    total: float


@dataclass(frozen=True)
class Coder:
    """A transform and the bits of its components. Attributes: transform; layout: of a row."""

    transform: Transform
    layout: RowLayout

    def pack(self, x: Tensor) -> Tensor:
        """Rows [B, T, N] of [B, T, p]."""
        basis = self.transform.basis[: self.layout.rank]
        return self.layout.pack((x.float() - self.transform.mean) @ basis.mT)

    def unpack(self, rows: Tensor) -> Tensor:
        """[B, T, p] of rows [B, T, N], fp32."""
        return self.layout.unpack(rows) @ self.transform.basis[: self.layout.rank] + self.transform.mean


@torch.no_grad()
def collect(
    model: PreTrainedModel, rope: Rope | None, batches: Sequence[Tensor], *, sinks: int, window: int
) -> tuple[Tensor, Tensor]:
    """Keys before RoPE and values [tokens, p] of calibration text, without the tokens that are never coded.

    Args:
        model: the source.
        rope: its rotations; None for models without.
        batches: sequences [B, T].
        sinks: first tokens of each that stay exact.
        window: newest tokens likewise.
    """
    found: list[tuple[Tensor, Tensor]] = []
    layers = split_layers(model.config.get_text_config())[0]
    for ids in batches:
        cache: Any = DynamicCache(config=model.config)
        model(ids.to(model.device), use_cache=True, logits_to_keep=1, **{CACHE: cache})
        count = ids.shape[1]
        keys = torch.stack([cache.layers[i].keys for i in layers]).float()  # [L, B, H, T, d]
        values = torch.stack([cache.layers[i].values for i in layers]).float()
        keys = before_rope(keys, layers, rotation_from(rope, 0, count, model.device))
        inner = slice(sinks, count - window)
        found.append((_vectors(keys)[:, inner].flatten(0, 1), _vectors(values)[:, inner].flatten(0, 1)))
    return torch.cat([keys for keys, _ in found]), torch.cat([values for _, values in found])


def principal(x: Tensor, rank: int) -> Transform:
    """The leading principal components of [tokens, p]; by random projections where there are many more."""
    mean = x.mean(0)
    x = x - mean
    total, rank = float(x.double().square().sum() / len(x)), min(rank, *x.shape)
    if min(x.shape) <= 2 * rank:
        _, sizes, basis = torch.linalg.svd(x, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _, sizes, columns = torch.svd_lowrank(x, rank + OVERSAMPLING, niter=POWER_ROUNDS)
        basis = columns.mT
    return Transform(mean, basis[:rank].contiguous(), sizes[:rank].double().square() / len(x), total)


def allocate(keys: Transform, values: Transform, bits: int) -> tuple[Coder, Coder]:
    """Widths of components that leave the least squared error within so many bits per token, scales included.

    Raises:
        UsageError: they hold no component of either.
    """
    config = PlanConfig()
    options = {(i, 1): candidate(t.variances, t.total, config.tier_size) for i, t in enumerate((keys, values))}
    found = solve(options, num_layers=2, budget_bits=bits, widths=config.bits, tier_size=config.tier_size)
    coders = [Coder(t, RowLayout(found[i, 1].bits, config.tier_size)) for i, t in enumerate((keys, values))]
    if not all(coder.layout.rank for coder in coders):
        raise UsageError(f"{bits} bits per token hold no component of keys and values", expected="more")
    return coders[0], coders[1]


class TransformStore(GroupStore):
    """All layers of a cache. Args as `KvtcCache`."""

    def __init__(
        self, layers: list[int], rope: Rope | None, coders: tuple[Coder, Coder], *, window: int, block: int, sinks: int
    ) -> None:
        super().__init__(layers, block=block, sinks=sinks, window=window)
        self.rope, self.coders, self.sinks = rope, coders, sinks
        self.sink: Tensor | None = None  # [L, B, 2H, S, d]
        self.blocks: list[tuple[Tensor, Tensor]] = []  # bytes of keys and of values
        self._decoded: Tensor | None = None  # of all blocks [L, B, 2H, T, d], for the layers of one forward pass

    def compress(self, block: Tensor) -> None:
        if self.sink is None:
            self.sink, block = block[:, :, :, : self.sinks].clone(), block[:, :, :, self.sinks :]
        keys, values = block.float().chunk(2, dim=2)  # [L, B, H, T, d]
        rotation = rotation_from(self.rope, self._start(len(self.blocks)), self.block, block.device)
        keys = before_rope(keys, self.layers, rotation)
        rows = [coder.pack(_vectors(x)) for coder, x in zip(self.coders, (keys, values), strict=True)]
        self.blocks.append((_deflated(rows[0]), _deflated(rows[1])))
        self._decoded = None

    def past(self, index: int) -> list[Tensor]:
        if self.sink is None:
            return []
        if self._decoded is None:
            self._decoded = torch.cat([self._decode(number) for number in range(len(self.blocks))], dim=3)
        found = [self.sink[index], self._decoded[index]]
        if index == len(self.layers) - 1:
            self._decoded = None  # decoded again in every forward pass
        return found

    def tensors(self) -> list[Tensor]:
        return [*(x for pair in self.blocks for x in pair), *([] if self.sink is None else [self.sink])]

    def _decode(self, number: int) -> Tensor:
        """Keys after RoPE and values [L, B, 2H, block, d] of one block."""
        assert self.sink is not None
        layers, batch, both, _, size = self.sink.shape
        halves = []
        for coder, data in zip(self.coders, self.blocks[number], strict=True):
            rows = _inflated(data, (batch, self.block, coder.layout.row_bytes))
            found = coder.unpack(rows).unflatten(-1, (layers, both // 2, size))  # [B, T, L, H, d]
            halves.append(found.permute(2, 0, 3, 1, 4))
        rotation = rotation_from(self.rope, self._start(number), self.block, self.sink.device)
        if rotation is not None:
            halves[0] = torch.stack([rotation.rotate(k, i) for k, i in zip(halves[0], self.layers, strict=True)])
        return torch.cat(halves, dim=2)

    def _start(self, number: int) -> int:
        return self.sinks + number * self.block


class KvtcCache(GroupedCache):
    """A model's cache coded as KVTC does; positions are counted from zero, without padding.

    Args:
        config: the model's text config.
        rope: rotations of the model; None for models without.
        coders: of keys and of values.
        window: newest tokens that stay exact.
        block: tokens coded at a time.
        sinks: first tokens that stay exact.

    Raises:
        UsageError: a setting out of range.
    """

    def __init__(
        self,
        config: Any,
        rope: Rope | None,
        coders: tuple[Coder, Coder],
        *,
        window: int = 128,
        block: int = 16,
        sinks: int = 4,
    ) -> None:
        check_at_least(1, block=block)
        check_at_least(0, sinks=sinks, window=window)
        layers = list(split_layers(config)[0])
        super().__init__(config, [TransformStore(layers, rope, coders, window=window, block=block, sinks=sinks)])


def _vectors(layers: Tensor) -> Tensor:
    """[B, T, p] of [L, B, H, T, d]."""
    return layers.permute(1, 3, 0, 2, 4).flatten(2)


def _deflated(rows: Tensor) -> Tensor:
    """DEFLATE of rows [B, T, N], column by column, whose bytes are alike."""
    data = zlib.compress(rows.movedim(-1, 0).contiguous().cpu().numpy().tobytes(), DEFLATE_LEVEL)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(rows.device)


def _inflated(data: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Inverse of `_deflated`."""
    batch, count, row = shape
    raw = bytearray(zlib.decompress(data.cpu().numpy().tobytes()))
    return torch.frombuffer(raw, dtype=torch.uint8).view(row, batch, count).movedim(0, -1).contiguous().to(data.device)
