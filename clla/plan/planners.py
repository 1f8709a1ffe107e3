"""From Stats and a budget to a Plan. The registry at the end names the ways to partition the layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from clla.artifacts.stats import Stats
from clla.linalg import EXACT
from clla.plan.allocation import Candidate, Choice, Segment, candidate, every_segment, solve, uniform_segments
from clla.plan.partition import Outline, outlined_partition
from clla.plan.spectra import Spectra
from clla.recipe import PlanConfig

CHEAP = 512  # components of the largest group, up to which the spectra of all possible groups are computed
LEAST = 1.1  # prices: components of large groups that are worth less are not computed; a bit pays from 1.57 on


@dataclass(frozen=True)
class Room:
    """Attributes: bits: a token, for all latents; group_bits: of them, what every group takes beside its latent."""

    bits: int
    group_bits: int = 0


Choices = dict[Segment, Choice]
Damage = Callable[[Choices], float]  # measured on the model
Solver = Callable[[Spectra, PlanConfig, Room, Callable[[int], None], Damage], Choices]


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
        return len(every_segment(num_layers, min(config.group_size, num_layers)))
    if config.planner == "kvsharer" and config.group_size > 1:
        return num_layers - 1
    return -(-num_layers // config.group_size)


def _dynamic(
    spectra: Spectra, config: PlanConfig, room: Room, on_step: Callable[[int], None], damage: Damage
) -> Choices:
    count = len(spectra.stats.layers)
    largest = min(config.group_size, count)
    if spectra.source == "first" or spectra.rank(largest) <= CHEAP:
        return _within(spectra, every_segment(count, largest), config, room, on_step)
    segments = outlined_partition(
        spectra,
        max_layers_per_group=largest,
        bits=room.bits,
        group_bits=room.group_bits,
        widths=config.bits,
        reading_price=config.reading_price,
        on_step=on_step,
    )
    return _within(spectra, segments, config, room, lambda _: None)


def _uniform(
    spectra: Spectra, config: PlanConfig, room: Room, on_step: Callable[[int], None], damage: Damage
) -> Choices:
    segments = uniform_segments(len(spectra.stats.layers), config.group_size)
    return _within(spectra, segments, config, room, on_step)


def _pyramid(
    spectra: Spectra, config: PlanConfig, room: Room, on_step: Callable[[int], None], damage: Damage
) -> Choices:
    """Budgets falling linearly from the bottom to the top, as PyramidKV's (arXiv 2406.02069) shape."""
    segments = uniform_segments(len(spectra.stats.layers), config.group_size)
    left = room.bits - room.group_bits * len(segments)
    slope = torch.linspace(1.5, 0.5, len(segments), dtype=torch.float64)
    weight = slope * torch.tensor([size for _, size in segments], dtype=torch.float64)
    choices: Choices = {}
    for segment, share in zip(segments, (weight / weight.sum()).tolist(), strict=True):
        own = candidates_of(spectra, [segment], config.tier_size, on_step)
        alone = {(0, segment[1]): own[segment]}
        solved = solve(
            alone,
            num_layers=segment[1],
            budget_bits=int(left * share),
            widths=config.bits,
            tier_size=config.tier_size,
            reading_price=config.reading_price,
        )
        choices[segment] = solved[0, segment[1]]
    return choices


def _cluster(
    spectra: Spectra, config: PlanConfig, room: Room, on_step: Callable[[int], None], damage: Damage
) -> Choices:
    """Agglomerative clustering of neighbouring layers by how much weighted variance they share."""
    from sklearn.cluster import AgglomerativeClustering

    count = len(spectra.stats.layers)
    if count == 1 or config.group_size == 1:
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
        n_clusters=-(-count // config.group_size),
        metric="precomputed",
        linkage="average",
        connectivity=(chain + chain.mT).numpy(),
    ).fit_predict(distance.numpy())
    segments: list[Segment] = []
    for layer in range(count):
        start, size = segments[-1] if segments else (0, 0)
        if size and labels[layer] == labels[layer - 1] and size < config.group_size:
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
    if config.group_size == 1:
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
        if below + above > config.group_size:
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
        outline = Outline(spectra, config.bits, config.reading_price)
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
            reading_price=config.reading_price,
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
