"""What a report draws of a plan's making: each group's spectrum, and the loss that other budgets would leave.

Both follow from the worth of the groups' components (`spectra.py`), in the units of the plan's metric. At a price μ
a bit each tier takes the width of least ε(b)·Σλ + μ·bits(b), reading counted where it has a price; the prices give the
frontier of loss against bytes for the groups as they are, scales counted one a width and group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clla.artifacts.plan import Plan
from clla.plan.allocation import Candidate, candidate
from clla.plan.rate import ERROR_SHARE, SCALE_BITS
from clla.plan.spectra import Spectra

POINTS = 96  # of a spectrum and of the frontier, at most
SMALLEST, LARGEST = 1 / 8, 8  # bytes of the frontier, as a share of the plan's


def make_outlook(spectra: Spectra, plan: Plan, widths: Sequence[int], reading_price: float = 0.0) -> dict[str, Any]:
    """Spectra and frontier, a few kB per group.

    Args:
        spectra: weighted moments that the plan was made from.
        plan: its groups.
        widths: bits that a component may take.
        reading_price: bits that each layer that reads a component adds.

    Returns:
        `spectra`: for each group its number of `components`, the `energy` of all of them, and of some `component`
        (from 0) the `worth`. `frontier`: `row_bytes` and `loss`, as a share of the plan's, ascending in bytes.
    """
    found, options, whole = [], [], []
    for group in plan.groups:
        start, size = spectra.stats.layers.index(group.layers[0]), len(group.layers)
        rank = len(group.tier_bits) * plan.tier_size
        values, energy = spectra.eigenvalues(start, size, max(1, rank)), spectra.energy(start, size)
        shown = _spread(len(values))
        found.append(
            {
                "components": spectra.rank(size),
                "energy": _rounded(energy),
                "component": shown,
                "worth": [_rounded(float(values[i])) for i in shown],
            }
        )
        options.append(candidate(values, energy, plan.tier_size))
        whole.append(len(values) == spectra.rank(size))
    row_bytes, loss = _frontier(options, whole, plan, widths, reading_price)
    return {"spectra": found, "frontier": {"row_bytes": row_bytes, "loss": loss}}


def _frontier(
    options: list[Candidate], whole: list[bool], plan: Plan, widths: Sequence[int], reading_price: float
) -> tuple[list[float], list[float]]:
    """Bytes per token and loss as a share of the plan's, at falling prices.

    It ends where a group would code every component that is known of it, though it has more.
    """
    top = max((float(o.tiers[0]) for o in options if len(o.tiers)), default=0.0)
    row_bytes: list[float] = []
    loss: list[float] = []
    if top <= 0 or plan.predicted_loss <= 0:
        return row_bytes, loss
    order = [0, *sorted(widths)]
    shares = torch.tensor([ERROR_SHARE[b] for b in order], dtype=torch.float64)
    bits = torch.tensor([b * plan.tier_size for b in order], dtype=torch.float64)
    read = [reading_price * len(group.layers) * plan.tier_size * (bits > 0) for group in plan.groups]
    for price in torch.logspace(math.log10(top), math.log10(top) - 14, 4 * POINTS, dtype=torch.float64):
        chosen = [
            (o.tiers[:, None] * shares + price * (bits + r)).argmin(1) for o, r in zip(options, read, strict=True)
        ]
        if any(len(c) and c[-1] > 0 and not w for c, w in zip(chosen, whole, strict=True)):
            break
        total = sum(float(bits[c].sum()) + SCALE_BITS * len(c[c > 0].unique()) for c in chosen) / 8
        if total > LARGEST * plan.row_bytes:
            break
        left = sum(float((o.tiers * shares[c]).sum()) + o.residual for o, c in zip(options, chosen, strict=True))
        if total >= SMALLEST * plan.row_bytes and (not row_bytes or total > row_bytes[-1]):
            row_bytes.append(_rounded(total))
            loss.append(_rounded(left / plan.predicted_loss))
    kept = _even(len(row_bytes))
    return [row_bytes[i] for i in kept], [loss[i] for i in kept]


def _spread(count: int) -> list[int]:
    """Indices of components to show, the first and the last among them, denser where worth falls fast."""
    steps = torch.linspace(0, 1, min(count, POINTS), dtype=torch.float64).square() * (count - 1)
    return sorted({int(i) for i in steps.round().tolist()})


def _even(count: int) -> list[int]:
    """At most `POINTS` indices, evenly spread."""
    spread: Tensor = torch.linspace(0, count - 1, min(count, POINTS), dtype=torch.float64).round()
    return sorted({int(i) for i in spread.tolist()})


def _rounded(value: float) -> float:
    """To four digits, which is more than a picture shows."""
    return float(f"{value:.4g}")
