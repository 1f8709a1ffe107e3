"""What a bit is worth: the share of a component's variance that quantization leaves as error.

The quantizer itself is `clla.modeling.quantize_clla`; here is its error on a unit Gaussian, which the
plan's prices rest on (uniform mid-rise quantizer: Max, IRE Trans. Inf. Theory 1960).
"""

from __future__ import annotations

import math

from clla.modeling.quantize_clla import GAUSSIAN_STEP
from clla.modeling.sizes_clla import WORD_BITS

SCALE_BITS = 8  # of every scale (`begins_scale`)


def _normal_pdf(x: float) -> float:
    return math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def gaussian_error(bits: int, step: float) -> float:
    """Mean squared error of a mid-rise quantizer with 2^bits levels on N(0, 1), in closed form.

    Each cell [a, b) with level c contributes ∫(x - c)² φ(x) dx
    = (1 + c²)(Φ(b) - Φ(a)) - (b φ(b) - a φ(a)) + 2c (φ(b) - φ(a)).
    """
    half = 1 << (bits - 1)
    total = 0.0
    for code in range(half):  # the positive half, doubled
        a = code * step
        b = a + step if code < half - 1 else math.inf
        c = a + step / 2
        pdf_b, edge = (0.0, 0.0) if math.isinf(b) else (_normal_pdf(b), b * _normal_pdf(b))
        mass = (1.0 if math.isinf(b) else _normal_cdf(b)) - _normal_cdf(a)
        total += (1 + c * c) * mass - (edge - a * _normal_pdf(a)) + 2 * c * (pdf_b - _normal_pdf(a))
    return 2 * total


def error_share(bits: int) -> float:
    """ε(bits): error of one component as a share of its variance; 1 at 0 bits."""
    if bits == 0:
        return 1.0
    if bits == 16:
        return 1e-9  # finer than the arithmetic around it
    return gaussian_error(bits, GAUSSIAN_STEP[bits])


ERROR_SHARE: dict[int, float] = {bits: error_share(bits) for bits in (0, *WORD_BITS)}
