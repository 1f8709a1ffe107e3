"""How long calls take on a GPU, and what the machine can do at most.

Calls are recorded in CUDA graphs, so that the time of launching them from Python is not counted, and the second-level
cache is emptied before each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

RUNS = (10, 200)  # of one figure, at least and at most


@dataclass(frozen=True)
class Ceilings:
    """Attributes: bytes_per_s of a copy, read and written; flops_per_s of a bf16 product."""

    bytes_per_s: float
    flops_per_s: float


def measure_ceilings(device: torch.device, *, small: bool) -> Ceilings:
    """A copy of 2 GiB, and a product of 8192 x 8192 random numbers."""
    source = torch.ones(1 << (20 if small else 31), dtype=torch.uint8, device=device)
    target, size = torch.empty_like(source), 64 if small else 8192
    copied = timed([lambda: target.copy_(source)], device)
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    return Ceilings(2 * source.nbytes / copied, 2 * size**3 / timed([lambda: a @ b], device))


def timed(calls: list[Callable[[], Any]], device: torch.device) -> float:
    """Median seconds of one call; the calls take turns."""
    least, most = RUNS
    if device.type != "cuda":  # a dry run
        start = time.perf_counter()
        calls[0]()
        return time.perf_counter() - start
    graphs = [_recorded(call) for call in calls]
    emptying = torch.empty(4 * cache_bytes(device), dtype=torch.uint8, device=device)
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    torch.cuda.synchronize()
    begun = time.perf_counter()
    while len(events) < least or (len(events) < most and time.perf_counter() - begun < 1):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        emptying.zero_()
        first.record()
        graphs[len(events) % len(graphs)].replay()
        last.record()
        events.append((first, last))
        if len(events) % least == 0:  # the GPU is not left far behind
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    return median(first.elapsed_time(last) for first, last in events) / 1e3


def _recorded(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A call that ran, as a graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def cache_bytes(device: torch.device) -> int:
    """Size of the second-level cache."""
    if device.type != "cuda":
        return 1 << 14
    return int(torch.cuda.get_device_properties(device).L2_cache_size)
