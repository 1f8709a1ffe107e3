"""From Stats and a budget to a Plan. The registry at the end names the ways to partition the layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from clla.artifacts import EVICT_BYTES, LayerGroup, Plan, Stats, digest, encoded_slots, exact_bytes_of
from clla.errors import UsageError
from clla.linalg import EXACT
from clla.modeling.quantize_clla import ROPE_TIER, RowLayout
from clla.plan.allocation import Candidate, Choice, Segment, candidate, every_segment, solve, uniform_segments
from clla.plan.decoupled import DecoupledSpectra
from clla.plan.partition import Outline, outlined_partition
from clla.plan.rate import SCALE_BITS
from clla.plan.spectra import Spectra
from clla.recipe import PlanConfig, Recipe, parse_budget

WINDOWS = (128, 64, 32, 16)
CHEAP = 512  # components of the largest group, up to which the spectra of all possible groups are computed
LEAST = 1.1  # prices: components of large groups that are worth less are not computed; a bit pays from 1.57 on
WINDOW_SHARE = 1 / 3  # of the budget, at most, when the window is derived


@dataclass(frozen=True)
class Room:
    """Attributes: bits: a token, for all latents; group_bits: of them, what every group takes beside its latent."""

    bits: int
    group_bits: int = 0


Choices = dict[Segment, Choice]
Damage = Callable[[Choices], float]  # measured on the model
Solver = Callable[[Spectra, PlanConfig, Room, Callable[[int], None], Damage], Choices]


def derive_window(config: PlanConfig, *, budget: float, source_bytes: int, context: int | None, sinks: int) -> int:
    """Largest window among 128, 64, 32 and 16 that takes at most a third of the budget.

    Args:
        config: for the flush block and the latent source.
        budget: bytes a token.
        source_bytes: the source's KV bytes a token.
        context: at which the budget holds; None counts latents only.
        sinks: S.
    """
    if context is None:
        return WINDOWS[0]
    for window in WINDOWS:
        fixed = exact_bytes_of(source_bytes, budget, window, sinks, config.flush_block, config.source)
        if fixed <= WINDOW_SHARE * budget * context:
            return window
    return WINDOWS[-1]


def latent_bits(
    config: PlanConfig,
    *,
    budget: float,
    source_bytes: int,
    context: int | None,
    window: int,
    sinks: int,
    evict: float | None = None,
) -> int:
    """Bits a token that the budget leaves for the latents that stay.

    Raises:
        UsageError: eviction without a context or a window; window and sinks alone take more than the budget, or it
            leaves less than one tier.
    """
    if window == 0 and config.source == "group":
        raise UsageError(
            "--window 0 with the latent source 'group'",
            expected="a window of at least 1: a group's latent is known only after its last layer",
            remedy="use --window 1 or more, or --source first",
        )
    if evict is not None and (context is None or window == 0):
        raise UsageError(
            "eviction needs to know how many latents may stay, and an exact window whose queries choose them",
            expected="a context length and a window of at least 1",
            remedy="leave out --at-context 0 and --window 0, or --evict",
        )
    smallest = min(config.bits) * config.tier_size + SCALE_BITS
    if context is None:
        if budget * 8 < smallest:
            least = -(-smallest // 8)
            raise UsageError(
                f"the budget of {budget:.4g} bytes per token leaves nothing for latents",
                expected=f"at least {least} bytes ({100 * least / source_bytes:.2g} % of the source)",
                remedy="raise --kv-budget",
            )
        return int(budget * 8)
    fixed = exact_bytes_of(source_bytes, 0, window, sinks, config.flush_block, config.source)
    encoded = kept_rows(encoded_slots(context, window, config.flush_block), evict)
    carried = exact_bytes_of(0, 1, window, sinks, config.flush_block, config.source)  # rows of exact tokens
    bits = int((budget * context - fixed) / (encoded + carried) * 8) if encoded + carried else -1
    if bits < smallest:
        share = (fixed + (encoded + carried) * smallest / 8) / context
        raise UsageError(
            f"the budget of {budget:.0f} bytes a token at {context} tokens leaves nothing for latents: "
            f"the exact window ({window} + {config.flush_block}) and {sinks} sinks take {fixed / context:.0f}",
            expected=f"more than {share:.0f} bytes ({100 * share / source_bytes:.2f} % of the source)",
            remedy="raise --kv-budget or --at-context, lower --window, or lower plan.flush_block in a recipe",
        )
    return bits


def kept_rows(encoded: int, evict: float | None) -> int:
    """Latents that stay of those that a context has."""
    return encoded if evict is None else max(1, round(encoded * (1 - evict)))


def settle_budget(recipe: Recipe, *, source_bytes: int, context: int, layers: int) -> Recipe:
    """A recipe with context, window and group size filled in, and its budget checked.

    Args:
        recipe: what was asked for.
        source_bytes: the source's KV bytes a token.
        context: at which a budget holds that names none; 0 counts latents only.
        layers: convertible ones, L.

    Raises:
        UsageError: as `latent_bits` and `parse_budget`.
    """
    own = recipe.budget
    budget = parse_budget(own.kv_budget, source_bytes=source_bytes)
    at = context if own.at_context is None else own.at_context
    window = own.window
    if window is None:
        window = derive_window(
            recipe.plan, budget=budget, source_bytes=source_bytes, context=at or None, sinks=own.sinks
        )
    latent_bits(
        recipe.plan,
        budget=budget,
        source_bytes=source_bytes,
        context=at or None,
        window=window,
        sinks=own.sinks,
        evict=own.evict,
    )
    return recipe.override(
        {
            "budget": {"at_context": at, "window": window},
            "plan": {"max_group_size": min(recipe.plan.max_group_size, layers)},
        }
    )


def plan_digest(stats_key: str, recipe: Recipe) -> str:
    """What a plan is made from: the stats, and a recipe's settled plan and budget."""
    return digest(stats_key, recipe.plan.model_dump(mode="json"), recipe.budget.model_dump(mode="json"))


