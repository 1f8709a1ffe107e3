"""Stats of random data whose every token is known, so that formulas can be checked against samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clla.artifacts.plan import KVShape
from clla.artifacts.stats import Stats


@dataclass(frozen=True)
class Sampled:
    """Stats and the tokens that they come from: x [L, N, h], y [L, N, n], g [L, N, n], all fp64."""

    stats: Stats
    x: Tensor
    y: Tensor
    g: Tensor
    projections: Tensor  # [L, h, n], y = x W + bias + noise


def sampled(
    *,
    num_layers: int = 3,
    head_dim: int = 4,
    hidden: int = 12,
    band: int | None = None,
    tokens: int = 3000,
    noise: float = 0.3,
    seed: int = 0,
) -> Sampled:
    """Layers of a residual stream with keys and values read from it; one key-value head.

    Args:
        num_layers: L.
        head_dim: d; n = 2·d.
        hidden: h.
        band: K; default L.
        tokens: N.
        noise: of keys and values, beside what the input explains.
        seed: of everything.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, band = 2 * head_dim, band or num_layers
    stream = normal(tokens, hidden) @ torch.diag(torch.logspace(0.5, -0.7, hidden, dtype=torch.float64))
    inputs = []
    for _ in range(num_layers):
        stream = stream + 0.3 * normal(tokens, hidden)
        inputs.append(stream + 2 * normal(hidden))
    x = torch.stack(inputs)
    common = normal(hidden, n)
    projections = common + 0.4 * normal(num_layers, hidden, n)
    y = x @ projections + 3 * normal(num_layers, 1, n) + noise * normal(num_layers, tokens, n)
    scales = torch.logspace(0, -2, n, dtype=torch.float64)
    g = torch.stack([(normal(tokens, n) * scales) @ normal(n, n) for _ in range(num_layers)])
    centred_x, centred_y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    covariance = torch.zeros(num_layers, band, n, n, dtype=torch.float64)
    cross = torch.zeros(num_layers, band, hidden, n, dtype=torch.float64)
    for a in range(num_layers):
        for j in range(min(band, num_layers - a)):
            covariance[a, j] = centred_y[a].mT @ centred_y[a + j] / tokens
            cross[a, j] = centred_x[a].mT @ centred_y[a + j] / tokens
    stats = Stats(
        layers=tuple(range(num_layers)),
        kv=KVShape(1, head_dim),
        tokens=tokens,
        mean=y.mean(1).float(),
        covariance=covariance.float(),
        fisher=(g.mT @ g / tokens).float(),
        made_from="random",
        input_mean=x.mean(1).float(),
        input_covariance=(centred_x.mT @ centred_x / tokens).float(),
        input_cross=cross.float(),
    )
    return Sampled(stats, x, y, g, projections)
