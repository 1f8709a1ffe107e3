"""Spectra without their moments: what planning has computed, in a file of a few megabytes beside the stats.

Eigenvalues and log-determinants of groups do not depend on the budget. A plan from kept ones is the plan from the stats
themselves; what is lacking is computed from these and kept, too.

Shape legend: L layers, K band, q coordinates of the moments, h hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from clla.artifacts.plan import KVShape
from clla.artifacts.stats import Stats
from clla.linalg import EXACT
from clla.plan.allocation import every_segment
from clla.plan.partition import outlined_partition
from clla.plan.planners import CHEAP
from clla.plan.spectra import CPU, Spectra
from clla.recipe import PlanConfig
from clla.storage.files import digest, load_tensors, read_header, save_tensors

KIND = "spectra"
SHARES = (0.0025, 0.5)  # of 16 bits per value: budgets between these find all they need


@dataclass(frozen=True)
class KeptSpectra(Spectra):
    """Spectra whose moments are read only where something was not kept.

    Args:
        stats: shapes alone (`shapes_of`), on the meta device.
        totals: `energy` of 1 … K layers from each on, [L, K], fp64.
        read: the spectra that these were taken from.
    """

    totals: Tensor | None = None
    read: Callable[[], Spectra] | None = None

    @cached_property
    def whole(self) -> Spectra:
        """The spectra with their moments."""
        assert self.read is not None
        return self.read()

    @cached_property
    def weighted(self) -> Tensor:
        """As of `Spectra`."""
        return self.whole.weighted

    def moments(self, start: int, size: int) -> Tensor:
        """As of `Spectra`."""
        return self.whole.moments(start, size)

    def energy(self, start: int, size: int) -> float:
        """As of `Spectra`."""
        assert self.totals is not None
        return float(self.totals[start, size - 1])


def spectra_file(stats_key: str, config: PlanConfig) -> str:
    """Name of the file, beside the stats, for settings that spectra depend on."""
    return f"{KIND}-{digest(stats_key, config.metric, config.metric_power, config.source)}.safetensors"


def save_spectra(path: Path, spectra: Spectra, stats_key: str) -> None:
    """Write down all that was computed.

    Args:
        path: of the file.
        spectra: of which.
        stats_key: hash of the stats' settings.
    """
    layers, band = spectra.stats.covariance.shape[:2]
    totals = torch.zeros(layers, band, dtype=torch.float64)
    for start, size in every_segment(layers, band):
        totals[start, size - 1] = spectra.energy(start, size)
    values = {segment: found.cpu() for segment, (found, _) in spectra._found.items()}
    sums = spectra._determinants
    tensors = {
        "totals": totals,
        "segments": torch.tensor([[*s, len(v)] for s, v in values.items()], dtype=torch.long).view(-1, 3),
        "values": torch.cat(list(values.values())) if values else torch.empty(0),
        "factors": torch.tensor(list(sums), dtype=torch.long).view(-1, 3),
        "sums": torch.tensor([s for found in sums.values() for s in found], dtype=torch.float64),
    }
    save_tensors(path, tensors, KIND, {"stats": stats_key})


def load_spectra(path: Path, stats: Stats, power: float, source: str, read: Callable[[], Spectra]) -> KeptSpectra:
    """What `save_spectra` wrote.

    Args:
        path: of the file.
        stats: shapes (`shapes_of`).
        power: exponent of the metric.
        source: of the latents.
        read: gives the spectra with their moments.

    Raises:
        CorruptArtifactError: the file is damaged.
    """
    tensors, _ = load_tensors(path, KIND)
    kept = KeptSpectra(stats, power, source, CPU, tensors["totals"], read)
    parts = tensors["values"].split(tensors["segments"][:, 2].tolist())
    for (start, size, _), values in zip(tensors["segments"].tolist(), parts, strict=True):
        kept._found[start, size] = values, None
    factors = tensors["factors"].tolist()
    logs = iter(tensors["sums"].tolist())
    for start, largest, level in factors:
        kept._determinants[start, largest, level] = [next(logs) for _ in range(largest)]
    return kept


def shapes_of(path: Path) -> Stats:
    """The stats in a file without their numbers: tensors are on the meta device.

    Raises:
        CorruptArtifactError: no stats.
    """
    meta, shapes = read_header(path, "stats")
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return Stats(**{**meta, "layers": tuple(meta["layers"]), "kv": KVShape(**meta["kv"]), **tensors})


def prepare(spectra: Spectra, widths: tuple[int, ...], on_step: Callable[[int], None] = lambda _: None) -> None:
    """Compute what any budget needs, of groups that are not too large for all their eigenvalues.

    Args:
        spectra: to fill.
        widths: admissible bits per component.
        on_step: called after each group, for progress.
    """
    layers, band = spectra.stats.covariance.shape[:2]
    if not preparable(spectra):
        return
    for start, size in every_segment(layers, band):
        spectra.eigenvalues(start, size)
        on_step(1)
    if spectra.source == "first" or spectra.rank(min(band, layers)) <= CHEAP:
        return
    for share in SHARES:
        bits = int(share * 16 * layers * spectra.stats.width)
        outlined_partition(spectra, max_layers_per_group=band, bits=bits, group_bits=0, widths=widths)
    for alone in (True, False):
        used = [level for _, size, level in spectra._determinants if (size == 1) == alone]
        levels = range(min(used), max(used) + 1) if used else ()
        for start in range(layers):
            spectra.log_determinants(start, 1 if alone else min(band, layers - start), levels)


def preparable(spectra: Spectra) -> bool:
    """Whether all eigenvalues of all groups are computed in a minute rather than an hour."""
    layers, band = spectra.stats.covariance.shape[:2]
    return spectra.rank(min(band, layers)) <= EXACT


def prepared(spectra: Spectra) -> bool:
    """Whether `prepare` has nothing left to do."""
    layers, band = spectra.stats.covariance.shape[:2]
    return not preparable(spectra) or len(spectra._found) == len(every_segment(layers, band))


def size_of(spectra: Spectra) -> int:
    """How much was computed: grows with every group and sum."""
    return sum(len(values) for values, _ in spectra._found.values()) + len(spectra._determinants)
