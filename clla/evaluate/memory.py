"""Measured bytes of caches at given context lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from clla.evaluate.perplexity import Subject
from clla.modeling.hooks_clla import CACHE


@torch.no_grad()
def measured_bytes(subject: Subject, contexts: list[int], *, chunk: int, device: torch.device) -> dict[int, int]:
    """Fill a cache to each context length and count what it holds.

    Args:
        subject: model and cache.
        contexts: tokens, any order.
        chunk: tokens per forward pass.
        device: of the model.

    Returns:
        Bytes of one sequence's cache by context length.
    """
    cache, filled, found = subject.new_cache(), 0, {}
    for context in sorted(set(contexts)):
        while filled < context:
            count = min(chunk, context - filled)
            ids: Tensor = torch.full((1, count), 1, device=device)
            positions = torch.arange(filled, filled + count, device=device)[None]
            subject.model(input_ids=ids, position_ids=positions, use_cache=True, logits_to_keep=1, **{CACHE: cache})
            filled += count
        found[context] = cache.nbytes
    return found
