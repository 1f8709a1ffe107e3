"""Which latents stay when their number is limited: those that the newest queries look at most.

The score is SnapKV's and PyramidKV's (arXiv 2404.14469, 2406.02069): attention weights of an observation window,
max-pooled over neighbouring tokens; here also averaged over the heads and layers that share a latent.

Shape legend: B sequences, H_q query heads, H key-value heads, G query heads a key-value head, T queries, S keys,
d head dim.
"""

from typing import Optional

import torch
from torch import Tensor, nn

POOL = 7  # neighbouring tokens that lend each other their score: a word is seldom one token


def grouped_logits(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Logits [B, H, G, T, S] in fp32 of queries [B, H_q, T, d] and keys [B, H, S, d], before any mask."""
    grouped = query.float().unflatten(1, (key.shape[1], -1))
    return torch.einsum("bhgtd,bhsd->bhgts", grouped, key.float()) * scaling


def attention_weights(query: Tensor, key: Tensor, scaling: float, padding: Optional[Tensor] = None) -> Tensor:
    """Softmax weights [B, H, G, T, S] in fp32 of queries [B, H_q, T, d] whose own tokens are the last of the keys.

    The first `padding` [B] keys are hidden; queries that see nothing else give no weight.
    """
    count, total = query.shape[2], key.shape[2]
    hidden = torch.ones(count, total, dtype=torch.bool, device=key.device).triu(total - count + 1)
    if padding is not None:
        hidden = hidden | (torch.arange(total, device=key.device) < padding[:, None])[:, None, None, None]
    return grouped_logits(query, key, scaling).masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)


def observed_weight(query: Tensor, key: Tensor, scaling: float, window: int, padding: Tensor) -> Tensor:
    """Weight [B, S] that the newest `window` queries give each key, summed over queries, averaged over heads.

    The first `padding` [B] keys are padding and get none.
    """
    return attention_weights(query[:, :, -window:], key, scaling, padding).mean((1, 2)).sum(1)


def best(score: Tensor, capacity: int, padding: Tensor, sinks: int) -> Tensor:
    """Indices [B, capacity] of the rows that stay, in their old order.

    Args:
        score: [B, rows], not negative.
        capacity: rows that stay, at most all.
        padding: [B] rows at the front that are padding; they go first.
        sinks: rows after the padding that always stay.
    """
    pooled = nn.functional.max_pool1d(score[:, None], POOL, stride=1, padding=POOL // 2)[:, 0]
    order = torch.arange(score.shape[1], device=score.device) - padding[:, None]
    # Of two paddings the later one stays, so that what is left of the padding is its end.
    pooled = torch.where(order < 0, order.to(pooled.dtype), pooled)
    pooled = torch.where((order >= 0) & (order < sinks), float("inf"), pooled)
    # Neighbours share their pooled score: the row's own one decides between them, then age.
    own = score.argsort(dim=1, descending=True, stable=True)
    rank = own.gather(1, pooled.gather(1, own).argsort(dim=1, descending=True, stable=True))
    return rank[:, :capacity].sort(dim=1).values
