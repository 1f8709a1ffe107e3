"""Choose layer groups, ranks and bits from one byte budget: reverse water-filling with a price a bit.

A tier coded with b bits leaves the share ε(b) of its worth as loss. At a price μ a bit, each tier takes
the width that minimises ε(b)·Σλ + μ·bits(b), and every scale that begins with it costs 8 bits more. Where reading has
a price, too, a component counts as ρ bits more for each of the G layers that read it. Dynamic
programming over cut points finds the partition into groups of least total cost; bisection on μ meets the
budget; what is left over buys the best remaining upgrades.

Shape legend: L layers, n values per token and layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clla.modeling.quantize_clla import begins_scale
from clla.plan.rate import ERROR_SHARE, SCALE_BITS

Segment = tuple[int, int]  # first layer (index among the convertible ones), number of layers


@dataclass(frozen=True)
class Candidate:
    """One possible layer group.

    Attributes:
        tiers: worth of each tier, descending, fp64.
        residual: loss that no rank removes.
    """

    tiers: Tensor
    residual: float


@dataclass(frozen=True)
class Choice:
    """Bits of each tier of one group (coded tiers only), their cost in bits and the loss left."""

    bits: tuple[int, ...]
    total_bits: int
    loss: float


def candidate(eigenvalues: Tensor, energy: float, tier_size: int) -> Candidate:
    """Cut a spectrum into tiers; the energy beyond the last whole tier counts as residual."""
    whole = len(eigenvalues) // tier_size * tier_size
    tiers = eigenvalues[:whole].double().view(-1, tier_size).sum(1)
    return Candidate(tiers, max(0.0, energy - float(tiers.sum())))


def choose_bits(option: Candidate, price: float, widths: Sequence[int], tier_size: int, reading: float = 0.0) -> Choice:
    """Never increasing widths of least loss plus price, scales included, by dynamic programming over the tiers.

    Args:
        option: the group.
        price: per bit.
        widths: admissible bits per component.
        tier_size: components per tier.
        reading: bits that a component counts as beside its own, ρ·G.
    """
    order = [0, *sorted(widths)]
    shares, costs = _tables(widths, tier_size)
    prices = price * (costs + reading * tier_size * (costs > 0))
    steps: list[list[int]] = []  # width of the tier before, by width of this tier
    best = [price * SCALE_BITS * (b > 0) for b in order]  # least cost so far, by width of the last tier
    for i, added in enumerate((option.tiers[:, None] * shares + prices).tolist()):
        if i:
            before, least, wider = [], math.inf, 0
            for level in reversed(range(len(order))):
                opened = least + price * SCALE_BITS * (level > 0)
                stayed = best[level] + price * SCALE_BITS * begins_scale(i, order[level], order[level])
                before.append(level if stayed <= opened else wider)
                if best[level] < least:
                    least, wider = best[level], level
                best[level] = min(stayed, opened)
            steps.append(before[::-1])
        best = [a + b for a, b in zip(best, added, strict=True)]
    levels = [min(range(len(order)), key=best.__getitem__)] if len(option.tiers) else []
    for before in reversed(steps):
        levels.append(before[levels[-1]])
    return _choice(option, [level for level in reversed(levels) if level], order, shares, costs)


def cheapest_partition(costs: dict[Segment, float], num_layers: int) -> list[Segment]:
    """Partition of layers 0 … L-1 into consecutive segments of least total cost, by dynamic programming."""
    best = [0.0] + [math.inf] * num_layers
    last: list[Segment | None] = [None] * (num_layers + 1)
    for end in range(1, num_layers + 1):
        for size in range(1, end + 1):
            start = end - size
            if (start, size) in costs and best[start] + costs[start, size] < best[end]:
                best[end], last[end] = best[start] + costs[start, size], (start, size)
    segments: list[Segment] = []
    end = num_layers
    while end:
        segment = last[end]
        assert segment is not None, "the segments do not cover every layer"
        segments.append(segment)
        end = segment[0]
    return segments[::-1]


def solve(
    candidates: dict[Segment, Candidate],
    *,
    num_layers: int,
    budget_bits: int,
    widths: Sequence[int],
    tier_size: int,
    group_bits: int = 0,
    reading_price: float = 0.0,
) -> dict[Segment, Choice]:
    """Partition and bits whose loss is least within `budget_bits` a token.

    Args:
        candidates: every admissible layer group.
        num_layers: L.
        budget_bits: for all latents of one token, scales included.
        widths: admissible bits per component.
        tier_size: components per tier.
        group_bits: what every group takes beside its latent.
        reading_price: ρ, bits that a component counts as for each layer of its group, beside its own.

    Returns:
        The chosen segments in layer order with their choices.
    """

    def at(price: float) -> dict[Segment, Choice]:
        options = {s: choose_bits(c, price, widths, tier_size, reading_price * s[1]) for s, c in candidates.items()}
        read = {s: reading_price * s[1] * tier_size * len(o.bits) for s, o in options.items()}
        costs = {s: o.loss + price * (o.total_bits + group_bits + read[s]) for s, o in options.items()}
        return {s: options[s] for s in cheapest_partition(costs, num_layers)}

    def size(choices: dict[Segment, Choice]) -> int:
        return sum(choice.total_bits + group_bits for choice in choices.values())

    worth = max((float(c.tiers[0]) for c in candidates.values() if len(c.tiers)), default=0.0)
    low, high = math.log(max(worth, 1e-30)) - 60.0, math.log(max(worth, 1e-30)) + 5.0  # of the price
    choices = at(math.exp(low))
    if size(choices) > budget_bits:
        choices = at(math.exp(high))
        for _ in range(48):
            middle = (low + high) / 2
            tried = at(math.exp(middle))
            if size(tried) > budget_bits:
                low = middle
            else:
                high, choices = middle, tried
    return _spend_rest(choices, candidates, budget_bits - size(choices), widths, tier_size, reading_price)


def _spend_rest(
    choices: dict[Segment, Choice],
    candidates: dict[Segment, Candidate],
    left: int,
    widths: Sequence[int],
    tier_size: int,
    reading_price: float,
) -> dict[Segment, Choice]:
    """Buy the upgrades with the most loss a bit while they fit; widths never increase along the tiers."""
    order = [0, *sorted(widths)]
    shares, costs = _tables(widths, tier_size)
    chosen = {s: [order.index(b) for b in choice.bits] for s, choice in choices.items()}
    while True:
        best: tuple[float, Segment, int, int, int] | None = None
        for segment, levels in chosen.items():
            tiers = candidates[segment].tiers
            for tier in range(min(len(levels) + 1, len(tiers))):
                now = levels[tier] if tier < len(levels) else 0
                ceiling = levels[tier - 1] if tier else len(order) - 1
                for level in range(now + 1, ceiling + 1):
                    scales = _scales_from(tier, level, levels, order) - _scales_from(tier, now, levels, order)
                    extra = float(costs[level] - costs[now]) + SCALE_BITS * scales
                    read = reading_price * segment[1] * tier_size * (now == 0)
                    gain = float(tiers[tier] * (shares[now] - shares[level])) / max(extra + read, 1.0)
                    if extra <= left and gain > 0 and (best is None or gain > best[0]):
                        best = (gain, segment, tier, level, int(extra))
        if best is None:
            break
        _, segment, tier, level, extra_bits = best
        left -= extra_bits
        levels = chosen[segment]
        levels[tier : tier + 1] = [level]
    return {s: _choice(candidates[s], levels, order, shares, costs) for s, levels in chosen.items()}


def _choice(option: Candidate, levels: list[int], order: list[int], shares: Tensor, costs: Tensor) -> Choice:
    index = torch.tensor(levels + [0] * (len(option.tiers) - len(levels)), dtype=torch.long)
    loss = float((option.tiers * shares[index]).sum()) + option.residual
    bits = tuple(order[i] for i in levels)
    scales = sum(begins_scale(i, width, bits[i - 1] if i else None) for i, width in enumerate(bits))
    return Choice(bits, int(costs[index].sum()) + SCALE_BITS * scales, loss)


def _scales_from(tier: int, level: int, levels: list[int], order: list[int]) -> int:
    """How many scales begin with a tier, were it of this level, and with the next."""
    wide, before = order[level], order[levels[tier - 1]] if tier else None
    begin = int(level > 0 and begins_scale(tier, wide, before))
    return begin + int(tier + 1 < len(levels) and begins_scale(tier + 1, order[levels[tier + 1]], wide))


def _tables(widths: Sequence[int], tier_size: int) -> tuple[Tensor, Tensor]:
    """Error share and cost in bits of each width, width 0 first; fp64."""
    order = [0, *sorted(widths)]
    shares = torch.tensor([ERROR_SHARE[b] for b in order], dtype=torch.float64)
    costs = torch.tensor([b * tier_size for b in order], dtype=torch.float64)
    return shares, costs


def every_segment(num_layers: int, max_layers_per_group: int) -> list[Segment]:
    """All consecutive runs of up to `max_layers_per_group` layers: the dynamic program chooses among them."""
    return [
        (start, size)
        for start in range(num_layers)
        for size in range(1, max_layers_per_group + 1)
        if start + size <= num_layers
    ]


def uniform_segments(num_layers: int, group_size: int) -> list[Segment]:
    """Equal groups from the bottom up, the last one shorter where it must be."""
    return [(start, min(group_size, num_layers - start)) for start in range(0, num_layers, group_size)]
