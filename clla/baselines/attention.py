"""What baselines share that look at the attention: a model that tells its cache, and plain attention.

Shape legend: B sequences, H_q query heads, H key-value heads, G query heads per key-value head, T queries, S keys,
d head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from clla.modeling.hooks_clla import CACHE
from clla.modeling.observe_clla import is_observed, listening, observed


class ObservedModel(nn.Module):
    """A model whose attention goes through `attend` of its cache (see `clla.modeling.observe_clla`).

    The weights are shared with `model`, which is switched to the observed twin of its attention implementation;
    without a listening cache that changes nothing.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        own: str = model.config._attn_implementation
        if not is_observed(own):
            model.set_attn_implementation(observed(own if own in AttentionInterface() else "sdpa"))
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with listening(kwargs[CACHE]):
            return self.model(*args, **kwargs)


def grouped_logits(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Logits [B, H, G, T, S] in fp32 of queries [B, H_q, T, d] and keys [B, H, S, d], before any mask."""
    grouped = query.float().unflatten(1, (key.shape[1], -1))
    return torch.einsum("bhgtd,bhsd->bhgts", grouped, key.float()) * scaling


def causal_bias(queries: int, keys: int, device: torch.device) -> Tensor:
    """[T, S] bool: the last T keys are the queries' own tokens; everything before them may be seen."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention [B, T, H_q, d] of queries [B, H_q, T, d] over a cache [B, H, S, d] that ends with their own tokens.

    The mask is aligned with the end, so the number of past tokens may differ from layer to layer. Sequences
    without padding only.
    """
    mask = None if query.shape[2] == 1 else causal_bias(query.shape[2], key.shape[2], query.device)
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
    )
    return out.transpose(1, 2)
