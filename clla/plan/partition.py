"""Which layers to group, without the eigenvalues of every possible group.

At a price μ a bit, a component of worth λ costs g(λ) = min_b ε(b)·λ + μ·b, or μ·(b + ρ·G) where its G layers pay for
reading it. In ln λ that is a gently bent curve, which a
few functions ln(1 + λ/θ) follow well; summed over the components of a group each of them is a log-determinant,
ln det(I + A/θ). One triangular factor gives it for a group and all that begin with the same layer. The bits that
components take at the price, and how many exceed a worth, follow from the same sums by other weights.

These are estimates: they choose the partition. Its bits are then given out with its eigenvalues (`allocation.py`). They
are for latents from all layers of a group (`group`); those of `first` have spectra of the hidden size, whatever
the group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clla.plan.allocation import Segment, cheapest_partition, every_segment, uniform_segments
from clla.plan.rate import ERROR_SHARE
from clla.plan.spectra import Spectra

BELOW, ABOVE = 1e-2, 1e5  # worth in prices, between which the sums follow the curves
ROUNDS = 6  # of price and partition, at most
SPREAD = 64.0  # how many times lower the price of shared latents may be than that of separate ones


class Outline:
    """Estimates for the groups of one budget.

    Args:
        spectra: weighted moments.
        widths: admissible bits per component.
        reading_price: ρ.
    """

    def __init__(self, spectra: Spectra, widths: Sequence[int], reading_price: float = 0.0) -> None:
        self.spectra, self.widths, self.reading_price = spectra, [0, *sorted(widths)], reading_price

    def cost(self, segment: Segment, price: float) -> float:
        """Loss plus price of a group's bits and of reading it, scales left out."""
        read = self.reading_price * segment[1]
        least = price * (1 + read)  # near which components begin to be coded
        return self._sum(
            segment, least, self._fit(least, lambda worth: self._choice(worth, price, read)[0], relative=True)
        )

    def bits(self, segment: Segment, price: float) -> float:
        """Bits that a group's components take at a price."""
        read = self.reading_price * segment[1]
        least = price * (1 + read)
        return max(0.0, self._sum(segment, least, self._fit(least, lambda worth: self._choice(worth, price, read)[1])))

    def count(self, segment: Segment, least: float) -> float:
        """How many components of a group are worth more than `least`."""
        return max(0.0, self._sum(segment, least, self._fit(least, lambda worth: (worth > least).double())))

    def price(self, segments: Sequence[Segment], bits: float, low: float, high: float) -> float:
        """Price between two others at which groups take that number of bits, by bisection of its logarithm."""
        low, high = math.log(low), math.log(high)
        while high - low > 0.05:
            middle = (low + high) / 2
            if sum(self.bits(segment, math.exp(middle)) for segment in segments) > bits:
                low = middle
            else:
                high = middle
        return math.exp(high)

    def price_of(self, segments: Sequence[Segment], bits: float) -> float:
        """Price at which groups take that number of bits, sought below that of their layers alone."""
        layers = [(start + i, 1) for start, size in segments for i in range(size)]
        worth = max(self.spectra.energy(*layer) for layer in layers)
        if worth <= 0:
            return 1.0
        alone = self.price(layers, bits, worth * 1e-12, worth)
        if all(size == 1 for _, size in segments):
            return alone
        return self.price(segments, bits, alone / SPREAD, alone * 2)

    def _sum(self, segment: Segment, price: float, weights: Sequence[float]) -> float:
        start, size = segment
        largest = min(self.spectra.stats.covariance.shape[1], len(self.spectra.stats.layers) - start)
        largest = 1 if size == 1 else largest  # a layer alone needs no larger factor
        sums = self.spectra.log_determinants(start, largest, self._levels(price))
        return sum(weight * found[size - 1] for weight, found in zip(weights, sums, strict=True))

    def _choice(self, worth: Tensor, price: float, read: float) -> tuple[Tensor, Tensor]:
        """Least cost of components, and the width that has it, where being read counts as `read` bits."""
        shares = torch.tensor([ERROR_SHARE[b] for b in self.widths], dtype=torch.float64)
        widths = torch.tensor(self.widths, dtype=torch.float64)
        least = (worth[:, None] * shares + price * (widths + read * (widths > 0))).min(1)
        return least.values, widths[least.indices]

    def _fit(self, price: float, curve: Callable[[Tensor], Tensor], *, relative: bool = False) -> list[float]:
        """Weights of ln(1 + λ/θ) whose sum follows a curve, by least squares over ln λ."""
        worth = price * torch.logspace(math.log10(BELOW), math.log10(ABOVE), 300, dtype=torch.float64)
        basis = torch.stack([torch.log1p(worth / 4.0**level) for level in self._levels(price)], 1)
        wanted = curve(worth)
        trust = 1 / wanted if relative else torch.ones_like(wanted)
        return torch.linalg.lstsq(basis * trust[:, None], (wanted * trust)[:, None]).solution[:, 0].tolist()

    def _levels(self, price: float) -> list[int]:
        """Of the θ on both sides of a price; more where components begin with several bits, which bends the curve."""
        below = math.floor(math.log(price, 4))
        return [below - 1, below, below + 1, below + 2] if self.reading_price else [below, below + 1]


def outlined_partition(
    spectra: Spectra,
    *,
    max_layers_per_group: int,
    bits: int,
    group_bits: int,
    widths: Sequence[int],
    reading_price: float = 0.0,
    on_step: Callable[[int], None] = lambda _: None,
) -> list[Segment]:
    """Groups of consecutive layers whose estimated cost is least at the price at which they meet the budget.

    The price is first that of uniform groups, then that of the groups found.

    Args:
        spectra: weighted moments.
        max_layers_per_group: most layers of a group.
        bits: a token, for all latents.
        group_bits: of them, what every group takes beside its latent.
        widths: admissible bits per component.
        reading_price: ρ, as of `allocation.solve`.
        on_step: called after each candidate, for progress.
    """
    layers = len(spectra.stats.layers)
    outline = Outline(spectra, widths, reading_price)
    uniform = uniform_segments(layers, max_layers_per_group)

    def price_of(segments: list[Segment]) -> float:
        return outline.price_of(segments, bits - group_bits * len(segments))

    def loss(segments: list[Segment]) -> float:
        own = price_of(segments)
        return sum(outline.cost(segment, own) for segment in segments) - own * (bits - group_bits * len(segments))

    price, low, high = price_of(uniform), 0.0, math.inf
    met: dict[tuple[Segment, ...], float] = {}
    for number in range(ROUNDS):
        costs = {}
        for segment in every_segment(layers, max_layers_per_group):
            costs[segment] = outline.cost(segment, price) + price * group_bits
            if not number:
                on_step(1)
        chosen = cheapest_partition(costs, layers)
        if tuple(chosen) in met:
            break
        met[tuple(chosen)] = loss(chosen)
        if sum(outline.bits(segment, price) + group_bits for segment in chosen) > bits:
            low = price
        else:
            high = price
        price = price_of(chosen)
        if not low < price < high:  # the groups of one price suit another, and those of that one suit this
            price = math.sqrt(low * high) if low > 0 and high < math.inf else price
    return list(min(met.items(), key=lambda item: item[1])[0])
