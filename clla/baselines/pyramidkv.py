"""PyramidKV (arXiv 2406.02069, https://arxiv.org/abs/2406.02069): lower layers keep more tokens than upper ones.

In every head the newest tokens stay, and of the older ones those that the newest attend to most. With the same
budget in every layer this is SnapKV (arXiv 2404.14469).

Against the paper: it evicts once, after the prompt. A stream has no prompt, so eviction is repeated whenever
`block` tokens have gathered over the budget, and a text within the capacity may lose tokens in the upper layers.
The state therefore depends on the chunks, as the method asks the newest queries at the moment of eviction.

Shape legend: B sequences, H_q query heads, H key-value heads, W window, S keys held, N kept, d head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clla.baselines.attending import AttendingCache, AttendingLayer
from clla.baselines.attention import causal_attention, causal_bias, grouped_logits
from clla.baselines.settings import check_at_least
from clla.errors import UsageError
from clla.source.families import split_layers

BETA = 20  # the paper's: how much smaller than the average the top layer's budget is


def layer_budgets(capacity: int, window: int, num_layers: int, prompt: float = math.inf) -> list[int]:
    """Older tokens that each layer keeps, from bottom to top; the window comes on top.

    Steps are rounded down as in the authors' code, so the average is a little over capacity - window.

    Args:
        prompt: tokens there are; no layer is given more than that.
    """
    average, there = capacity - window, prompt - window
    if there <= average or num_layers == 1:
        return [int(min(average, there))] * num_layers
    low = average // BETA
    high = 2 * average - low
    if high >= there:
        high = int(there)
        low = 2 * average - high
    step = (high - low) // (num_layers - 1)
    return [high - i * step for i in range(num_layers)]


def window_scores(query: Tensor, key: Tensor, scaling: float, kernel: int) -> Tensor:
    """[B, H, S - W]: attention of the newest tokens to the older ones, the largest of `kernel` neighbours.

    Args:
        query: [B, H_q, W, d] of the newest tokens; averaged over the window and the query heads of a key-value head.
        key: [B, H, S, d], ends with the window's own. Neighbours are those still held, whatever lay between them.
    """
    window = query.shape[2]
    hidden = ~causal_bias(window, key.shape[2], key.device)
    weights = grouped_logits(query, key, scaling).masked_fill(hidden, float("-inf")).softmax(-1)
    return nn.functional.max_pool1d(weights[..., :-window].mean((2, 3)), kernel, stride=1, padding=kernel // 2)


def kept_tokens(scores: Tensor, budget: int, window: int) -> Tensor:
    """Indices [B, H, N] in order of time: the `budget` best of scores [B, H, S - W], and the window after them."""
    older = scores.shape[-1]
    best = scores.topk(budget, -1).indices.sort(-1).values
    newest = torch.arange(older, older + window, device=scores.device).expand(*scores.shape[:2], window)
    return torch.cat((best, newest), -1)


class PyramidKvLayer(AttendingLayer):
    """Keys (after RoPE, at their own positions) and values of the tokens kept, each head its own choice."""

    def __init__(self, budget: int, window: int, kernel: int, block: int) -> None:
        super().__init__()
        self.budget, self.window, self.kernel, self.block = budget, window, kernel, block
        self.queries: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, plain: Callable[[], Tensor]) -> Tensor:
        out = causal_attention(query, key, value, scaling)
        newest = query if self.queries is None else torch.cat((self.queries, query), 2)
        self.queries = newest[:, :, -self.window :].clone()  # a view would keep the whole chunk
        if key.shape[2] >= self.budget + self.window + self.block:
            scores = window_scores(self.queries, key, scaling, self.kernel)
            kept = kept_tokens(scores, self.budget, self.window)[..., None]
            self.keys = key.take_along_dim(kept, 2)
            self.values = value.take_along_dim(kept, 2)
        return out


class PyramidKvCache(AttendingCache):
    """At most budget + window + block - 1 tokens per layer between forward passes. For `ObservedModel`.

    Args:
        config: the model's text config.
        capacity: average tokens per layer, window included.
        window: newest tokens, kept, whose attention selects the others.
        kernel: neighbours that share the highest score, odd.
        pyramid: budgets fall from the bottom layer to the top; without, they are equal (SnapKV).
        block: tokens over the budget that make an eviction worth its time.

    Raises:
        UsageError: settings that leave nothing to select.
    """

    def __init__(
        self,
        config: Any,
        *,
        capacity: int,
        window: int = 8,
        kernel: int = 7,
        pyramid: bool = True,
        block: int = 16,
    ) -> None:
        check_at_least(1, window=window, kernel=kernel, block=block)
        check_at_least(window + 1, capacity=capacity)
        if kernel % 2 == 0:
            raise UsageError(f"kernel is {kernel}", expected="an odd number", remedy=f"use {kernel + 1}")
        num_layers = len(split_layers(config)[0])
        budgets = layer_budgets(capacity, window, num_layers) if pyramid else [capacity - window] * num_layers
        super().__init__(config, lambda number: PyramidKvLayer(budgets[number], window, kernel, block))
