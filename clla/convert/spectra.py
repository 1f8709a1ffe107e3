"""How much loss each latent component of a layer group carries.

With M = blockdiag(F_l^(p/2)) the eigenvalues of M·Cov(y_G)·M are the components' worth in units of loss
(`group` source). For the `first` source the latent is read from the attention input x of the group's
first layer: reduced-rank regression (Izenman, 1975) of M·y_G on x, whose squared singular values take
the eigenvalues' place; what x cannot explain is a constant residual.

Shape legend: L layers, K band, n coordinates of the moments (2·H_kv·d unless they are reduced), h hidden size, G layers
of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from clla.artifacts import Stats

FLOOR = 1e-3  # eigenvalues of the metric, relative to its largest
RIDGE = 1e-5  # of the input covariance, relative to its mean eigenvalue


def metric_power(fisher: Tensor, power: float, *, floor: float = FLOOR) -> Tensor:
    """F^power of symmetric matrices [..., n, n], eigenvalues floored at `floor` times the largest; fp64."""
    values, vectors = torch.linalg.eigh(fisher.double())
    top = values[..., -1:].clamp_min(torch.finfo(torch.float64).tiny)
    values = values.clamp_min(floor * top).pow(power)
    return (vectors * values[..., None, :]) @ vectors.mT


@dataclass(frozen=True)
class Spectra:
    """Weighted moments of all layers, from which those of any group are assembled.

    Args:
        stats: moments and metric.
        power: p, the exponent of the Fisher metric; 0 gives plain activation PCA.
        source: `group` or `first`.
    """

    stats: Stats
    power: float = 0.75
    source: str = "group"

    @cached_property
    def metric(self) -> Tensor:
        """M_l = F_l^(p/2), [L, n, n], fp64."""
        return metric_power(self.stats.fisher, self.power / 2)

    @cached_property
    def inverse_metric(self) -> Tensor:
        """M_l⁻¹, [L, n, n], fp64."""
        return metric_power(self.stats.fisher, -self.power / 2, floor=FLOOR)

    @cached_property
    def weighted(self) -> Tensor:
        """M_a·Cov(y_a, y_b)·M_b for b = a + j, [L, K, n, n], fp32."""
        count, band = self.stats.covariance.shape[:2]
        out = torch.zeros_like(self.stats.covariance)
        metric = self.metric.float()
        for j in range(min(band, count)):
            stop = count - j
            out[:stop, j] = metric[:stop] @ self.stats.covariance[:stop, j] @ metric[j:]
        return out

    @cached_property
    def input_whitening(self) -> Tensor:
        """Cov(x_l)^(-1/2), [L, h, h], fp64."""
        assert self.stats.input_covariance is not None, "the stats were collected without inputs"
        covariance = self.stats.input_covariance.double()
        ridge = RIDGE * covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
        covariance = covariance + ridge[:, None, None] * torch.eye(covariance.shape[-1], dtype=torch.float64)
        return metric_power(covariance, -0.5, floor=1e-9)

    def regression(self, start: int, size: int) -> Tensor:
        """Cov(x)^(-1/2)·Cov(x, y_G)·M of a group, [h, n·G], fp64."""
        assert self.stats.input_cross is not None
        blocks = [self.stats.input_cross[start, j].double() @ self.metric[start + j] for j in range(size)]
        return self.input_whitening[start] @ torch.cat(blocks, dim=1)

    def assembled(self, start: int, size: int) -> Tensor:
        """M·Cov(y_G)·M of layers start … start + size - 1, [n·G, n·G], fp32."""
        return assemble(self.weighted, start, size)

    def energy(self, start: int, size: int) -> float:
        """Total weighted variance of a group: the loss if nothing were kept."""
        return float(self.weighted[start : start + size, 0].diagonal(dim1=-2, dim2=-1).sum())

    @cached_property
    def _eigenvalues(self) -> dict[tuple[int, int], Tensor]:
        return {}

    def eigenvalues(self, start: int, size: int) -> Tensor:
        """Worth of each latent component, descending, fp64; computed once a group, whatever the budget."""
        if (start, size) not in self._eigenvalues:
            self._eigenvalues[start, size] = self._fresh_eigenvalues(start, size)
        return self._eigenvalues[start, size]

    def _fresh_eigenvalues(self, start: int, size: int) -> Tensor:
        if self.source == "first":
            values = torch.linalg.svdvals(self.regression(start, size)).square()
        else:
            values = torch.linalg.eigvalsh(self.assembled(start, size)).flip(0).double()
        return values.clamp_min(0)


def assemble(blocks: Tensor, start: int, size: int) -> Tensor:
    """Moments of a group, [n·G, n·G], from blocks [L, K, n, n] of layers l and l + j."""
    n = blocks.shape[-1]
    out = torch.empty(size * n, size * n, dtype=blocks.dtype)
    for a in range(size):
        for b in range(a, size):
            block = blocks[start + a, b - a]
            out[a * n : (a + 1) * n, b * n : (b + 1) * n] = block
            out[b * n : (b + 1) * n, a * n : (a + 1) * n] = block.mT
    return out
