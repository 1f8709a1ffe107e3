"""Eigenpairs of symmetric matrices: all of them at the cost of fp32, or the leading ones of large ones.

Shape legend: n rows of the matrix, r eigenpairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 2560  # rows up to which all eigenpairs are computed: searching for some is no faster
SHARE = 0.5  # of all eigenpairs, from which on all of them are computed
EXTRA = 0.1  # of r, directions beyond it that the search draws, and at least 32
ITERATIONS = 3


def single_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and vectors of matrices [..., n, n], found in fp32; fp64.

    The values are off by fp32's rounding of the largest. The vectors are made orthogonal in fp64 (one Newton-Schulz
    step, which squares the error), so that powers of the matrix made from them are inverses of each other.
    """
    scale = matrix.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    values, vectors = torch.linalg.eigh((matrix / scale).float())
    vectors = vectors.double()
    return values.double() * scale[..., 0], 1.5 * vectors - 0.5 * vectors @ (vectors.mT @ vectors)


def searched(n: int, count: int) -> bool:
    """Whether some eigenpairs are found sooner than all."""
    return n > EXACT and count <= SHARE * n


def leading_eigenpairs(matrix: Tensor, count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The r largest eigenvalues, descending, and their vectors [n, r]; few among many by subspace iteration.

    The search starts at random directions and ends with a Rayleigh-Ritz step (Halko et al., arXiv 0909.4061), so that
    the values are those of what its vectors capture, never more.

    Args:
        matrix: [n, n], without negative eigenvalues but for rounding; any float dtype and device.
        count: r, at most n.
        seed: of the random start.
    """
    n = len(matrix)
    if not searched(n, count):
        values, vectors = torch.linalg.eigh(matrix)
        return values.flip(0)[:count], vectors.flip(1)[:, :count]
    generator = torch.Generator().manual_seed(seed)
    width = min(n, count + max(32, int(EXTRA * count)))
    basis = torch.randn(n, width, generator=generator, dtype=torch.float32).to(matrix)
    for _ in range(ITERATIONS - 1):
        basis = _independent(matrix @ basis)
    basis = torch.linalg.qr(matrix @ basis).Q
    values, turn = torch.linalg.eigh(basis.mT @ (matrix @ basis))
    return values.flip(0)[:count], basis @ turn.flip(1)[:, :count]


def _independent(columns: Tensor) -> Tensor:
    """A well-conditioned basis of the columns' span, the lower factor of PLU: a third of the time of QR."""
    compact, pivots = torch.linalg.lu_factor(columns)
    order = torch.arange(len(columns))
    for row, other in enumerate((pivots - 1).tolist()):
        order[[row, other]] = order[[other, row]]
    lower = compact.tril(-1)
    lower.diagonal().fill_(1)
    out = torch.empty_like(lower)
    out[order.to(columns.device)] = lower
    return out
