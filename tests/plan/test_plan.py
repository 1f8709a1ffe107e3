"""Layer groups and bits from a budget, against exhaustive search."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product

import pytest
import torch
from conversions import form
from hypothesis import given, settings
from hypothesis import strategies as st
from random_stats import sampled

from clla.artifacts.plan import Plan
from clla.artifacts.stats import Stats
from clla.errors import UsageError
from clla.modeling.quantize_clla import RowLayout
from clla.plan.allocation import (
    Candidate,
    Choice,
    Segment,
    candidate,
    cheapest_partition,
    choose_bits,
    every_segment,
    solve,
    uniform_segments,
)
from clla.plan.budget import WINDOW_SHARE, WINDOWS, Budget, derive_group_size, derive_window, latent_bits
from clla.plan.make import make_plan
from clla.plan.planners import PLANNERS, Room, count_candidates, neighbour_distances
from clla.plan.rate import ERROR_SHARE
from clla.plan.spectra import Spectra
from clla.recipe import PlanConfig

TIER = 8
INPUT = {"group": "all_layers", "first": "first_layer"}


def row_bits(tier_bits: Sequence[int], tier_size: int = TIER) -> int:
    """Codes, and 8 bits of scale for every width in use, at 8 bits for tiers 1, 3, 7, … too; width 0 is not stored."""
    more = sum(width == 8 for i, width in enumerate(tier_bits) if i in (1, 3, 7, 15, 31, 63))
    return sum(tier_bits) * tier_size + 8 * (len(set(tier_bits) - {0}) + more)


def partitions(num_layers: int, largest: int, start: int = 0) -> Iterator[list[Segment]]:
    """All partitions into consecutive segments of at most `largest` layers."""
    if start == num_layers:
        yield []
    for size in range(1, min(largest, num_layers - start) + 1):
        for rest in partitions(num_layers, largest, start + size):
            yield [(start, size), *rest]


def random_candidates(num_layers: int, largest: int, tiers_a_layer: int, seed: int) -> dict[Segment, Candidate]:
    """Groups' spectra fall geometrically; a group saves some of its layers' worth."""
    rng = random.Random(seed)
    found = {}
    for start, size in every_segment(num_layers, largest):
        decay = rng.uniform(0.1, 0.7)
        total = size * rng.uniform(0.6, 1.0) * 10
        tiers = [total * (1 - decay) * decay**i for i in range(size * tiers_a_layer)]
        found[start, size] = Candidate(torch.tensor(tiers, dtype=torch.float64), rng.uniform(0, 0.1))
    return found


def loss_of(option: Candidate, bits: tuple[int, ...]) -> float:
    padded = [*bits, *([0] * (len(option.tiers) - len(bits)))]
    return option.residual + sum(float(w) * ERROR_SHARE[b] for w, b in zip(option.tiers, padded, strict=True))


def cheapest_by_cost(option: Candidate, widths: tuple[int, ...]) -> dict[int, float]:
    """Least loss at each cost in bits, over all never increasing widths of one group."""
    best: dict[int, float] = {}
    for bits in product((0, *widths), repeat=len(option.tiers)):
        if list(bits) == sorted(bits, reverse=True):
            cost = row_bits(bits)
            best[cost] = min(best.get(cost, math.inf), loss_of(option, bits))
    return best


def exhaustive(candidates: dict[Segment, Candidate], num_layers: int, budget: int, widths: tuple[int, ...]) -> float:
    """Least loss within a budget, over all partitions and widths."""
    tables = {s: cheapest_by_cost(c, widths) for s, c in candidates.items()}
    best = math.inf
    for partition in partitions(num_layers, max(size for _, size in candidates)):
        if not all(s in tables for s in partition):
            continue
        joint = {0: 0.0}
        for segment in partition:
            merged: dict[int, float] = {}
            for (cost_a, loss_a), (cost_b, loss_b) in product(joint.items(), tables[segment].items()):
                if cost_a + cost_b <= budget:
                    cost, loss = cost_a + cost_b, loss_a + loss_b
                    merged[cost] = min(merged.get(cost, math.inf), loss)
            joint = merged
        best = min([best, *joint.values()])
    return best


def total(choices: dict[Segment, Choice]) -> tuple[int, float]:
    """Bits and loss; the bits are those of the widths, and of the rows that the layout stores."""
    for choice in choices.values():
        assert choice.total_bits == row_bits(choice.bits) == RowLayout(choice.bits, TIER).row_bytes * 8
    return sum(c.total_bits for c in choices.values()), sum(c.loss for c in choices.values())


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_cheapest_partition_equals_brute_force(num_layers: int, largest: int, seed: int) -> None:
    rng = random.Random(seed)
    costs = {s: rng.choice((rng.random(), float(rng.randint(0, 3)))) for s in every_segment(num_layers, largest)}
    found = cheapest_partition(costs, num_layers)
    assert found in list(partitions(num_layers, largest))
    best = min(sum(costs[s] for s in p) for p in partitions(num_layers, largest))
    assert sum(costs[s] for s in found) == pytest.approx(best)


def test_cheapest_partition_uses_admitted_segments_only() -> None:
    costs = {(0, 2): 5.0, (2, 1): 1.0, (0, 1): 0.0, (1, 1): 100.0, (3, 2): 1.0}
    assert cheapest_partition(costs, 5) == [(0, 2), (2, 1), (3, 2)]


@given(
    st.integers(1, 5),
    st.floats(-9, 3),
    st.sampled_from([(1,), (2, 4), (4, 2, 8), (1, 2, 3, 4, 5, 6, 8)]),
    st.sampled_from((0.0, 0.5, 3.0)),
)
@settings(deadline=None, max_examples=60)
def test_choose_bits_equals_brute_force(tiers: int, log_price: float, widths: tuple[int, ...], reading: float) -> None:
    rng = random.Random(tiers)
    worth = sorted((10 ** rng.uniform(-4, 2) for _ in range(tiers)), reverse=True)
    option, price = Candidate(torch.tensor(worth, dtype=torch.float64), 0.25), math.exp(log_price)
    choice = choose_bits(option, price, widths, TIER, reading)
    assert list(choice.bits) == sorted(choice.bits, reverse=True) and 0 not in choice.bits
    assert choice.total_bits == row_bits(choice.bits) == RowLayout(choice.bits, TIER).row_bytes * 8
    assert choice.loss == pytest.approx(loss_of(option, choice.bits))
    every = (b for n in range(tiers + 1) for b in itertools.combinations_with_replacement(sorted(widths)[::-1], n))
    least = min(loss_of(option, b) + price * (row_bits(b) + reading * TIER * len(b)) for b in every)
    assert choice.loss + price * (choice.total_bits + reading * TIER * len(choice.bits)) == pytest.approx(least)


@pytest.mark.parametrize("seed", range(4))
def test_a_price_on_reading_buys_fewer_components_with_the_same_bits(seed: int) -> None:
    candidates, read, losses = random_candidates(6, 4, 8, seed), [], []
    for price in (0.0, 0.3, 1.0, 4.0):
        choices = solve(
            candidates, num_layers=6, budget_bits=400, widths=(1, 2, 4, 8), tier_size=TIER, reading_price=price
        )
        assert 300 < sum(choice.total_bits for choice in choices.values()) <= 400
        read.append(sum(size * len(choice.bits) for (_, size), choice in choices.items()))
        losses.append(sum(choice.loss for choice in choices.values()))
    assert read == sorted(read, reverse=True) and read[-1] < read[0]
    assert losses[0] <= 1.05 * min(losses)  # the last bits are spent one by one


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("widths", [(2, 4), (1, 3, 8)], ids=str)
def test_solve_is_close_to_exhaustive_search(seed: int, widths: tuple[int, ...]) -> None:
    candidates = random_candidates(3, 2, 2, seed)
    for budget in (0, 20, 60, 100, 150, 220, 300, 420):
        choices = solve(candidates, num_layers=3, budget_bits=budget, widths=widths, tier_size=TIER)
        bits, loss = total(choices)
        best = exhaustive(candidates, 3, budget, widths)
        assert bits <= budget
        assert loss == pytest.approx(sum(loss_of(candidates[s], c.bits) for s, c in choices.items()))
        assert best - 1e-9 <= loss <= best * 1.35 + 1e-9


@given(
    tiers=st.integers(1, 6),
    log_price=st.floats(-9, 3),
    tier_size=st.sampled_from((8, 16, 64)),
    widths=st.sampled_from([(2,), (1, 3, 16), (1, 2, 3, 4, 5, 6, 7, 8, 16)]),
    budget=st.integers(0, 4000),
)
@settings(deadline=None, max_examples=40)
def test_total_bits_are_the_stored_rows(
    tiers: int, log_price: float, tier_size: int, widths: tuple[int, ...], budget: int
) -> None:
    option = Candidate(10.0 ** -torch.arange(tiers, dtype=torch.float64), 0.0)
    solved = solve({(0, 1): option}, num_layers=1, budget_bits=budget, widths=widths, tier_size=tier_size)
    for choice in (choose_bits(option, math.exp(log_price), widths, tier_size), solved[0, 1]):
        assert choice.total_bits == RowLayout(choice.bits, tier_size).row_bytes * 8
    assert solved[0, 1].total_bits <= budget


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 10**6), st.integers(0, 1500))
@settings(deadline=None, max_examples=25)
def test_solve_obeys_budget_cover_and_order(num_layers: int, largest: int, seed: int, budget: int) -> None:
    candidates = random_candidates(num_layers, largest, 3, seed)
    widths = (1, 2, 3, 4, 5, 6, 8)
    choices = solve(candidates, num_layers=num_layers, budget_bits=budget, widths=widths, tier_size=TIER)
    assert list(choices) in list(partitions(num_layers, largest))
    assert total(choices)[0] <= budget
    for segment, choice in choices.items():
        assert list(choice.bits) == sorted(choice.bits, reverse=True)
        assert set(choice.bits) <= set(widths) and len(choice.bits) <= len(candidates[segment].tiers)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_more_budget_never_hurts(seed: int) -> None:
    candidates = random_candidates(4, 3, 2, seed)
    widths = (1, 2, 3, 4, 5, 6, 8)
    losses = [
        total(solve(candidates, num_layers=4, budget_bits=budget, widths=widths, tier_size=TIER))[1]
        for budget in range(0, 800, 11)
    ]
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(losses))
    assert losses[-1] < 0.1 * losses[0]


def test_a_budget_for_everything_buys_the_widest_of_everything() -> None:
    candidates = random_candidates(3, 1, 2, 0)
    choices = solve(candidates, num_layers=3, budget_bits=10**6, widths=(2, 8), tier_size=TIER)
    assert all(choice.bits == (8, 8) for choice in choices.values())


@pytest.mark.parametrize("budget", (7, 8, 23, 24, 39, 40, 55, 56, 1000))
def test_what_is_left_is_spent(budget: int) -> None:
    """Three equal tiers: the price jumps over all of them at once, so the rest must buy single upgrades."""
    candidates = {(0, 1): Candidate(torch.ones(3, dtype=torch.float64), 0.0)}
    choices = solve(candidates, num_layers=1, budget_bits=budget, widths=(2,), tier_size=TIER)
    assert choices[0, 1].bits == (2,) * min(3, max(0, budget - 8) // 16)


@given(
    seed=st.integers(0, 10**6),
    budget=st.integers(0, 1200),
    widths=st.sampled_from([(2,), (2, 4), (1, 3, 8), (1, 2, 3, 4, 5, 6, 8)]),
)
@settings(deadline=None, max_examples=40)
def test_no_single_upgrade_is_left_that_fits(seed: int, budget: int, widths: tuple[int, ...]) -> None:
    """Every other width of every tier, the scales of the row counted anew."""
    candidates = random_candidates(4, 2, 3, seed)
    choices = solve(candidates, num_layers=4, budget_bits=budget, widths=widths, tier_size=TIER)
    left = budget - total(choices)[0]
    for segment, choice in choices.items():
        option = candidates[segment]
        padded = [*choice.bits, *([0] * (len(option.tiers) - len(choice.bits)))]
        for tier, width in product(range(len(padded)), widths):
            changed = [*padded[:tier], width, *padded[tier + 1 :]]
            if width > padded[tier] and changed == sorted(changed, reverse=True):
                assert row_bits(changed) - choice.total_bits > left
    if any(c.bits != (widths[-1],) * len(candidates[s].tiers) for s, c in choices.items()):
        steps = [b - a for a, b in pairwise((0, *widths))]
        assert left < max(steps) * TIER + 8  # less than one tier's next width and its scale


def test_the_rest_buys_a_width_that_frees_a_scale() -> None:
    """(2, 1) and (2, 2) take the same bits at 8 components per tier: nothing may be left of it."""
    candidates = {(0, 1): Candidate(torch.tensor([1.0, 0.3], dtype=torch.float64), 0.0)}
    assert row_bits((2, 1)) == row_bits((2, 2)) == 40
    choices = solve(candidates, num_layers=1, budget_bits=40, widths=(1, 2), tier_size=TIER)
    assert choices[0, 1].bits == (2, 2)


def test_candidate_counts_what_lies_beyond_whole_tiers_as_residual() -> None:
    spectrum = torch.arange(20, 0, -1, dtype=torch.float64)
    option = candidate(spectrum, float(spectrum.sum()) + 7, TIER)
    assert option.tiers.tolist() == [sum(range(13, 21)), sum(range(5, 13))]
    assert option.residual == pytest.approx(sum(range(1, 5)) + 7)
    assert candidate(spectrum, 0.0, TIER).residual == 0.0


def test_a_layer_narrower_than_a_tier_can_only_be_shared() -> None:
    """Alone it has no tier to code; together with its neighbour it has one."""
    empty = Candidate(torch.zeros(0, dtype=torch.float64), 1.0)
    candidates = {(0, 1): empty, (1, 1): empty, (0, 2): Candidate(torch.ones(1, dtype=torch.float64), 0.0)}
    choices = solve(candidates, num_layers=2, budget_bits=100, widths=(2, 4), tier_size=TIER)
    assert {s: c.bits for s, c in choices.items()} == {(0, 2): (4,)}


def test_a_group_narrower_than_a_tier_is_left_uncoded() -> None:
    choices = solve(
        {(0, 1): Candidate(torch.zeros(0, dtype=torch.float64), 1.0)},
        num_layers=1,
        budget_bits=100,
        widths=(2, 4),
        tier_size=TIER,
    )
    assert choices == {(0, 1): Choice((), 0, 1.0)}


def test_segments() -> None:
    assert sorted(every_segment(4, 2)) == [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1)]
    assert uniform_segments(7, 3) == [(0, 3), (3, 3), (6, 1)]
    assert uniform_segments(2, 5) == [(0, 2)]


def no_damage(_: Plan) -> float:
    return 0.0


def planned(
    stats: Stats,
    config: PlanConfig,
    budget: float,
    context: int | None,
    window: int,
    sinks: int = 4,
    measure: Callable[[Plan], float] | None = no_damage,
) -> Plan:
    return make_plan(
        stats,
        config,
        budget=Budget(budget, context, window, sinks),
        kv_itemsize=2,
        kept_layers=(),
        kept_window=0,
        made_from="test",
        spectra=Spectra(stats, source=config.source),
        measure=measure,
    )


@pytest.mark.slow
@pytest.mark.parametrize("source", ("group", "first"))
@pytest.mark.parametrize("planner", sorted(PLANNERS))
@pytest.mark.parametrize("max_layers_per_group", (1, 2, 3, 5))
def test_planners_cover_all_layers_once_within_the_budget(planner: str, max_layers_per_group: int, source: str) -> None:
    stats = sampled(num_layers=5, head_dim=8, hidden=24, band=max_layers_per_group, tokens=400).stats
    config = PlanConfig(
        planner=planner, latent_input=INPUT[source], max_layers_per_group=max_layers_per_group, tier_size=TIER
    )
    source_bytes = 5 * 16 * 2
    for budget, context, window in ((40.0, 1024, 16), (16.0, 4096, 32), (24.0, None, 128), (120.0, 512, 64)):
        plan = planned(stats, config, budget, context, window)
        assert [layer for group in plan.groups for layer in group.layers] == list(stats.layers)
        assert all(len(group.layers) <= max_layers_per_group for group in plan.groups)
        assert all(list(g.tier_bits) == sorted(g.tier_bits, reverse=True) for g in plan.groups)
        assert plan.source_bytes_per_token == source_bytes
        assert plan.row_bytes > 0
        if context is None:
            assert plan.row_bytes <= budget
        else:
            assert plan.bytes_at(context) <= budget * context


@pytest.mark.parametrize("planner", ("cluster", "uniform", "pyramid"))
def test_the_dynamic_planner_predicts_no_more_loss_than_the_simple_ones(planner: str) -> None:
    stats = sampled(num_layers=5, head_dim=8, hidden=24, band=3, tokens=400).stats
    for budget in (8.0, 16.0, 32.0):
        simple = planned(stats, PlanConfig(planner=planner, max_layers_per_group=3, tier_size=TIER), budget, None, 16)
        dynamic = planned(
            stats, PlanConfig(planner="dynamic", max_layers_per_group=3, tier_size=TIER), budget, None, 16
        )
        assert dynamic.predicted_loss <= simple.predicted_loss * 1.02


def test_cluster_finds_the_blocks_of_layers_that_share() -> None:
    """Layers 0 and 1 are copies, so are 2 to 4, and the two blocks have nothing in common."""
    data = sampled(num_layers=5, head_dim=8, hidden=24, tokens=600)
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 600, 16, generator=generator, dtype=torch.float64)
    y = torch.stack([first, first, second, second, second])
    y = y - y.mean(1, keepdim=True)
    covariance = torch.zeros(5, 5, 16, 16)
    for a, j in product(range(5), range(5)):
        if a + j < 5:
            covariance[a, j] = (y[a].mT @ y[a + j] / 600).float()
    stats = Stats(**{**vars(data.stats), "covariance": covariance, "fisher": torch.eye(16).repeat(5, 1, 1)})
    config = PlanConfig(planner="cluster", max_layers_per_group=3, tier_size=TIER)
    assert [group.layers for group in planned(stats, config, 40.0, None, 16).groups] == [(0, 1), (2, 3, 4)]


def test_neighbour_distances_are_those_of_the_tokens() -> None:
    data = sampled(num_layers=4, head_dim=8, hidden=24, tokens=300)
    expected = (data.y[1:] - data.y[:-1]).square().sum(-1).mean(-1).sqrt()
    torch.testing.assert_close(torch.tensor(neighbour_distances(data.stats)).double(), expected, rtol=1e-3, atol=0)


def by_kvsharer(order: str, measure: Callable[[Plan], float]) -> tuple[Plan, list[list[tuple[int, ...]]]]:
    """The plan of six layers in groups of at most three, and the groups of every plan that was measured."""
    stats = sampled(num_layers=6, head_dim=8, hidden=24, tokens=300).stats
    seen: list[list[tuple[int, ...]]] = []

    def damage(plan: Plan) -> float:
        seen.append([group.layers for group in plan.groups])
        return measure(plan)

    config = PlanConfig(planner="kvsharer", sharing_order=order, max_layers_per_group=3, tier_size=TIER)
    return planned(stats, config, 30.0, None, 16, measure=damage), seen


@pytest.mark.parametrize("order", ("similar", "dissimilar"))
def test_kvsharer_merges_neighbours_in_the_order_of_their_distance(order: str) -> None:
    """The first merger tried is that of the nearest, or farthest, two layers; what helps stays, what hurts does not."""
    stats = sampled(num_layers=6, head_dim=8, hidden=24, tokens=300).stats
    apart = neighbour_distances(stats)
    pairs = sorted(range(5), key=lambda layer: apart[layer], reverse=order == "dissimilar")
    _, seen = by_kvsharer(order, lambda plan: len(plan.groups) == 6)
    assert seen[0] == [(layer,) for layer in range(6)]
    assert (pairs[0], pairs[0] + 1) in seen[1]
    plan, seen = by_kvsharer(order, lambda plan: -len(plan.groups))  # every merger does harm
    assert len(plan.groups) == 6 and [len(groups) for groups in seen] == [6, *[5] * 5]
    assert [next(g for g in groups if len(g) == 2)[0] for groups in seen[1:]] == pairs


def test_kvsharer_keeps_what_does_no_harm_and_the_largest_size() -> None:
    plan, _ = by_kvsharer("similar", lambda plan: float(any(set(group.layers) >= {2, 3} for group in plan.groups)))
    assert all(len(group.layers) <= 3 for group in plan.groups)
    assert {group.layers for group in plan.groups} == {(0, 1, 2), (3, 4, 5)}


def test_kvsharer_needs_the_model() -> None:
    stats = sampled(num_layers=3, head_dim=8, hidden=24, tokens=200).stats
    with pytest.raises(UsageError, match="measures on the model"):
        planned(
            stats, PlanConfig(planner="kvsharer", max_layers_per_group=2, tier_size=TIER), 30.0, None, 16, measure=None
        )


def test_pyramid_gives_lower_layers_more() -> None:
    stats = sampled(num_layers=6, head_dim=8, hidden=24, tokens=400).stats
    config = PlanConfig(planner="pyramid", max_layers_per_group=2, tier_size=TIER, bits=(2, 4))
    plan = planned(stats, config, 30.0, None, 16)
    bits = [row_bits(group.tier_bits) for group in plan.groups]
    assert bits == sorted(bits, reverse=True) and bits[0] > bits[-1]


@pytest.mark.parametrize("planner", sorted(PLANNERS))
def test_progress_counts_every_spectrum(planner: str) -> None:
    stats = sampled(num_layers=5, head_dim=8, hidden=24, tokens=200).stats
    steps: list[int] = []
    config = PlanConfig(planner=planner, max_layers_per_group=2, tier_size=TIER)
    PLANNERS[planner](Spectra(stats), config, Room(200), steps.append, lambda _: 0.0)
    if planner != "cluster":  # its number of groups is known only afterwards
        assert sum(steps) == count_candidates(config, 5)
    assert steps and set(steps) == {1}


@given(
    budget=st.floats(20, 2000),
    context=st.integers(1, 20_000),
    window=st.sampled_from((1, 16, 64, 128)),
    sinks=st.integers(0, 8),
    block=st.sampled_from((1, 16)),
    source=st.sampled_from(("group", "first")),
)
@settings(deadline=None, max_examples=60)
def test_latent_bits_fill_the_budget_and_no_more(
    budget: float, context: int, window: int, sinks: int, block: int, source: str
) -> None:
    """Counted slot by slot: what is kept exactly, what is encoded, and for `first` the window's rows as well."""
    config = PlanConfig(latent_input=INPUT[source], flush_block=block, tier_size=TIER)
    source_bytes = 2000
    exact = encoded = 0
    for _ in range(context):
        exact += 1
        if exact == window + block:
            exact, encoded = exact - block, encoded + block
    buffer = window + block
    rows = encoded + (buffer if source == "first" else 0)
    try:
        bits = latent_bits(config, budget=Budget(budget, context, window, sinks), source_bytes=source_bytes)
    except UsageError:
        left = budget * context - (buffer + sinks) * source_bytes
        assert rows == 0 or left * 8 / rows < row_bits([1])
        return
    row_bytes = bits / 8
    assert (buffer + sinks) * source_bytes + rows * row_bytes <= budget * context * (1 + 1e-12)
    assert (buffer + sinks) * source_bytes + rows * (row_bytes + 0.25) > budget * context


