"""Baselines for the metric: what published methods take where we take moments and Fisher metric.

- `pca`: plain activation PCA: every error counts alike.
- `weights`: SVD of the key-value projections themselves, as if inputs were white.
- `asvd`: the same with inputs scaled by their channels' root mean square (ASVD, arXiv 2312.05821;
  used by CSKV, arXiv 2409.10593).

The projections are recovered from the moments (W = Cov(x)⁻¹·Cov(x, y)), so that fused and normalised
projections need no special case.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from clla.artifacts.stats import Stats
from clla.errors import UsageError
from clla.plan.decoupled import NEAR, DecoupledSpectra, uncentred
from clla.plan.spectra import CPU, RIDGE, Spectra
from clla.recipe import PlanConfig, Recipe


def surrogate_stats(stats: Stats, metric: str) -> Stats:
    """Stats whose moments and metric are those of a baseline.

    Args:
        stats: collected with inputs for `weights` and `asvd`.
        metric: `fisher` (unchanged), `pca`, `weights` or `asvd`.

    Raises:
        UsageError: the moments are kept in directions that the Fisher metric chose.
    """
    if metric == "fisher":
        return stats
    _check_whole(stats)
    count, n = stats.mean.shape
    flat = torch.eye(n).expand(count, n, n).contiguous()
    if metric == "pca":
        return replace(stats, fisher=flat)
    assert stats.input_cross is not None
    weights, second_moment, _ = projections(stats)
    power = second_moment.diagonal(dim1=-2, dim2=-1)
    if metric == "weights":
        power = torch.ones_like(power)
    weights = power.sqrt()[:, :, None] * weights
    covariance, cross = torch.zeros_like(stats.covariance), torch.zeros_like(stats.input_cross)
    for j in range(min(covariance.shape[1], count)):
        covariance[: count - j, j] = (weights[: count - j].mT @ weights[j:]).float()
        cross[: count - j, j] = (power[: count - j].sqrt()[:, :, None] * weights[j:]).float()
    return replace(
        stats,
        covariance=covariance,
        fisher=flat,
        input_covariance=torch.diag_embed(power).float(),
        input_cross=cross,
    )


def _check_whole(stats: Stats) -> None:
    if stats.reading is not None:
        raise UsageError(
            f"a baseline's metric with moments reduced to {stats.width} coordinates per layer",
            expected="moments of all keys and values",
            remedy=f"raise calibration.basis to {stats.kv.values}",
        )


def projections(stats: Stats) -> tuple[Tensor, Tensor, Tensor]:
    """Key-value projections W [L, h, n], the inputs' second moments E[xxᵀ] [L, h, h] and biases [L, n], fp64.

    Args:
        stats: collected with inputs.

    Raises:
        UsageError: the moments are kept in directions that the Fisher metric chose.
    """
    _check_whole(stats)
    assert stats.input_covariance is not None and stats.input_cross is not None and stats.input_mean is not None
    covariance, mean = stats.input_covariance.double(), stats.input_mean.double()
    ridge = RIDGE * covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
    covariance = covariance + ridge[:, None, None] * torch.eye(covariance.shape[-1], dtype=torch.float64)
    weights = torch.linalg.solve(covariance, stats.input_cross[:, 0].double())
    bias = stats.mean.double() - (mean[:, None] @ weights)[:, 0]
    return weights, covariance + mean[:, :, None] * mean[:, None], bias


def weigh(stats: Stats, recipe: Recipe, device: torch.device = CPU) -> Spectra:
    """Weighted moments as the recipe's metric wants them, to be computed with on a device."""
    plan = recipe.plan
    power, weighed = metric_power(plan), surrogate_stats(stats, plan.metric)
    if plan.key == "reconstruct":
        return Spectra(weighed, power=power, source=plan.source, device=device)
    assert plan.qk_rope_head_dim is not None, "the recipe is not resolved"
    return DecoupledSpectra(
        uncentred(weighed) if plan.layout == "deepseek" else weighed,
        power=power,
        source=plan.source,
        device=device,
        components=plan.qk_rope_head_dim,
        context=NEAR,
        once=plan.layout == "deepseek",
    )


def metric_power(plan: PlanConfig) -> float:
    """Exponent that the metric is taken to; a baseline's counts every error alike."""
    return plan.metric_power if plan.metric == "fisher" else 0.0


def needs_inputs(metric: str, source: str) -> bool:
    """Whether the stats must hold the attention inputs' moments."""
    return source == "first" or metric in ("weights", "asvd")
