"""Leading eigenpairs against all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clla import linalg as eigen
from clla.linalg import leading_eigenpairs, single_eigh


def positive(n: int, fall: float, seed: int = 0) -> Tensor:
    """Eigenvalues i^-fall, in random directions."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    return (q * torch.arange(1, n + 1).double().pow(-fall)) @ q.mT


@pytest.mark.parametrize("count", (1, 40, 120))
@pytest.mark.parametrize("fall", (1.0, 2.0))
def test_the_search_captures_what_the_best_directions_do(
    monkeypatch: pytest.MonkeyPatch, count: int, fall: float
) -> None:
    monkeypatch.setattr(eigen, "EXACT", 10)
    matrix = positive(400, fall)
    values, vectors = leading_eigenpairs(matrix.float(), count)
    assert values.shape == (count,) and vectors.shape == (400, count)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(count), rtol=0, atol=1e-4)
    best = torch.linalg.eigvalsh(matrix).flip(0)[:count].float()
    assert bool((values <= best * (1 + 1e-4) + 1e-6).all()), "Ritz values never exceed eigenvalues"
    assert float(values.sum()) > float(best.sum()) * (1 - 5e-3)
    captured = (vectors.mT @ matrix.float() @ vectors).diagonal()
    torch.testing.assert_close(captured, values, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("count", (3, 60, 90))
def test_small_matrices_and_many_pairs_are_exact(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    matrix = positive(100, 1.5)
    expected = torch.linalg.eigvalsh(matrix).flip(0)[:count]
    torch.testing.assert_close(leading_eigenpairs(matrix, count)[0], expected)
    monkeypatch.setattr(eigen, "EXACT", 10)
    if count > 50:
        torch.testing.assert_close(leading_eigenpairs(matrix, count)[0], expected)


def test_the_seed_decides_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eigen, "EXACT", 10)
    matrix = positive(200, 0.5).float()
    assert torch.equal(leading_eigenpairs(matrix, 20)[1], leading_eigenpairs(matrix, 20)[1])
    assert not torch.equal(leading_eigenpairs(matrix, 20)[1], leading_eigenpairs(matrix, 20, seed=1)[1])


@pytest.mark.parametrize("scale", (1e-30, 1.0, 1e20))
def test_single_precision_vectors_are_orthogonal_in_double(scale: float) -> None:
    matrix = torch.stack([positive(80, 2.0, seed) for seed in range(3)]) * scale
    values, vectors = single_eigh(matrix)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(80).double().expand(3, 80, 80), rtol=0, atol=1e-10)
    again = (vectors * values[:, None]) @ vectors.mT
    torch.testing.assert_close(again, matrix, rtol=0, atol=1e-6 * scale)