def test_latent_bits_without_a_context_are_the_budget() -> None:
    assert latent_bits(PlanConfig(), budget=Budget(100.5, None, 16, 4), source_bytes=2000) == 804


def test_no_window_needs_the_first_source() -> None:
    def bits(source: str) -> int:
        config = PlanConfig(latent_input=INPUT[source])
        return latent_bits(config, budget=Budget(100, 1000, 0, 0), source_bytes=2000)

    assert bits("first") == 800
    with pytest.raises(UsageError, match="--exact-window 0"):
        bits("group")


def test_a_budget_that_the_window_eats_names_the_remedy() -> None:
    with pytest.raises(UsageError, match="leaves nothing for latents") as caught:
        latent_bits(PlanConfig(), budget=Budget(100, 256, 128, 4), source_bytes=2000)
    assert "--budget-context" in caught.value.remedy


@given(st.floats(20, 2000), st.integers(100, 40_000))
@settings(deadline=None, max_examples=40)
def test_the_derived_window_is_the_largest_that_fits(budget: float, context: int) -> None:
    config = PlanConfig()
    window = derive_window(config, budget=budget, source_bytes=2000, context=context, sinks=4)

    def fits(size: int) -> bool:
        return (size + config.flush_block + 4) * 2000 <= WINDOW_SHARE * budget * context

    assert window == next((w for w in sorted(WINDOWS, reverse=True) if fits(w)), min(WINDOWS))


