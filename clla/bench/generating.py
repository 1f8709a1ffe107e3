"""How fast `model.generate` writes, which is what users call: from the times at which a streamer gets each token."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from clla.bench.speed import Contender, attempt


@dataclass(frozen=True)
class Generated:
    """Attributes: tokens_per_s: from the median gap between two tokens; first_token: seconds from the call, median."""

    tokens_per_s: float
    first_token: float


class Stamps(BaseStreamer):
    """Notes when the prompt and each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:  # on the CPU already, so the device is done with it
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate_speed(
    contenders: dict[str, Contender],
    ids: Tensor,
    *,
    new_tokens: int,
    repeats: int,
    on_pass: Callable[[int], None] = lambda _: None,
) -> dict[str, Generated | None]:
    """Let models write in turn after the same prompt, greedily, on over any end-of-text token.

    Args:
        contenders: by name.
        ids: [B, T], prompts, which each model prefills as `generate` does it: the source in one pass.
        new_tokens: N, at least 2.
        repeats: calls of each.
        on_pass: called with 1 after each call.

    Returns:
        Figures by name; None for a model that runs out of memory.
    """
    stamps: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for repeat in range(repeats):
        for name in contenders if repeat % 2 == 0 else reversed(contenders):
            times = attempt(partial(_stamps, contenders[name], ids, new_tokens), ids.device)
            stamps[name] += [times] if times is not None else []
            on_pass(1)
    return {name: _generated(runs, len(ids)) if runs else None for name, runs in stamps.items()}


@torch.inference_mode()
def _stamps(contender: Contender, ids: Tensor, new_tokens: int) -> list[float]:
    """Times of the prompt and of N tokens."""
    streamer, model = Stamps(), contender.model
    generate: Any = model.generate
    generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        streamer=streamer,
        **contender.generate_options(ids.shape[1] + new_tokens),
    )
    assert len(streamer.times) == 1 + new_tokens, "a streamer gets the prompt and every token"
    return streamer.times


def _generated(runs: list[list[float]], batch: int) -> Generated:
    gaps = [after - before for times in runs for before, after in pairwise(times[1:])]
    return Generated(batch / statistics.median(gaps), statistics.median(times[1] - times[0] for times in runs))
