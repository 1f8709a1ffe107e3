"""How much an error in one token costs, compared with other tokens.

Errors of different tokens do not cost the same: in SmolLM2's first layers 1 % of the tokens carry half of the
gradients' energy. The loss E[(gᵀe)²] of errors e is split into a factor of tokens and one of directions: with weights w
of mean 1, moments are E[w y yᵀ] and the metric is E[g gᵀ/w]. Weights are w_t = Σ_l g_ltᵀ (F_l + εI)⁻¹ g_lt / E[…], the
same in all layers, so that one latent of several layers means the same for each of them. F_l = E[g gᵀ] is that of all
tokens read so far, among them those that are weighted: without them F says too little of rare directions, and tokens
that have these would count too much. Tokens are therefore weighted a portion at a time.

Shape legend: N tokens, L layers, n values per token and layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from accelerate.utils import reduce
from torch import Tensor

from clla.calibrate.moments import folded_product

RIDGE = 0.1  # of the metric, relative to its mean eigenvalue
LEAST = 1e-3  # weight of a token, relative to the mean
PORTION = 16_384  # tokens that are held until they are weighted


class Importance:
    """Weights of tokens by their gradients.

    Args:
        layers: L.
        values: n.
        talk: device that processes of `torch.distributed`, each with its own tokens, talk through; None if alone.
    """

    def __init__(self, layers: int, values: int, talk: torch.device | None = None) -> None:
        self._products = torch.zeros(layers, values, values, dtype=torch.float64)
        self._count, self._talk = 0, talk
        self._roots: list[Tensor] = []
        self._expected: list[float] = []

    def learn(self, portion: Sequence[Sequence[Tensor]], device: torch.device) -> None:
        """Add tokens, one list of batches of gradients [N, n] per layer, to F, with products on a device."""
        self._count += int(self._everywhere(torch.tensor(sum(len(rows) for rows in portion[0]))))
        self._roots, self._expected = [], []
        for layer, batches in enumerate(portion):
            added = torch.zeros_like(self._products[layer])
            if batches:
                there = (rows.to(device) for rows in batches)
                added = folded_product((rows, rows) for rows in there).cpu()
            self._products[layer] += self._everywhere(added)
            metric = self._products[layer] / self._count
            mean = float(metric.diagonal().mean()) or 1.0
            root = torch.linalg.cholesky(metric + RIDGE * mean * torch.eye(len(metric), dtype=metric.dtype))
            self._roots.append(root.float())
            # E[gᵀ (F + εI)⁻¹ g] = tr((F + εI)⁻¹ F)
            self._expected.append(float(torch.cholesky_solve(metric, root).diagonal().sum()) or 1.0)

    def _everywhere(self, value: Tensor) -> Tensor:
        return value if self._talk is None else reduce(value.to(self._talk), reduction="sum").cpu()

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


def portions(batches: Sequence[Tensor]) -> Iterator[range]:
    """Which batches [B, T] are weighted at once: as many as `PORTION` tokens take."""
    first = tokens = 0
    for number, batch in enumerate(batches):
        tokens += batch.numel()
        if tokens >= PORTION or number == len(batches) - 1:
            yield range(first, number + 1)
            first, tokens = number + 1, 0
