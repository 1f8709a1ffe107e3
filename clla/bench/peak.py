"""Peak memory of a piece of work, above what was held when it began.

On a GPU it is the allocator's own count, exact to the byte (`torch.cuda.max_memory_allocated`); what CUDA libraries
take beside it is not seen. On a CPU there is no such count: a thread samples the resident size of the process with
psutil. Such a figure comes in pages, misses peaks shorter than the time between two samples, and includes what
the process's libraries keep for themselves; below some megabytes it says little.
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from types import TracebackType
from typing import Protocol, Self

import psutil
import torch

INTERVAL = 0.002  # seconds between two samples, at least


class Peak(Protocol):
    """A context around work in laps.

    Attributes:
        laps: highest bytes above the start in each lap, the last of which ends with the context.
        longest_gap: seconds between two samples during work; 0 where all is counted.
    """

    laps: list[int]
    longest_gap: float

    def lap(self) -> None:
        """End a lap and begin the next."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class CudaPeak:
    """As the allocator counts it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.laps, self.longest_gap = device, list[int](), 0.0

    def __enter__(self) -> Self:
        release(self.device)
        torch.cuda.synchronize(self.device)
        self.start = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def lap(self) -> None:
        torch.cuda.synchronize(self.device)
        self.laps.append(torch.cuda.max_memory_allocated(self.device) - self.start)
        torch.cuda.reset_peak_memory_stats(self.device)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.lap()


class ProcessPeak:
    """As a thread sees it that samples the process."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.laps, self.longest_gap = device, list[int](), 0.0
        self._process, self._done, self._lock = psutil.Process(), threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        release(self.device)
        self._start = self._highest = self._resident()
        self._last = time.perf_counter()
        self._thread.start()
        return self

    def lap(self) -> None:
        self._sample()
        with self._lock:
            # Not below zero: pages of files, the weights' above all, count as resident until the system wants the room.
            self.laps.append(max(0, self._highest - self._start))
            release(self.device)
            self._highest, self._last = self._resident(), time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        if error is None:
            self.lap()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self._sample()

    def _sample(self) -> None:
        with self._lock:
            self._highest = max(self._highest, self._resident())
            now = time.perf_counter()
            self.longest_gap, self._last = max(self.longest_gap, now - self._last), now

    def _resident(self) -> int:
        return self._process.memory_info().rss


def watch_peak(device: torch.device) -> Peak:
    """A watcher of the memory that work on a device takes."""
    return CudaPeak(device) if device.type == "cuda" else ProcessPeak(device)


def release(device: torch.device) -> None:
    """Give memory that nobody holds any longer back, to the GPU or to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    if os.name == "posix" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # glibc keeps freed pages, which would hide what the work takes


def how_measured(device: torch.device) -> str:
    """In words, for a report."""
    if device.type == "cuda":
        return "count of the CUDA allocator"
    return f"resident size of the process, sampled every {1000 * INTERVAL:g} ms or more"
