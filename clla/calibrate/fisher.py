"""One backward pass whose gradients give the Fisher metric of keys and values.

The labels are drawn from the model's own distribution (the true Fisher, not the empirical one:
Kunstner et al., arXiv 1905.12558), one sample a position, losses summed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clla.errors import CllaError

CHUNK_BYTES = {"cpu": 2**20, "cuda": 2**28}  # of probabilities in fp32 at once: what a cache holds, or many rows
BLOCK = 128  # entries that a draw sums up first


@torch.no_grad()
def sampled_label_gradient(logits: Tensor, generator: torch.Generator, *, out: Tensor | None = None) -> Tensor:
    """Gradient of the summed negative log-likelihood of labels sampled from `logits`.

    It is softmax(logits) minus the one-hot sample, formed a few rows at a time, so that the full
    vocabulary never lives in fp32 for all positions.

    Args:
        logits: [B, T, V], any float dtype.
        generator: source of the samples, on the CPU.
        out: an earlier result to write over, if it has the shape and dtype of `logits`.

    Returns:
        [B, T, V] in the dtype of `logits`.

    Raises:
        CllaError: a logit is NaN or infinite.
    """
    if out is None or (out.shape, out.dtype, out.device) != (logits.shape, logits.dtype, logits.device):
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    rows_in, rows_out = logits.flatten(0, 1), out.flatten(0, 1)  # [N, V]
    count, rows = logits.shape[-1], rows_at_once(logits.shape[-1], logits.device)
    sums = torch.empty(len(rows_in), -(-count // BLOCK), device=logits.device)
    for start in range(0, len(rows_in), rows):
        probabilities = rows_in[start : start + rows].softmax(-1, dtype=torch.float32)
        rows_out[start : start + rows] = probabilities
        _block_sums(probabilities, out=sums[start : start + rows])
    if not sums.isfinite().all():
        raise CllaError(
            "the model's logits are NaN or infinite",
            expected="finite numbers",
            remedy="pass --dtype float32; if that does not help, the model is damaged: download it again",
        )
    # One uniform number per row, drawn on the CPU, keeps the draw identical on every device.
    uniform = torch.rand(len(rows_in), 1, generator=generator, dtype=torch.float32).to(logits.device)
    label, probability = _draw(rows_in, sums, uniform)
    every = torch.arange(len(rows_out), device=out.device)
    rows_out[every, label[:, 0]] = (probability[:, 0] - 1).to(out.dtype)
    return out


def rows_at_once(vocabulary: int, device: torch.device) -> int:
    """Positions whose probabilities are in fp32 at once."""
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * vocabulary))


def _block_sums(probabilities: Tensor, *, out: Tensor) -> None:
    """Sums [N, V/BLOCK] of neighbouring probabilities [N, V]; the last block may be shorter."""
    whole = probabilities.shape[1] // BLOCK
    torch.sum(probabilities[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)), -1, out=out[:, :whole])
    if out.shape[1] > whole:
        out[:, whole] = probabilities[:, whole * BLOCK :].sum(-1)


def _draw(logits: Tensor, sums: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A label of each row and its probability, [N, 1] each, by inverse cumulative sums: first a block, then in it.

    Args:
        logits: [N, V].
        sums: [N, V/BLOCK], probabilities of blocks.
        uniform: [N, 1], in [0, 1).
    """
    block, left = _first_beyond(sums, uniform)
    columns = block * BLOCK + torch.arange(BLOCK, device=logits.device)  # [N, BLOCK]
    inside = logits.gather(1, columns.clamp(max=logits.shape[1] - 1)).float()
    shares = inside.masked_fill_(columns >= logits.shape[1], float("-inf")).softmax(-1)  # of the block's probability
    within, _ = _first_beyond(shares, left)
    return block * BLOCK + within, shares.gather(1, within) * sums.gather(1, block)


def _first_beyond(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The first index of each row whose cumulative weight exceeds a share of the total, never of weight 0, [N, 1].

    Also how far into its weight the share reaches, from 0 to 1.
    """
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum(uniform * total, total * (1 - torch.finfo(total.dtype).eps))
    index = torch.searchsorted(cumulative, target, right=True)
    own = weights.gather(1, index)
    return index, ((target - cumulative.gather(1, index) + own) / own).clamp_(0, 1)
