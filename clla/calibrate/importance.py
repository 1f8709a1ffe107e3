"""How much an error in one token costs, compared with other tokens.

Errors of different tokens do not cost the same: in SmolLM2's first layers 1 % of the tokens carry half of the
gradients' energy. The loss E[(gᵀe)²] of errors e is split into a factor of tokens and one of directions: with weights w
of mean 1, moments are E[w y yᵀ] and the metric is E[g gᵀ/w]. Weights are w_t = Σ_l g_ltᵀ (F_l + εI)⁻¹ g_lt / E[…], the
same in all layers, so that one latent of several layers means the same for each of them. F_l is the metric of the first
batches alone: weights then do not depend on the order of the others, nor on who reads them.

Shape legend: N tokens, L layers, n values per token and layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RIDGE = 0.1  # of the metric, relative to its mean eigenvalue
LEAST = 1e-3  # weight of a token, relative to the mean
WARM_UP = 4096  # tokens whose gradients make F


class Importance:
    """Weights of tokens.

    Args:
        metrics: F_l [n, n] of each layer, fp32 or better.
    """

    def __init__(self, metrics: Sequence[Tensor]) -> None:
        self._roots, self._expected = [], []
        for metric in metrics:
            eye = torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
            mean = metric.diagonal().mean()
            root = torch.linalg.cholesky(metric + RIDGE * (mean if mean > 0 else 1.0) * eye)
            self._roots.append(root.float())
            # E[gᵀ (F + εI)⁻¹ g] = tr((F + εI)⁻¹ F)
            self._expected.append(float(torch.cholesky_solve(metric, root).diagonal().sum()) or 1.0)

    def share(self, layer: int, gradients: Tensor) -> Tensor:
        """What one layer adds to the weights, [N], of mean about 1, from gradients [N, n]."""
        root = self._roots[layer].to(gradients.device)
        whitened = torch.linalg.solve_triangular(root, gradients.float().mT, upper=False)  # [n, N]
        return whitened.square().sum(0) / self._expected[layer]

    def weights(self, gradients: Sequence[Tensor]) -> Tensor:
        """w [N], of mean about 1, from the gradients [N, n] of all layers."""
        total = torch.stack([self.share(layer, rows).to(gradients[0].device) for layer, rows in enumerate(gradients)])
        return self.settled(total.mean(0))

    @staticmethod
    def settled(weights: Tensor) -> Tensor:
        """Weights none of which is too small."""
        return weights.clamp_min(LEAST)


def warm_up_batches(batches: Sequence[Tensor]) -> int:
    """How many of the first batches [B, T] make F."""
    tokens = 0
    for number, batch in enumerate(batches):
        if (tokens := tokens + batch.numel()) >= WARM_UP:
            return number + 1
    return len(batches)
