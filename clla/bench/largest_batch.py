"""The largest batch that decodes at a context, and how fast it does.

Sequences are prefilled one at a time in a server, so here one is, and its cache is repeated; then all copies decode
together. On a GPU a batch fits if that does not run out of memory: doubling finds one that does not, bisection
the largest that does. On a CPU, where memory is shared and swapped, a limit is given, and as many sequences fit
as their caches, measured, take at most that number of bytes; weights and working memory are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from clla.bench.peak import release
from clla.bench.speed import Contender, Pass, Work, attempt, decode_rate, run_pass

MOST = 4096  # sequences that are tried
PROBE_TOKENS = 2  # decoded to see whether a batch fits; timing decodes all
STEP_DOWN = 32  # a batch that fits the probe but not the timing is lowered by this part of it


@dataclass(frozen=True)
class Largest:
    """Attributes: batch: sequences, 0 if not even one fits; decode_tokens_per_s: of all, 0 then; cache_bytes: of all
    when the last token is decoded."""

    batch: int
    decode_tokens_per_s: float
    cache_bytes: int


def largest(fits: Callable[[int], bool], most: int = MOST) -> int:
    """The largest number up to `most` that fits, by doubling and bisection; 0 if 1 does not."""
    good, bad = 0, 1
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def largest_batches(
    contenders: dict[str, Contender],
    ids: Tensor,
    work: Work,
    *,
    repeats: int,
    memory_limit: int | None = None,
    on_pass: Callable[[int], None] = lambda _: None,
) -> dict[str, Largest]:
    """The largest batch of each model, and its speed, the models in turn.

    Args:
        contenders: by name.
        ids: [1, T + N].
        work: a pass of one sequence.
        repeats: timed passes of each.
        memory_limit: bytes for the caches alone; None to find out by running, on a GPU.
        on_pass: called with 1 after each timed pass.
    """
    batches: dict[str, int] = {}
    for name, contender in contenders.items():
        if memory_limit is None:
            batches[name] = _by_running(contender, ids, work)
        else:
            batches[name] = min(MOST, memory_limit // run_pass(contender, ids, work).final_bytes)
    passes: dict[str, list[Pass]] = {name: [] for name in contenders}
    for repeat in range(repeats):
        names = [name for name in contenders if batches[name]]
        for name in names if repeat % 2 == 0 else reversed(names):
            done = _decode(contenders[name], ids, replace(work, copies=batches[name]))
            passes[name] += [done] if done is not None else []
            on_pass(1)
    return {
        name: Largest(batches[name], decode_rate(done, batches[name]), done[0].final_bytes)
        if done
        else Largest(0, 0.0, 0)
        for name, done in passes.items()
    }


def _by_running(contender: Contender, ids: Tensor, work: Work) -> int:
    """By probes, and then by what is timed, which decodes some tokens more."""
    probe = replace(work, new_tokens=PROBE_TOKENS)
    batch = largest(lambda copies: _decode(contender, ids, replace(probe, copies=copies)) is not None)
    while batch and _decode(contender, ids, replace(work, copies=batch)) is None:
        batch -= max(1, batch // STEP_DOWN)
    return batch


def _decode(contender: Contender, ids: Tensor, work: Work) -> Pass | None:
    """A pass, or None where memory ends; from released memory, so that what ran before does not matter."""
    release(ids.device)
    return attempt(partial(run_pass, contender, ids, work), ids.device)
