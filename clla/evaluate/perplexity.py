"""Perplexity and KL, streamed as at inference: chunk by chunk through a cache that is really kept.

Shape legend: N samples, T tokens per sample, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clla.modeling.hooks_clla import CACHE


@dataclass(frozen=True)
class Subject:
    """A model with a way to make its cache.

    Attributes:
        model: called with input_ids and a cache.
        new_cache: an empty cache for one batch.
    """

    model: nn.Module
    new_cache: Callable[[], Any]


@dataclass(frozen=True)
class Quality:
    """Attributes: perplexity; kl: mean KL to the reference in nats per token; nbytes: of the last sample's cache."""

    perplexity: float
    kl: float
    nbytes: int


@torch.no_grad()
def stream_logits(subject: Subject, input_ids: Tensor, chunk: int) -> Iterator[tuple[Tensor, Any]]:
    """Log-probabilities [chunk, V] (fp32) of one sequence [1, T], chunk by chunk, and the cache after each."""
    cache = subject.new_cache()
    for start in range(0, input_ids.shape[1], chunk):
        part = input_ids[:, start : start + chunk]
        position_ids = torch.arange(start, start + part.shape[1], device=part.device)[None]
        output = subject.model(input_ids=part, position_ids=position_ids, use_cache=True, **{CACHE: cache})
        yield output.logits[0].float().log_softmax(-1), cache


def compare(
    subjects: dict[str, Subject],
    samples: Tensor,
    *,
    chunk: int,
    on_sample: Callable[[int], None] = lambda _: None,
) -> dict[str, Quality]:
    """Run subjects side by side over the same text.

    Args:
        subjects: by name; the first is the reference of the KL.
        samples: [N, T] token ids, each sample from an empty cache.
        chunk: tokens per forward pass.
        on_sample: called with 1 after each sample.
    """
    names = list(subjects)
    nll, kl, nbytes = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    for row in samples:
        ids = row[None]
        streams = [stream_logits(subjects[name], ids, chunk) for name in names]
        for start, steps in zip(range(0, ids.shape[1], chunk), zip(*streams, strict=True), strict=True):
            targets = row[start + 1 : start + 1 + chunk]  # the sample's last token has none
            reference = steps[0][0][: len(targets)]
            for name, (log_probs, cache) in zip(names, steps, strict=True):
                log_probs = log_probs[: len(targets)]
                nll[name] -= float(log_probs.gather(1, targets[:, None]).double().sum())
                if name != names[0]:
                    kl[name] += float((reference.exp() * (reference - log_probs)).sum(-1).double().sum())
                nbytes[name] = cache.nbytes
        on_sample(1)
    count = len(samples) * (samples.shape[1] - 1)
    return {name: Quality(math.exp(nll[name] / count), kl[name] / count, nbytes[name]) for name in names}
