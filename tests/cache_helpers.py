"""How caches of baselines are fed, read and weighed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from clla.evaluate.perplexity import Subject, stream_logits

B, H, D = 2, 2, 8


def config_of(layers: int) -> LlamaConfig:
    """Only the number of layers matters."""
    return LlamaConfig(num_hidden_layers=layers)


def vectors(layers: int, count: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random keys and values [layers, 2, B, H, count, D]."""
    return torch.randn(layers, 2, B, H, count, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def feed(cache: Any, new: Tensor) -> list[tuple[Tensor, Tensor]]:
    """One forward pass with [layers, 2, B, H, T, d]; what each layer got to attend to."""
    return [cache.update(keys, values, layer) for layer, (keys, values) in enumerate(new)]


def stream(model: nn.Module, cache: Any, ids: Tensor, chunk: int) -> Tensor:
    """Log-probabilities [T, V] of one sequence [1, T]."""
    return torch.cat([log_probs for log_probs, _ in stream_logits(Subject(model, lambda: cache), ids, chunk)])
