"""One backward pass whose gradients give the Fisher metric of keys and values.

The labels are drawn from the model's own distribution (the true Fisher, not the empirical one:
Kunstner et al., arXiv 1905.12558), one sample a position, losses summed.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 256  # positions whose probabilities are in fp32 at once


@torch.no_grad()
def sampled_label_gradient(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of the summed negative log-likelihood of labels sampled from `logits`.

    It is softmax(logits) minus the one-hot sample, formed a few rows at a time, so that the full
    vocabulary never lives in fp32 for all positions.

    Args:
        logits: [B, T, V], any float dtype.
        generator: source of the samples, on the CPU.

    Returns:
        [B, T, V] in the dtype of `logits`.
    """
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    rows_in, rows_out = logits.flatten(0, 1), gradient.flatten(0, 1)
    for start in range(0, len(rows_in), ROWS):
        probabilities = rows_in[start : start + ROWS].float().softmax(-1)
        # Inverse-CDF sampling: one uniform number a row keeps the draw identical on every device.
        uniform = torch.rand(len(probabilities), 1, generator=generator, dtype=torch.float32)
        cumulative = probabilities.cumsum(-1)
        uniform = uniform.to(cumulative.device) * cumulative[:, -1:]
        label = torch.searchsorted(cumulative, uniform).clamp_(max=logits.shape[-1] - 1)
        probabilities.scatter_add_(1, label, torch.full_like(uniform, -1.0))
        rows_out[start : start + ROWS] = probabilities.to(logits.dtype)
    return gradient
