"""How much loss each latent component of a layer group carries.

With M = blockdiag(F_l^(p/2)) the eigenvalues of M·Cov(y_G)·M are the components' worth in units of loss
(`group` source). For the `first` source the latent is read from the attention input x of the group's
first layer: reduced-rank regression (Izenman, 1975) of M·y_G on x, R = T·Cov(x, y_G)·M with T·Cov(x)·Tᵀ = I. The
eigenvalues of R·Rᵀ take their place; what x cannot explain is a constant residual.

All is computed on one device, on which the moments are put a layer or two at a time.

Shape legend: L layers, K band, n coordinates of the moments (2·H_kv·d unless they are reduced), h hidden size, G layers
of a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from clla.artifacts.stats import Stats
from clla.linalg import EXACT, leading_eigenpairs, searched, single_eigh

CPU = torch.device("cpu")
FLOOR = 1e-3  # eigenvalues of the metric, relative to its largest
WHOLE = 6  # layers: of longer groups' layers partitions are estimated by their leading coordinates
RIDGE = 1e-5  # of the input covariance, relative to its mean eigenvalue


def metric_power(fisher: Tensor, power: float, *, floor: float = FLOOR) -> Tensor:
    """F^power of symmetric matrices [..., n, n], eigenvalues floored at `floor` times the largest; fp64.

    The eigenvalues are those of fp32, which the floor outweighs by far.
    """
    return _powers(fisher, (power,), floor)[0]


def _powers(fisher: Tensor, powers: tuple[float, ...], floor: float = FLOOR) -> list[Tensor]:
    values, vectors = single_eigh(fisher)
    top = values[..., -1:].clamp_min(torch.finfo(torch.float64).tiny)
    values = values.clamp_min(floor * top)
    return [(vectors * values.pow(power)[..., None, :]) @ vectors.mT for power in powers]


@dataclass(frozen=True)
class Spectra:
    """Weighted moments of all layers, from which those of any group are assembled.

    Args:
        stats: moments and metric.
        power: p, the exponent of the Fisher metric; 0 gives plain activation PCA.
        source: `group` or `first`.
        device: to compute on.
    """

    stats: Stats
    power: float = 0.75
    source: str = "group"
    device: torch.device = CPU

    @cached_property
    def _metrics(self) -> tuple[Tensor, Tensor]:
        pairs = [_powers(layer.to(self.device), (self.power / 2, -self.power / 2)) for layer in self.stats.fisher]
        return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])

    @property
    def metric(self) -> Tensor:
        """M_l = F_l^(p/2), [L, n, n], fp64."""
        return self._metrics[0]

    @property
    def inverse_metric(self) -> Tensor:
        """M_l⁻¹, [L, n, n], fp64."""
        return self._metrics[1]

    @cached_property
    def weighted(self) -> Tensor:
        """M_a·Cov(y_a, y_b)·M_b for b = a + j, [L, K, n, n], fp32."""
        count, band = self.stats.covariance.shape[:2]
        out = torch.zeros(self.stats.covariance.shape, device=self.device)
        metric = self.metric.float()
        for layer in range(count):
            for j in range(min(band, count - layer)):
                out[layer, j] = metric[layer] @ self.stats.covariance[layer, j].to(self.device) @ metric[layer + j]
        return out

    def input_whitening(self, start: int) -> Tensor:
        """T with T·Cov(x)·Tᵀ = I for the input of a layer, [h, h], lower triangular, fp64."""
        assert self.stats.input_covariance is not None, "the stats were collected without inputs"
        covariance = self.stats.input_covariance[start].to(self.device).double()
        eye = torch.eye(len(covariance), dtype=covariance.dtype, device=self.device)
        lower = torch.linalg.cholesky(covariance + RIDGE * covariance.diagonal().mean() * eye)
        return torch.linalg.solve_triangular(lower, eye, upper=False)

    def regression(self, start: int, size: int) -> Tensor:
        """T·Cov(x, y_G)·M of a group, [h, n·G], fp64."""
        assert self.stats.input_cross is not None
        cross = self.stats.input_cross[start, :size].to(self.device).double()  # [G, h, n]
        return self.input_whitening(start) @ (cross @ self.metric[start : start + size]).transpose(0, 1).flatten(1)

    def moments(self, start: int, size: int) -> Tensor:
        """What has the components' worth as its eigenvalues: [n·G, n·G] in fp32 or [h, h] in fp64."""
        if self.source == "first":
            regression = self.regression(start, size)
            return regression @ regression.mT
        return self.assembled(start, size)

    def assembled(self, start: int, size: int) -> Tensor:
        """M·Cov(y_G)·M of layers start … start + size - 1, [n·G, n·G], fp32."""
        return assemble(self.weighted, start, size)

    def energy(self, start: int, size: int) -> float:
        """Total weighted variance of a group: the loss if nothing were kept."""
        return float(self.weighted[start : start + size, 0].diagonal(dim1=-2, dim2=-1).sum(dtype=torch.float64))

    @cached_property
    def _found(self) -> dict[tuple[int, int], tuple[Tensor, Tensor | None]]:
        return {}

    def rank(self, size: int) -> int:
        """Components of a group of this number of layers."""
        if self.source == "group":
            return size * self.stats.width
        assert self.stats.input_mean is not None, "the stats were collected without inputs"
        return self.stats.input_mean.shape[1]

    def eigenvalues(self, start: int, size: int, count: int | None = None) -> Tensor:
        """Worth of each latent component, descending, fp64, on the CPU; computed once a group, whatever the budget.

        Args:
            start: first layer of the group.
            size: number of its layers.
            count: how many are wanted; all of a small group are given. None for all.
        """
        values, _ = self._pairs(start, size, count, with_vectors=False)
        return values.double().cpu().clamp_min(0)

    def eigenpairs(self, start: int, size: int, count: int) -> tuple[Tensor, Tensor]:
        """The `count` largest eigenvalues of `moments`, descending, and their vectors, on the device."""
        values, vectors = self._pairs(start, size, count, with_vectors=True)
        assert vectors is not None
        return values[:count], vectors[:, :count]

    def _pairs(self, start: int, size: int, count: int | None, *, with_vectors: bool) -> tuple[Tensor, Tensor | None]:
        """All eigenvalues where they are as cheap as some, without vectors unless these are wanted; else both, kept."""
        rank = self.rank(size)
        count = rank if count is None else min(count, rank)
        known = self._found.get((start, size))
        if known is not None and len(known[0]) >= count and (known[1] is not None or not with_vectors):
            return known
        moments = self.moments(start, size)
        if searched(rank, count):
            self._found[start, size] = leading_eigenpairs(moments, count)
        elif with_vectors:
            return leading_eigenpairs(moments.double() if rank <= EXACT else moments, count)
        else:
            self._found[start, size] = torch.linalg.eigvalsh(moments).flip(0), None
        return self._found[start, size]

    @cached_property
    def _outlined(self) -> Tensor:
        """Blocks of `weighted` by which partitions are estimated, [L, K, q', q'].

        Where groups may be long each layer has its leading coordinates only, so that the largest group takes no longer
        than one of `WHOLE` layers.
        """
        count, band = self.stats.covariance.shape[:2]
        if band <= WHOLE:
            return self.weighted
        width = max(1, self.stats.width * WHOLE // band)
        leading = torch.stack([torch.linalg.eigh(own)[1][:, -width:] for own in self.weighted[:, 0]])
        out = self.weighted.new_zeros(count, band, width, width)
        for layer in range(count):
            reach = min(band, count - layer)
            out[layer, :reach] = leading[layer].mT @ self.weighted[layer, :reach] @ leading[layer : layer + reach]
        return out

    @cached_property
    def _determinants(self) -> dict[tuple[int, int, int], list[float]]:
        """By first layer, number of layers of the factor and level; so its rounding does not depend on the order."""
        return {}

    def log_determinants(self, start: int, largest: int, levels: Sequence[int]) -> list[list[float]]:
        """ln det(I + A/θ) for θ = 4^level, with A the `moments` of 1, 2, … `largest` layers from `start` on.

        They are sums over a group's components of ln(1 + λ/θ). One triangular factor has those of all groups that
        begin with the same layer: its leading blocks are theirs. For the `group` source. Of long groups A has each
        layer's leading coordinates (`_outlined`).
        """
        known = self._determinants
        lacking = [level for level in levels if (start, largest, level) not in known]
        if lacking:
            factors = _log_pivots(assemble(self._outlined, start, largest), [4.0**level for level in lacking])
            for level, logs in zip(lacking, factors, strict=True):
                known[start, largest, level] = logs.view(largest, -1).sum(1).cumsum(0).tolist()
        return [known[start, largest, level] for level in levels]


def _log_pivots(moments: Tensor, thetas: Sequence[float]) -> Iterator[Tensor]:
    """For each θ, ln of the squared pivots of I + A/θ, fp64; A is written over."""
    own = moments.diagonal().clone()
    for theta in thetas:
        moments.diagonal().copy_(own + theta)
        lower, failed = torch.linalg.cholesky_ex(moments)
        if bool(failed):  # rounding has left negative eigenvalues, which θ does not outweigh
            values, vectors = torch.linalg.eigh(moments.double())
            lower = torch.linalg.cholesky((vectors * values.clamp_min(theta)) @ vectors.mT)
        yield lower.diagonal().double().log().mul(2).cpu() - math.log(theta)


def assemble(blocks: Tensor, start: int, size: int) -> Tensor:
    """Moments of a group, [n·G, n·G], from blocks [L, K, n, n] of layers l and l + j."""
    n = blocks.shape[-1]
    out = torch.empty(size * n, size * n, dtype=blocks.dtype, device=blocks.device)
    for a in range(size):
        for b in range(a, size):
            block = blocks[start + a, b - a]
            out[a * n : (a + 1) * n, b * n : (b + 1) * n] = block
            out[b * n : (b + 1) * n, a * n : (a + 1) * n] = block.mT
    return out
