"""Attention of layers that have a sliding window of their own: exact keys and values, as the source computes it.

The engine's own would do, if all kernels could read pages that lie beside those of latents in one block.

Shape legend: T tokens, S sequences, H key-value heads of this rank, d head dim, E tokens in reach.
"""

from __future__ import annotations

from torch import Tensor, nn

from clla.serving.batching import Side, sides
from clla.serving.pages import Batch, Pages, read_exact

FEW = 8  # sequences of more new tokens are computed one after the other
MOST_TOKENS = 1 << 18  # that are read at once of several sequences


def attend_sliding(query: Tensor, exact: Pages, window: int, scaling: float, output: Tensor) -> None:
    """Attention of a step's new tokens to the `window` newest tokens, themselves among them.

    Args:
        query: [T, H_q, d] after RoPE.
        exact: the layer's batch and pages [P, H, b, 2d], with the new tokens in them.
        window: of the layer.
        scaling: of the logits.
        output: [T, H_q, d] that is written.
    """
    batch, pages = exact
    for side, slots, seen in _reach(batch, window, pages.shape[2]):
        keys, values = read_exact(pages, slots).to(query.dtype).chunk(2, dim=1)  # [S, H, E, d]
        out = nn.functional.scaled_dot_product_attention(
            query[side.queries].transpose(1, 2),
            keys,
            values,
            attn_mask=seen[:, None],
            scale=scaling,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
        output[side.queries] = out.transpose(1, 2).to(output.dtype)


def _reach(batch: Batch, window: int, size: int) -> list[tuple[Side, Tensor, Tensor]]:
    """Sequences side by side, slots [S, E] of what they read, and what of it each new token sees, [S, T, E]."""
    key = ("sliding", window)
    if key not in batch.memo:  # for all layers whose pages are in the same blocks
        reach = [min(total, count + window - 1) for total, count in zip(batch.lengths, batch.counts, strict=False)]
        beyond = [total - near for total, near in zip(batch.lengths, reach, strict=False)]
        found = sides(beyond, batch, FEW, MOST_TOKENS, None, reach)
        batch.memo[key] = [(side, *side.exact(batch, 0, size, window)) for side in found]
    kept: list[tuple[Side, Tensor, Tensor]] = batch.memo[key]
    return kept