def make_plan(
    stats: Stats,
    config: PlanConfig,
    *,
    budget: float,
    context: int | None,
    window: int,
    sinks: int,
    kv_itemsize: int,
    kept_layers: tuple[int, ...],
    kept_window: int,
    made_from: str,
    spectra: Spectra,
    evict: float | None = None,
    measure: Callable[[Plan], float] | None = None,
    on_step: Callable[[int], None] = lambda _: None,
) -> Plan:
    """Choose layer groups, ranks and bits.

    Args:
        stats: moments and metric.
        config: planner, widths, group size.
        budget: bytes a token.
        context: at which the budget holds; None counts latents only.
        window: W.
        sinks: S.
        kv_itemsize: bytes of an exact component.
        kept_layers: left with the source's own cache.
        kept_window: their sliding window.
        made_from: hash of the stats and settings.
        spectra: weighted moments of `stats`.
        evict: share of the latents that leaves again at `context`.
        measure: damage that the model takes from a plan, for planners that look at the model.
        on_step: called after each step, for progress.

    Raises:
        UsageError: the budget does not hold window and sinks; the planner needs `measure`.
    """
    source_bytes = len(stats.layers) * stats.kv.values * kv_itemsize
    bits = latent_bits(
        config, budget=budget, source_bytes=source_bytes, context=context, window=window, sinks=sinks, evict=evict
    )
    capacity, room = None, Room(bits)
    if evict is not None and context is not None:
        capacity, room = (
            kept_rows(encoded_slots(context, window, config.flush_block), evict),
            Room(bits, 8 * EVICT_BYTES),
        )

    if isinstance(spectra, DecoupledSpectra):
        room = Room(bits, rotary_bits(config, spectra, bits))

    def plan_of(choices: Choices) -> Plan:
        groups = tuple(
            LayerGroup(
                tuple(stats.layers[start : start + size]),
                choice.bits,
                choice.loss,
                spectra.split(start, size).pairs if isinstance(spectra, DecoupledSpectra) else (),
            )
            for (start, size), choice in choices.items()
        )
        return Plan(
            groups=groups,
            kv=stats.kv,
            kv_itemsize=kv_itemsize,
            tier_size=config.tier_size,
            window=window,
            sinks=sinks,
            flush_block=config.flush_block,
            source=config.source,
            budget_bytes=budget,
            at_context=context,
            made_from=made_from,
            kept_layers=kept_layers,
            kept_window=kept_window,
            capacity=capacity,
            rope_bits=config.rope_bits if isinstance(spectra, DecoupledSpectra) else None,
        )

    def damage(choices: Choices) -> float:
        if measure is None:
            raise UsageError(
                f"the planner {config.planner!r} measures on the model", expected="a planner that needs no model here"
            )
        return measure(plan_of(choices))

    return plan_of(PLANNERS[config.planner](spectra, config, room, on_step, damage))


