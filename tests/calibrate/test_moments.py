"""Streaming moments against batch formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clla.calibrate.moments import BandedMoments

L, N = 4, 301


def correlated(dim: int, *, seed: int = 0, offset: float = 0.0, tokens: int = N) -> Tensor:
    """[L, tokens, dim], neighbouring layers correlated, with a mean of its own in every channel."""
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.randn(tokens, dim, generator=generator)]
    for _ in range(L - 1):
        layers.append(0.7 * layers[-1].roll(1, dims=1) + 0.5 * torch.randn(tokens, dim, generator=generator))
    return torch.stack(layers) + offset * torch.randn(L, 1, dim, generator=generator)


def fed(left: Tensor, sizes: list[int], *, band: int, right: Tensor | None = None) -> BandedMoments:
    moments = BandedMoments(L, left.shape[2], band=band, right_dim=None if right is None else right.shape[2])
    start = 0
    for size in sizes:
        stop = start + size
        moments.add(left[:, start:stop], None if right is None else right[:, start:stop])
        start = stop
    assert start == left.shape[1]
    return moments


def batch_covariance(a: Tensor, b: Tensor) -> Tensor:
    """[n_a, n_b] from torch.cov of the joined channels, in fp64."""
    joint = torch.cov(torch.cat((a, b), dim=1).double().mT, correction=0)
    return joint[: a.shape[1], a.shape[1] :]


@pytest.mark.parametrize("sizes", [[301], [1, 300], [100, 100, 101], [7] * 43, [300, 1]], ids=len)
def test_streaming_equals_batch(sizes: list[int]) -> None:
    x = correlated(6, offset=2.0)
    moments = fed(x, sizes, band=3)
    assert moments.count == N
    torch.testing.assert_close(moments.mean(), x.double().mean(1).float(), rtol=1e-5, atol=1e-6)
    covariance = moments.covariance()
    assert covariance.dtype == torch.float32 and covariance.shape == (L, 3, 6, 6)
    for layer in range(L):
        for j in range(3):
            if layer + j < L:
                expected = batch_covariance(x[layer], x[layer + j]).float()
                torch.testing.assert_close(covariance[layer, j], expected, rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_any_split_gives_the_same_moments(sizes: list[int], seed: int) -> None:
    x = correlated(3, seed=seed, offset=1.0, tokens=sum(sizes))
    split, whole = fed(x, sizes, band=2), fed(x, [sum(sizes)], band=2)
    torch.testing.assert_close(split.mean(), whole.mean(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(split.covariance(), whole.covariance(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(split.second_moment(), whole.second_moment(), rtol=1e-4, atol=1e-4)


def test_a_large_offset_does_not_cancel() -> None:
    """E[xx] - E[x]E[x] in fp32 would be wrong by several units here."""
    x = correlated(5) + 3000.0
    covariance = fed(x, [50] * 6 + [1], band=1).covariance()
    for layer in range(L):
        expected = batch_covariance(x[layer], x[layer]).float()
        torch.testing.assert_close(covariance[layer, 0], expected, rtol=1e-3, atol=1e-3)


def test_pairs_beyond_the_last_layer_are_zero() -> None:
    covariance = fed(correlated(3), [N], band=6).covariance()
    for layer in range(L):
        for j in range(6):
            beyond = layer + j >= L
            assert bool((covariance[layer, j] == 0).all()) == beyond


def test_second_moment_is_around_zero() -> None:
    x = correlated(4, offset=3.0)
    moments = fed(x, [200, 101], band=2).second_moment()
    for layer in range(L):
        for j in range(2):
            expected = torch.zeros(4, 4)
            if layer + j < L:
                expected = (x[layer].double().mT @ x[layer + j].double() / N).float()
            torch.testing.assert_close(moments[layer, j], expected, rtol=1e-4, atol=1e-4)


def test_left_and_right_may_differ_in_width() -> None:
    x, y = correlated(5, offset=1.0), correlated(3, seed=1, offset=4.0)
    y[..., 0] += x.roll(-1, 0)[..., 2]
    moments = fed(x, [100, 201], band=2, right=y)
    covariance, second = moments.covariance(), moments.second_moment()
    assert covariance.shape == (L, 2, 5, 3)
    torch.testing.assert_close(moments.mean(), x.double().mean(1).float(), rtol=1e-5, atol=1e-6)
    for layer in range(L):
        for j in range(2):
            if layer + j < L:
                a, b = x[layer], y[layer + j]
                torch.testing.assert_close(covariance[layer, j], batch_covariance(a, b).float(), rtol=1e-4, atol=1e-5)
                expected = (a.double().mT @ b.double() / N).float()
                torch.testing.assert_close(second[layer, j], expected, rtol=1e-4, atol=1e-4)
    assert float(covariance[0, 0].abs().max()) > 0.1


def test_half_precision_data_is_accumulated_in_full_precision() -> None:
    x = correlated(4).bfloat16()
    moments = fed(x, [N], band=1)
    expected = batch_covariance(x[2], x[2]).float()
    torch.testing.assert_close(moments.covariance()[2, 0], expected, rtol=1e-4, atol=1e-5)
