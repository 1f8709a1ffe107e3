"""Measured bytes of caches at given context lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from clla.evaluate.perplexity import Subject
from clla.modeling.hooks_clla import CACHE


@torch.no_grad()
def measured_bytes(
    subject: Subject, contexts: list[int], *, chunk: int, device: torch.device, text: Tensor | None = None
) -> dict[int, int]:
    """Fill a cache to each context length and count what it holds.

    Args:
        subject: model and cache.
        contexts: tokens, any order.
        chunk: tokens per forward pass.
        device: of the model.
        text: [T] tokens to fill it with, again from the start where they are too few; None for the same one, which will
            do for caches whose size does not depend on what they hold.

    Returns:
        Bytes of one sequence's cache by context length.
    """
    cache, filled, found = subject.new_cache(), 0, {}
    for context in sorted(set(contexts)):
        while filled < context:
            count = min(chunk, context - filled)
            positions = torch.arange(filled, filled + count, device=device)[None]
            ids = torch.ones_like(positions) if text is None else text.to(device)[positions % len(text)]
            subject.model(input_ids=ids, position_ids=positions, use_cache=True, logits_to_keep=1, **{CACHE: cache})
            filled += count
        found[context] = cache.nbytes
    return found