def rotary_bits(config: PlanConfig, spectra: DecoupledSpectra, bits: int) -> int:
    """What every group's rotary key takes, of the `bits` a token that there are for all groups.

    Raises:
        UsageError: even the fewest groups leave nothing for latents.
    """
    tiers = spectra.components // ROPE_TIER
    own = 8 * RowLayout((config.rope_bits,) * tiers, ROPE_TIER).row_bytes
    groups = -(-len(spectra.stats.layers) // config.max_group_size)
    least = groups * (own + min(config.bits) * config.tier_size + SCALE_BITS)
    if bits < least:
        raise UsageError(
            f"{bits // 8} bytes a token do not hold {groups} rotary keys of {own // 8} bytes and their latents",
            expected=f"at least {-(-least // 8)} bytes",
            remedy="raise --kv-budget or plan.max_group_size, or lower plan.rope_components or plan.rope_bits",
        )
    return own


def candidates_of(
    spectra: Spectra,
    segments: list[Segment],
    tier_size: int,
    on_step: Callable[[int], None],
    counts: dict[Segment, int] | None = None,
) -> dict[Segment, Candidate]:
    """Spectra of the segments, cut into tiers; of large ones no more components than `counts`."""
    found = {}
    for segment in segments:
        count = None if counts is None else counts[segment]
        found[segment] = candidate(spectra.eigenvalues(*segment, count), spectra.energy(*segment), tier_size)
        on_step(1)
    return found


def count_candidates(config: PlanConfig, num_layers: int) -> int:
    """How many steps a planner takes, for progress: spectra that it computes, or mergers that it tries."""
    if config.planner == "dynamic":
        return len(every_segment(num_layers, min(config.max_group_size, num_layers)))
    if config.planner == "kvsharer" and config.max_group_size > 1:
        return num_layers - 1
    return -(-num_layers // config.max_group_size)


def _dynamic(
    spectra: Spectra, config: PlanConfig, room: Room, on_step: Callable[[int], None], damage: Damage
) -> Choices:
    count = len(spectra.stats.layers)
    largest = min(config.max_group_size, count)
    if spectra.source == "first" or spectra.rank(largest) <= CHEAP:
        return _within(spectra, every_segment(count, largest), config, room, on_step)
    segments = outlined_partition(
        spectra,
        max_group_size=largest,
        bits=room.bits,
        group_bits=room.group_bits,
        widths=config.bits,
        on_step=on_step,
    )
    return _within(spectra, segments, config, room, lambda _: None)


def _uniform(
    spectra: Spectra, config: PlanConfig, room: Room, on_step: Callable[[int], None], damage: Damage
) -> Choices:
    segments = uniform_segments(len(spectra.stats.layers), config.max_group_size)
    return _within(spectra, segments, config, room, on_step)


def _pyramid(
    spectra: Spectra, config: PlanConfig, room: Room, on_step: Callable[[int], None], damage: Damage
) -> Choices:
    """Budgets falling linearly from the bottom to the top, as PyramidKV's (arXiv 2406.02069) shape."""
    segments = uniform_segments(len(spectra.stats.layers), config.max_group_size)
    left = room.bits - room.group_bits * len(segments)
    slope = torch.linspace(1.5, 0.5, len(segments), dtype=torch.float64)
    weight = slope * torch.tensor([size for _, size in segments], dtype=torch.float64)
    choices: Choices = {}
    for segment, share in zip(segments, (weight / weight.sum()).tolist(), strict=True):
        own = candidates_of(spectra, [segment], config.tier_size, on_step)
        alone = {(0, segment[1]): own[segment]}
        solved = solve(
            alone, num_layers=segment[1], budget_bits=int(left * share), widths=config.bits, tier_size=config.tier_size
        )
        choices[segment] = solved[0, segment[1]]
    return choices


def _cluster(
    spectra: Spectra, config: PlanConfig, room: Room, on_step: Callable[[int], None], damage: Damage
) -> Choices:
    """Agglomerative clustering of neighbouring layers by how much weighted variance they share."""
    from sklearn.cluster import AgglomerativeClustering

    count = len(spectra.stats.layers)
    if count == 1 or config.max_group_size == 1:
        return _uniform(spectra, config, room, on_step, damage)
    distance = torch.ones(count, count, dtype=torch.float64)
    norms = spectra.weighted[:, 0].double().flatten(1).norm(dim=1)
    for j in range(min(spectra.weighted.shape[1], count)):
        for a in range(count - j):
            # Cosine between the subspaces' moments: 1 where the layers' values predict each other.
            shared = float(spectra.weighted[a, j].double().norm() / (norms[a] * norms[a + j]).sqrt())
            distance[a, a + j] = distance[a + j, a] = max(0.0, 1.0 - shared)
    chain = torch.diag(torch.ones(count - 1), 1)
    labels = AgglomerativeClustering(
        n_clusters=-(-count // config.max_group_size),
        metric="precomputed",
        linkage="average",
        connectivity=(chain + chain.mT).numpy(),
    ).fit_predict(distance.numpy())
    segments: list[Segment] = []
    for layer in range(count):
        start, size = segments[-1] if segments else (0, 0)
        if size and labels[layer] == labels[layer - 1] and size < config.max_group_size:
            segments[-1] = (start, size + 1)
        else:
            segments.append((layer, 1))
    return _within(spectra, segments, config, room, on_step)


def _kvsharer(
    spectra: Spectra, config: PlanConfig, room: Room, on_step: Callable[[int], None], damage: Damage
) -> Choices:
    """KVSharer's search (arXiv 2410.18517) for layer groups: neighbours by their distance, kept by measured damage.

    From groups of one layer on, the groups of two neighbouring layers are merged, and stay so unless the model
    running on the plan, at the same bytes, takes more damage. Pairs come in the order of the root mean square
    distance of their keys and values; the paper tries unlike layers first.
    """
    count, sign = len(spectra.stats.layers), -1 if config.sharing_order == "dissimilar" else 1
    if config.max_group_size == 1:
        return _uniform(spectra, config, room, on_step, damage)
    segments = [(layer, 1) for layer in range(count)]
    chosen = _within(spectra, segments, config, room, lambda _: None)
    least = damage(chosen)
    apart = neighbour_distances(spectra.stats)
    for pair in sorted(range(count - 1), key=lambda layer: sign * apart[layer]):
        on_step(1)
        cut = next((i for i, (start, _) in enumerate(segments) if start == pair + 1), None)
        assert cut, "two neighbours are merged but once"
        (start, below), (_, above) = segments[cut - 1 : cut + 1]
        if below + above > config.max_group_size:
            continue
        tried = [*segments[: cut - 1], (start, below + above), *segments[cut + 1 :]]
        choices = _within(spectra, tried, config, room, lambda _: None)
        found = damage(choices)
        if found <= least:
            segments, chosen, least = tried, choices, found
    return chosen


def neighbour_distances(stats: Stats) -> list[float]:
    """(E‖y_l - y_{l+1}‖²)^½ of neighbouring layers' keys (before RoPE) and values, L - 1 of them."""
    energy = stats.covariance[:, 0].double().diagonal(dim1=-2, dim2=-1).sum(-1)
    crossed = stats.covariance[:-1, 1].double()
    if stats.writing is None:
        shared = crossed.diagonal(dim1=-2, dim2=-1).sum(-1)
    else:  # coordinates are orthonormal in each layer, but not the same in two
        shared = (crossed * (stats.writing[:-1].mT @ stats.writing[1:]).double()).sum((-2, -1))
    between = stats.mean.double().diff(dim=0).square().sum(-1)
    return (energy[:-1] + energy[1:] - 2 * shared + between).clamp_min(0).sqrt().tolist()


def _within(
    spectra: Spectra, segments: list[Segment], config: PlanConfig, room: Room, on_step: Callable[[int], None]
) -> Choices:
    """Bits of the groups of a partition. Of large groups only components are computed that may be worth a bit."""
    ranks = {segment: spectra.rank(segment[1]) for segment in segments}
    counts = dict(ranks)
    if spectra.source == "group" and max(ranks.values()) > EXACT:
        outline = Outline(spectra, config.bits)
        price = outline.price_of(segments, room.bits - room.group_bits * len(segments))
        least = LEAST * price
        counts = {s: min(rank, round(outline.count(s, least)) + config.tier_size) for s, rank in ranks.items()}
    while True:
        options = candidates_of(spectra, segments, config.tier_size, on_step, counts)
        chosen = solve(
            options,
            num_layers=len(spectra.stats.layers),
            budget_bits=room.bits,
            widths=config.bits,
            tier_size=config.tier_size,
            group_bits=room.group_bits,
        )
        short = [s for s, c in chosen.items() if len(c.bits) == len(options[s].tiers) and counts[s] < ranks[s]]
        if not short:
            return chosen
        counts |= {s: min(ranks[s], counts[s] * 5 // 4) for s in short}  # more of them would have been coded


PLANNERS: dict[str, Solver] = {
    "dynamic": _dynamic,
    "uniform": _uniform,
    "cluster": _cluster,
    "pyramid": _pyramid,
    "kvsharer": _kvsharer,
}
