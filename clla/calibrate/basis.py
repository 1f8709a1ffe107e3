"""The directions of one layer's keys and values in which an error costs most.

Wide layers (8192 values in a 7B model with a key-value head for every query head) have moments that do not fit in
memory for all pairs of layers. Their moments are kept in q coordinates instead. The best q-dimensional projection Π in
the Fisher norm, which minimises tr(F·(I - Π)·C·(I - Π)ᵀ), comes from the leading eigenvectors of the symmetric LᵀFL
with C = LLᵀ: its range is spanned by LU. Coordinates are taken in an orthonormal basis of that range, so that powers of
the metric mean the same in them, and with q = n nothing changes.

Shape legend: n values of a layer, q coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clla.linalg import leading_eigenpairs

RIDGE = 1e-6  # of the covariance, relative to its mean eigenvalue; more where rounding has made it indefinite
FLOOR = 1e-3  # of the metric's eigenvalues, relative to its mean: what it is blind to is not free


@dataclass(frozen=True)
class Basis:
    """Attributes: reading [q, n] and writing [n, q], as in `Stats`; dropped: nats per token."""

    reading: Tensor
    writing: Tensor
    dropped: float


def leading_directions(covariance: Tensor, fisher: Tensor, width: int, *, seed: int = 0) -> Basis:
    """The q directions that keep most; few among many by randomized subspace iteration (Halko et al., arXiv 0909.4061).

    Args:
        covariance: C [n, n], centred, fp32 or better.
        fisher: F [n, n].
        width: q, at most n.
        seed: of the random start.
    """
    fisher, eye = fisher.to(covariance), torch.eye(len(covariance)).to(covariance)
    metric = fisher + FLOOR * fisher.diagonal().mean() * eye
    lower = _root(covariance)
    worth = lower.mT @ metric @ lower  # what an error of each whitened direction costs
    _, vectors = leading_eigenpairs(worth, width, seed=seed)  # [n, q]
    writing, triangle = torch.linalg.qr(lower @ vectors)
    values = vectors.mT @ worth @ vectors
    reading = triangle @ torch.linalg.solve(values, vectors.mT @ (lower.mT @ metric))
    kept = reading @ covariance  # [q, n]
    error = covariance - writing @ kept - (writing @ kept).mT + writing @ (kept @ reading.mT) @ writing.mT
    return Basis(reading, writing, max(0.0, 0.5 * float((fisher * error).sum(dtype=torch.float64))))


def _root(covariance: Tensor) -> Tensor:
    """Lower triangle L with C = LLᵀ, of a covariance that few tokens may have left without full rank."""
    share, eye = RIDGE, torch.eye(len(covariance)).to(covariance)
    while True:
        lower, failed = torch.linalg.cholesky_ex(covariance + share * covariance.diagonal().mean() * eye)
        if not bool(failed):
            return lower
        share *= 10
        assert share <= 1, "a covariance has no negative eigenvalues of that size"
