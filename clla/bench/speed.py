"""How fast models prefill and decode, and what memory they take: the same random tokens, side by side.

A pass fills an empty cache with a context and then decodes tokens one at a time, through plain forward calls. Which
tokens are decoded is given beforehand, so sampling costs nothing; `generate` is timed apart (`generating.py`). Each
model prefills as `generate` would have it do, the source in one call, so that its speed is the user's; the memory
that prefilling takes is therefore told apart from that of decoding.

Source and converted model take turns, in changing order, so noise hits both alike. The first pass of each warms up and
is the one whose memory is watched; it is not timed. On a GPU a clock is only read when the device is done.

Shape legend: B sequences, T tokens of context, N decoded tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from clla.bench.peak import Peak, release, watch_peak
from clla.modeling.hooks_clla import CACHE

T = TypeVar("T")
OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "can't allocate memory")  # of CUDA, cuBLAS and the CPU


@dataclass(frozen=True)
class Contender:
    """A model with a way to make its cache.

    Attributes:
        model: called with input_ids and a cache.
        new_cache: an empty cache for one batch, given how many tokens it will see.
        chunk: tokens per call of the prefill; None for all at once.
        generate_options: given to `generate` beside the prompt, for the same number of tokens.
    """

    model: nn.Module
    new_cache: Callable[[int], Any]
    chunk: int | None = None
    generate_options: Callable[[int], dict[str, Any]] = lambda length: {}


@dataclass(frozen=True)
class Work:
    """What a pass does.

    Attributes:
        context: T, tokens in the cache before the first is decoded.
        new_tokens: N.
        copies: the prefilled sequences are repeated so often before they decode.
    """

    context: int
    new_tokens: int
    copies: int = 1


@dataclass(frozen=True)
class Pass:
    """Attributes: prefill: seconds; steps: seconds of each decoded token; cache_bytes: of T; final_bytes: of T + N."""

    prefill: float
    steps: list[float]
    cache_bytes: int
    final_bytes: int


@dataclass(frozen=True)
class Speed:
    """What was measured of one model, all sequences of the batch together.

    Attributes:
        cache_bytes: of the cache that holds the context.
        prefill_peak_bytes: highest memory above the weights while the context is read.
        decode_peak_bytes: while tokens are decoded, the cache included.
        prefill_tokens_per_s: from the median pass.
        decode_tokens_per_s: from the median step.
        decode_mean_tokens_per_s: from the mean, in which steps that do more than others (a compressed cache encodes
            a block now and then) weigh what they weigh.
        decode_by_repeat: from the median step of each pass, which shows the noise.
        longest_gap: seconds between two samples of the memory; 0 where it is counted.
    """

    cache_bytes: int
    prefill_peak_bytes: int
    decode_peak_bytes: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_mean_tokens_per_s: float
    decode_by_repeat: list[float]
    longest_gap: float


def draw_ids(shape: tuple[int, int], *, vocab_size: int, left_out: set[int], seed: int, device: torch.device) -> Tensor:
    """Random token ids [B, T].

    Args:
        shape: B, T.
        vocab_size: ids are below it.
        left_out: padding and other special ids.
        seed: fixes them.
        device: where they go.
    """
    allowed = torch.tensor([i for i in range(vocab_size) if i not in left_out])
    generator = torch.Generator().manual_seed(seed)
    return allowed[torch.randint(len(allowed), shape, generator=generator)].to(device)


@torch.inference_mode()
def run_pass(contender: Contender, ids: Tensor, work: Work, on_filled: Callable[[], None] = lambda: None) -> Pass:
    """Fill a cache and decode.

    Args:
        contender: model and cache.
        ids: [B, T + N].
        work: T, N, and how often the B sequences are repeated.
        on_filled: called between the two.
    """
    total = work.context + work.new_tokens
    cache = contender.new_cache(total)
    start = _now(ids.device)
    chunk = contender.chunk or work.context
    for first in range(0, work.context, chunk):
        _forward(contender, ids, cache, first, min(first + chunk, work.context))
    prefill = _now(ids.device) - start
    on_filled()
    if work.copies > 1:
        cache.batch_repeat_interleave(work.copies)
        ids = ids.repeat_interleave(work.copies, dim=0)
    cache_bytes, steps = cache.nbytes, []
    for at in range(work.context, total):
        start = _now(ids.device)
        _forward(contender, ids, cache, at, at + 1)
        steps.append(_now(ids.device) - start)
    return Pass(prefill, steps, cache_bytes, cache.nbytes)


def measure(
    contenders: dict[str, Contender],
    ids: Tensor,
    work: Work,
    *,
    repeats: int,
    on_pass: Callable[[int], None] = lambda _: None,
) -> dict[str, Speed | None]:
    """Run models in turn over the same tokens.

    Args:
        contenders: by name.
        ids: [B, T + N].
        work: a pass.
        repeats: timed passes of each.
        on_pass: called with 1 after each pass.

    Returns:
        Figures by name; None for a model that runs out of memory.
    """
    watched: dict[str, tuple[Pass, Peak] | None] = {}
    for name, contender in contenders.items():
        watched[name] = attempt(partial(_watched_pass, contender, ids, work), ids.device)
        on_pass(1)
    timed: dict[str, list[Pass]] = {name: [] for name in contenders}
    for repeat in range(repeats):
        names = [name for name in contenders if watched[name] is not None]
        for name in names if repeat % 2 == 0 else reversed(names):
            done = attempt(partial(run_pass, contenders[name], ids, work), ids.device)
            timed[name] += [done] if done is not None else []
            on_pass(1)
    found: dict[str, Speed | None] = {}
    for name, passes in timed.items():
        first = watched[name]
        found[name] = _speed(first[0], first[1], passes, len(ids), work) if first and passes else None
    return found


def attempt(work: Callable[[], T], device: torch.device) -> T | None:
    """What the work gives, or None if there is no memory for it, which is then released."""
    try:
        return work()
    except RuntimeError as error:  # torch.OutOfMemoryError is one, cuBLAS and the CPU have theirs
        if not any(mark in str(error) for mark in OUT_OF_MEMORY):
            raise
    release(device)  # only here, since the error holds the frames, and they the tensors
    return None


def decode_rate(passes: Sequence[Pass], batch: int) -> float:
    """Tokens per second of `batch` sequences, from the median step of all passes."""
    return batch / statistics.median(step for done in passes for step in done.steps)


def _watched_pass(contender: Contender, ids: Tensor, work: Work) -> tuple[Pass, Peak]:
    with watch_peak(ids.device) as peak:
        done = run_pass(contender, ids, work, on_filled=peak.lap)
    return done, peak


def _speed(watched: Pass, peak: Peak, passes: list[Pass], batch: int, work: Work) -> Speed:
    return Speed(
        cache_bytes=watched.cache_bytes,
        prefill_peak_bytes=peak.laps[0],
        decode_peak_bytes=peak.laps[1],
        prefill_tokens_per_s=batch * work.context / statistics.median(done.prefill for done in passes),
        decode_tokens_per_s=decode_rate(passes, batch),
        decode_mean_tokens_per_s=batch / statistics.mean(step for done in passes for step in done.steps),
        decode_by_repeat=[decode_rate([done], batch) for done in passes],
        longest_gap=peak.longest_gap,
    )


def _forward(contender: Contender, ids: Tensor, cache: Any, first: int, stop: int) -> None:
    """Tokens [first, stop) of ids, with a mask that hides nothing."""
    positions = torch.arange(first, stop, device=ids.device).expand(len(ids), -1)
    contender.model(
        input_ids=ids[:, first:stop],
        attention_mask=torch.ones(len(ids), stop, dtype=torch.long, device=ids.device),
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
        **{CACHE: cache},
    )


def _now(device: torch.device) -> float:
    """Seconds of a clock, when the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