def test_the_derived_window_without_a_context_is_the_largest() -> None:
    assert derive_window(PlanConfig(), budget=1, source_bytes=10**6, context=None, sinks=4) == max(WINDOWS)


@pytest.mark.parametrize(
    ("share", "values", "source", "size"),
    (
        (0.25, 384, "group", 6),
        (0.0625, 384, "group", 6),
        (0.03, 384, "group", 12),
        (0.02, 384, "group", 16),
        (0.01, 384, "group", 16),
        (0.01, 1024, "group", 12),  # moments of no more than 12,288 values at once
        (0.01, 4096, "group", 6),
        (0.01, 384, "first", 6),
    ),
)
def test_group_sizes_follow_the_budget(share: float, values: int, source: str, size: int) -> None:
    assert derive_group_size(share, values, source) == size


@pytest.mark.parametrize("name", ("group", "sliding", "first"))
def test_weights_of_the_codec_and_what_layers_read(name: str) -> None:
    """As the model has them; from how many tokens on a sequence saves more than they take, by counting."""
    model = form(name)
    plan = Plan.from_json(model.config.clla)
    held = sum(x.numel() for x in model.codec.parameters()) * plan.kv_itemsize
    assert plan.codec_bytes == (None if name == "first" else held)
    ranks = [len(group.tier_bits) * plan.tier_size for group in plan.groups for _ in group.layers]
    assert plan.components_read == sum(ranks) / len(ranks)
    least = plan.break_even_beside(held)
    saved = [plan.source_bytes_per_token * c - plan.bytes_at(c) - held for c in range(1, 5000)]
    expected = next((c for c, s in enumerate(saved, 1) if s > 0), None)
    assert least == expected and (plan.break_even is None or least is None or least > plan.break_even)
