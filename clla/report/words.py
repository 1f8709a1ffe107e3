"""How figures are written on the page."""

from __future__ import annotations

from collections.abc import Sequence

from clla.evaluate.plan_tables import span as span
from clla.evaluate.report import UNSEEN as UNSEEN

UNITS = ((1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB"), (1.0, " B"))
THOUSANDS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(value: float) -> str:
    """A number for an axis: 512, 8k, 1.5M, 0.02."""
    for size, letter in THOUSANDS:
        if value >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def tokens(number: float) -> str:
    """Tokens for an axis, whole thousands of 1024: 512, 8k, 128k."""
    return f"{number / 1024:,.0f}k" if number >= 1024 and number % 1024 == 0 else f"{number:,.0f}"


def size(nbytes: float) -> str:
    """Bytes with a decimal unit and three digits."""
    for unit, name in UNITS:
        if nbytes >= unit:
            return f"{nbytes / unit:.3g}{name}" if nbytes < 999.5 * unit else f"{nbytes / unit:,.0f}{name}"
    return f"{nbytes:.0f} B"


def percent(share: float) -> str:
    """A share with three digits at most: 6.25 %, 0.012 %."""
    return f"{100 * share:.3g} %" if share < 9.995 else f"{100 * share:,.0f} %"


def layers(indices: Sequence[int]) -> str:
    """`span` with its noun."""
    return ("layer " if len(indices) == 1 else "layers ") + span(indices)


def count(number: int, thing: str) -> str:
    """1 group, 6 groups."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")
