"""Estimates of what layer groups cost, against their eigenvalues."""

from __future__ import annotations

import math

import pytest
import torch
from random_stats import Sampled, sampled

from clla import linalg as eigen
from clla.plan import planners, spectra
from clla.plan.allocation import Choice, Segment, candidate, every_segment, solve
from clla.plan.partition import Outline, outlined_partition
from clla.plan.planners import PLANNERS, Room
from clla.plan.rate import ERROR_SHARE
from clla.plan.spectra import Spectra
from clla.recipe import PlanConfig

LAYERS, BAND = 8, 4
WIDTHS = PlanConfig().bits


@pytest.fixture(scope="module")
def data() -> Sampled:
    return sampled(num_layers=LAYERS, head_dim=48, hidden=160, band=BAND, tokens=4000, noise=0.2)


def cost_of(values: torch.Tensor, price: float, read: float = 0.0) -> tuple[float, float]:
    """Loss plus price of the bits of single components, and the bits, where reading one counts as `read` bits."""
    options = torch.stack([ERROR_SHARE[b] * values + price * (b + read * (b > 0)) for b in (0, *WIDTHS)])
    bits = torch.tensor((0, *WIDTHS)).double()[options.argmin(0)]
    return float(options.amin(0).sum()), float(bits.sum())


def test_log_determinants_are_sums_over_the_eigenvalues(data: Sampled) -> None:
    found = Spectra(data.stats)
    levels = [round(math.log(found.energy(0, 1) / 96, 4)) - back for back in (0, 3)]
    for start in (0, 3, LAYERS - 1):
        largest = min(BAND, LAYERS - start)
        for level, sums in zip(levels, found.log_determinants(start, largest, levels), strict=True):
            for size in range(1, largest + 1):
                expected = torch.log1p(found.eigenvalues(start, size) / 4.0**level).sum()
                assert sums[size - 1] == pytest.approx(float(expected), rel=1e-4)


def test_a_level_below_rounding_does_no_harm(data: Sampled) -> None:
    sums = Spectra(data.stats).log_determinants(0, BAND, [-40])[0]
    assert all(math.isfinite(value) for value in sums) and sums == sorted(sums)


@pytest.mark.parametrize("reading_price", (0.0, 0.5, 2.0))
@pytest.mark.parametrize("bits_a_value", (0.2, 0.8, 2.0))
def test_estimates_are_near_what_eigenvalues_say(data: Sampled, bits_a_value: float, reading_price: float) -> None:
    found, segments = Spectra(data.stats), [(0, 4), (4, 4)]
    outline, bits, read = Outline(found, WIDTHS, reading_price), bits_a_value * LAYERS * 96, 4 * reading_price
    worth = torch.cat([found.eigenvalues(*segment) for segment in segments])
    low, high = math.log(1e-9 * float(worth[0])), math.log(float(worth[0]))
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if cost_of(worth, math.exp(middle), read)[1] > bits else (low, middle)
    price = math.exp(high)
    assert 0.4 < outline.price_of(segments, bits) / price < 2.5
    for segment in segments:
        values = found.eigenvalues(*segment)
        assert outline.cost(segment, price) == pytest.approx(cost_of(values, price, read)[0], rel=0.25)
        assert outline.count(segment, price) == pytest.approx(int((values > price).sum()), rel=0.3, abs=20)


@pytest.mark.parametrize(
    ("bits_a_value", "whole", "worse", "reading_price"),
    (
        (0.2, 6, 0.001, 0.0),
        (0.6, 6, 0.001, 0.0),
        (1.5, 6, 0.001, 0.0),
        (3.0, 6, 0.001, 0.0),
        (0.2, 2, 0.01, 0.0),
        (0.2, 6, 0.01, 0.3),
        (1.5, 6, 0.01, 0.3),
        (0.6, 6, 0.01, 2.0),
    ),
)
def test_the_partition_is_as_good_as_that_of_all_eigenvalues(
    data: Sampled,
    bits_a_value: float,
    whole: int,
    worse: float,
    reading_price: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where layers of long groups are estimated by half of their coordinates."""
    monkeypatch.setattr(spectra, "WHOLE", whole)
    found, bits = Spectra(data.stats), int(bits_a_value * LAYERS * 96)
    options = {s: candidate(found.eigenvalues(*s), found.energy(*s), 8) for s in every_segment(LAYERS, BAND)}
    chosen = outlined_partition(
        found, max_layers_per_group=BAND, bits=bits, group_bits=0, widths=WIDTHS, reading_price=reading_price
    )
    price = Outline(found, WIDTHS, reading_price).price_of(chosen, bits)

    def loss(segments: list[Segment]) -> float:
        own: dict[Segment, Choice] = solve(
            {s: options[s] for s in segments},
            num_layers=LAYERS,
            budget_bits=bits,
            widths=WIDTHS,
            tier_size=8,
            reading_price=reading_price,
        )
        read = sum(8 * size * len(choice.bits) for (_, size), choice in own.items())
        return sum(choice.loss for choice in own.values()) + price * reading_price * read

    assert loss(chosen) <= loss(list(options)) * (1 + worse)


def test_large_groups_are_planned_from_their_leading_components(data: Sampled, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if they were too large for all eigenvalues: the same loss to 0.1 %, from fewer components."""
    config, bits = PlanConfig(max_layers_per_group=BAND), int(0.4 * LAYERS * 96)
    exact = PLANNERS["dynamic"](Spectra(data.stats), config, Room(bits), lambda _: None, lambda _: 0.0)
    for module in (eigen, spectra, planners):
        monkeypatch.setattr(module, "EXACT", 50)
    monkeypatch.setattr(planners, "CHEAP", 50)
    found = Spectra(data.stats)
    ours = PLANNERS["dynamic"](found, config, Room(bits), lambda _: None, lambda _: 0.0)
    assert sum(c.loss for c in ours.values()) == pytest.approx(sum(c.loss for c in exact.values()), rel=1e-3)
    assert any(len(found.eigenvalues(*s, 1)) < found.rank(s[1]) for s in ours)
