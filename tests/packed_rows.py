"""Packed rows read bit by bit in fp64, and random ones, for tests of layouts and kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clla.modeling import rows_clla, unpack_triton_clla
from clla.modeling.hooks_clla import CACHE
from clla.modeling.quantize_clla import GAUSSIAN_STEP, SCALE_OFFSETS, RowLayout

SMALLEST_SCALE = 2.0 ** (-127 / 8)  # code 1
LARGEST_SCALE = 2.0 ** (127 / 8)  # code 255
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16)
MIXED = (16, *(8,) * 4, 7, 6, 5, 4, 3, 2, 1, 1)  # 8 bits: scales of 16 and 16 components
POISON = 0xAB


def step_of(bits: int, size: int) -> float:
    """Step at scale 1 of a class of `size` components."""
    return 2.2 * math.sqrt(size) / 65536 if bits == 16 else GAUSSIAN_STEP[bits]


def scale_of(scale_code: int) -> float:
    return 2.0 ** ((scale_code - 128) / 8) if scale_code else 0.0


def classes_of(tier_bits: tuple[int, ...], tier_size: int) -> list[tuple[int, slice]]:
    """Bits and components of each run of equal widths; runs of 8 bits are cut before tiers 1, 3, 7, 15, …"""
    found, first = [], 0
    for bits, run in groupby(tier_bits):
        last = first + len(list(run))
        marks = [first, *(t for t in (1, 3, 7, 15, 31, 63) if bits == 8 and first < t < last), last]
        found += [(bits, slice(a * tier_size, b * tier_size)) for a, b in pairwise(marks)]
        first = last
    return found


def naive_row(scale_codes: list[int], codes: list[int], tier_bits: tuple[int, ...], tier_size: int) -> list[int]:
    """A scale for every class, then every class's codes as one long number, lowest byte first."""
    row = list(scale_codes)
    for bits, part in classes_of(tier_bits, tier_size):
        number = sum(code << (bits * i) for i, code in enumerate(codes[part]))
        row += number.to_bytes(len(codes[part]) * bits // 8, "little")
    return row


def naive_codes(row: list[int], tier_bits: tuple[int, ...], tier_size: int) -> tuple[list[int], list[int]]:
    """Scale codes and component codes in a row."""
    classes = classes_of(tier_bits, tier_size)
    codes, rest = [], bytes(row[len(classes) :])
    for bits, part in classes:
        size = part.stop - part.start
        number, rest = int.from_bytes(rest[: size * bits // 8], "little"), rest[size * bits // 8 :]
        codes += [number >> (bits * i) & (2**bits - 1) for i in range(size)]
    assert not rest
    return row[: len(classes)], codes


@dataclass
class Tried:
    """One scale code tried on one class: error of each component, and how far fp32 may be off in their squares."""

    levels: np.ndarray  # real-valued, before rounding down
    codes: np.ndarray
    error: np.ndarray

    @property
    def squared(self) -> float:
        return float((self.error**2).sum())


def naive_try(x: np.ndarray, bits: int, scale_code: int) -> Tried:
    step, half = step_of(bits, len(x)) * scale_of(scale_code), 2 ** (bits - 1)
    levels = x / step if step else np.zeros(len(x))
    codes = np.clip(np.floor(levels), -half, half - 1)
    return Tried(levels, codes + half, (codes + 0.5) * step - x)


def rounding(x: np.ndarray, tried: Tried) -> float:
    """How far off the squared error is when it is reckoned in fp32: 4 roundings of x, one for each square and sum."""
    off = np.abs(x) * 2.0**-22
    return float((2 * np.abs(tried.error) * off + off**2).sum()) + tried.squared * len(x) * 2.0**-24


def start_codes(x: np.ndarray) -> set[int]:
    """Code of the RMS; both neighbours where it lies between two codes to fp32 rounding."""
    rms = math.sqrt(float((x**2).mean()))
    if rms == 0:
        return {0}
    exact = math.log2(rms) * 8 + 128
    return {min(255, max(1, round(exact + nudge))) for nudge in (-1e-4, 1e-4)}


def tried_codes(start: int) -> set[int]:
    return {min(255, max(1, start + offset)) for offset in SCALE_OFFSETS} if start else {0}


def check_class(latent: np.ndarray, bits: int, scale_code: int, codes: list[int]) -> None:
    """The scale is one of those tried, none of them leaves less error, and the codes round x / step down.

    Reckoned in fp64. Where fp32 cannot tell two scales or two levels apart, either is right.
    """
    x = latent.astype(np.float64)
    found = naive_try(x, bits, scale_code)
    if scale_code == 0:
        assert not x.any() and set(codes) == {2 ** (bits - 1)}
        return

    def no_other_is_better(start: int) -> bool:
        others = [naive_try(x, bits, code) for code in tried_codes(start)]
        return all(found.squared <= t.squared + rounding(x, t) + rounding(x, found) for t in others)

    assert any(scale_code in tried_codes(start) and no_other_is_better(start) for start in start_codes(x))
    tie = np.abs(found.levels - np.round(found.levels)) <= np.abs(found.levels) * 2.0**-22
    differ = np.abs(np.array(codes) - found.codes)
    assert (differ <= tie).all()


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def latents_of(rows: Tensor, tiers: tuple[int, ...], tier_size: int) -> Tensor:
    """[B, K, r] in fp64 of rows [B, K, N], bit by bit."""
    classes = classes_of(tiers, tier_size)
    data, parts, start = rows.cpu().numpy(), [], len(classes)
    scales = np.vectorize(scale_of, otypes=[float])(data[..., :start])
    for number, (bits, part) in enumerate(classes):
        size = part.stop - part.start
        stream = data[..., start : start + size * bits // 8]
        each = np.unpackbits(stream, axis=-1, bitorder="little").reshape(*stream.shape[:2], size, bits)
        codes = (each.astype(np.float64) * 2.0 ** np.arange(bits)).sum(-1)
        parts.append((codes + 0.5 - 2 ** (bits - 1)) * step_of(bits, size) * scales[..., number, None])
        start += size * bits // 8
    return torch.from_numpy(np.concatenate(parts, -1))


def random_rows(layout: RowLayout, batch: int, count: int) -> Tensor:
    """[B, K, N] of random bits, with scales of ordinary sizes and a few zeros among them."""
    drawn = torch.randint(0, 256, (batch, count, layout.row_bytes), dtype=torch.uint8)
    scales = drawn[..., : len(layout.classes)]
    scales.copy_(torch.randint(112, 137, scales.shape))
    scales[torch.rand(scales.shape) < 0.05] = 0
    return drawn


@contextmanager
def by(kernels: bool) -> Iterator[None]:
    """Rows are unpacked by the kernel and summed up in parts, as on a GPU, or by the twin."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (rows_clla, unpack_triton_clla):
            patch.setattr(module, "on_gpu", lambda x: kernels)
        yield


def check_same_answers(converted: Any, ids: Tensor, mask: Tensor, new_cache: Callable[[], Any], launches: int) -> None:
    """Greedy answers of a padded batch by the kernel and by the twin: alike, after so many launches of the kernel."""
    launch, answers = unpack_triton_clla._launch, []
    with pytest.MonkeyPatch.context() as patch:
        seen: list[int] = []
        patch.setattr(unpack_triton_clla, "_launch", lambda *a: seen.append(1) or launch(*a))
        for kernels in (True, False):
            with by(kernels):
                answers.append(
                    converted.generate(
                        ids,
                        attention_mask=mask,
                        do_sample=False,
                        max_new_tokens=4,
                        eos_token_id=None,
                        pad_token_id=258,
                        return_dict_in_generate=True,
                        output_logits=True,
                        **{CACHE: new_cache()},
                    )
                )
    assert len(seen) == launches
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    torch.testing.assert_close(*(torch.stack(a.logits) for a in answers), rtol=1e-4, atol=1e-4)


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """To so many parts of the largest; the same infinities."""
    size = float(expected[expected.isfinite()].abs().max()) if expected.isfinite().any() else 1.0
    torch.testing.assert_close(found.cpu().double(), expected.cpu().double(), rtol=0, atol=tolerance * size)
