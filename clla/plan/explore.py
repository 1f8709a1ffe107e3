"""Plans for any budget from the statistics that a conversion kept; the model is not touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from clla import console
from clla.artifacts.plan import Plan
from clla.artifacts.stats import Stats
from clla.errors import CorruptArtifactError, UsageError
from clla.plan.allocation import every_segment
from clla.plan.budget import Budget, settle_budget
from clla.plan.kept_spectra import load_spectra, prepare, prepared, save_spectra, shapes_of, size_of, spectra_file
from clla.plan.make import make_plan, plan_digest
from clla.plan.metrics import metric_power, needs_inputs, weigh
from clla.plan.spectra import Spectra
from clla.recipe import Recipe
from clla.storage.filenames import CONFIG

EXPECTED = "the --work-dir of a conversion, or a statistics file in it"
REMEDY = "make one without converting: clla convert MODEL --work-dir DIR --dry-run"


@dataclass(frozen=True)
class Kept:
    """What a work directory knows of a model.

    Attributes:
        path: of the stats.
        shapes: the stats without their numbers.
        plan: of the last conversion, for what the stats do not hold: bytes of a value, layers left alone, context.
    """

    path: Path
    shapes: Stats
    plan: Plan

    @property
    def source_bytes(self) -> int:
        """KV bytes of one token over the convertible layers."""
        return self.plan.source_bytes_per_token


def find_kept(where: Path) -> Kept:
    """The newest stats in a work directory and a plan made from them.

    Args:
        where: work directory, stats file, or a checkpoint beside its unfinished run's work directory.

    Raises:
        UsageError: there are none.
        CorruptArtifactError: they cannot be read.
    """
    beside = where.with_name(where.name + ".work")
    folder = beside if (where / CONFIG).is_file() and beside.is_dir() else where
    if folder.is_file():
        files, folder = [folder], folder.parent
    else:
        files = sorted(folder.glob("stats-*.safetensors"), key=lambda file: file.stat().st_mtime)
    if not files:
        what = "is a checkpoint, which holds no statistics" if (where / CONFIG).is_file() else "holds none"
        found = what if where.exists() else "does not exist"
        raise UsageError(f"no statistics: {where} {found}", expected=EXPECTED, remedy=REMEDY)
    shapes = shapes_of(files[-1])
    for file in sorted(folder.glob("plan-*.json"), key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            plan = Plan.load(file)
        except CorruptArtifactError:
            continue
        same = plan.kv == shapes.kv and sorted(i for g in plan.groups for i in g.layers) == list(shapes.layers)
        if same and shapes.window in (0, plan.window):
            return Kept(files[-1], shapes, plan)
    raise UsageError(f"no plan beside {files[-1]}", expected=EXPECTED, remedy=REMEDY)


class Explorer:
    """Plans from kept statistics, all with the same metric and latent source.

    Args:
        kept: where they are.
        recipe: for the metric and the latent source.

    Raises:
        UsageError: the stats lack what these need.
    """

    def __init__(self, kept: Kept, recipe: Recipe) -> None:
        if recipe.plan.key == "decoupled":
            raise UsageError(
                "plans of decoupled keys from kept statistics",
                expected="plan.key 'reconstruct'",
                remedy=f"clla convert MODEL --work-dir {kept.path.parent} --dry-run with this recipe",
            )
        self.kept, self.recipe = kept, recipe
        if needs_inputs(recipe.plan.metric, recipe.plan.source) and kept.shapes.input_mean is None:
            raise UsageError(
                f"the statistics in {kept.path} hold no moments of the layers' inputs",
                expected="statistics of a conversion with the same latent source and metric",
                remedy=f"clla convert MODEL --work-dir {kept.path.parent} --dry-run with these settings",
            )
        self.path = kept.path.with_name(spectra_file(kept.shapes.made_from, recipe.plan))
        self._size = 0

    @cached_property
    def spectra(self) -> Spectra:
        """Those kept, or, where there are none, those of the stats."""
        plan = self.recipe.plan
        try:
            found = load_spectra(self.path, self.kept.shapes, metric_power(plan), plan.source, self._read)
        except CorruptArtifactError as error:
            if self.path.exists():
                console.say(f"Computed again: {error.got}")
            return self._read()
        self._size = size_of(found)
        return found

    def _read(self) -> Spectra:
        return weigh(Stats.load(self.kept.path), self.recipe)

    @property
    def ready(self) -> bool:
        """Whether `prepare` would do nothing: all is kept, or groups are too large to prepare all of them."""
        return prepared(self.spectra)

    @property
    def steps(self) -> int:
        """How many `prepare` takes."""
        layers, band = self.kept.shapes.covariance.shape[:2]
        return len(every_segment(layers, band))

    def prepare(self, on_step: Callable[[int], None]) -> None:
        """Compute what all budgets need and keep it, as far as it came if it is interrupted."""
        try:
            prepare(self.spectra, self.recipe.plan.bits, on_step)
        finally:
            self.save()

    def save(self) -> None:
        """Keep what was computed since, where there is anything new."""
        if (size := size_of(self.spectra)) > self._size:
            save_spectra(self.path, self.spectra, self.kept.shapes.made_from)
            self._size = size

    def settle(self, recipe: Recipe) -> Recipe:
        """The recipe with every default filled in, as `clla convert` does.

        Raises:
            UsageError: the budget does not fit, groups are larger than the moments', or the planner needs the model.
        """
        layers, band = self.kept.shapes.covariance.shape[:2]
        if recipe.plan.planner == "kvsharer":
            raise UsageError(
                "the planner 'kvsharer' measures on the model",
                expected="a planner that needs statistics alone: dynamic, uniform, cluster or pyramid",
                remedy="clla convert MODEL --planner kvsharer --dry-run",
            )
        if min(recipe.plan.max_layers_per_group or 1, layers) > band:
            raise UsageError(
                f"groups of up to {recipe.plan.max_layers_per_group} layers from moments of {band} neighbours",
                expected=f"--max-layers-per-group {band} or less",
                remedy="clla convert MODEL --dry-run with that --max-layers-per-group collects more",
            )
        window = recipe.budget.exact_window
        if window not in (None, self.kept.plan.window) and recipe.plan.metric == "fisher":
            raise UsageError(
                f"--exact-window {window} with statistics for a window of {self.kept.plan.window}, which count only "
                "what queries beyond it read",
                expected=f"--exact-window {self.kept.plan.window}",
                remedy=f"clla convert MODEL --exact-window {window} --dry-run collects others",
            )
        return self._settled(recipe, band)

    def _settled(self, recipe: Recipe, layers: int) -> Recipe:
        """The recipe as that of a conversion whose groups have no more than a number of layers."""
        if recipe.budget.exact_window is None:
            recipe = recipe.override({"budget": {"exact_window": self.kept.plan.window}})
        plan = self.kept.plan
        return settle_budget(
            recipe,
            source_bytes=self.kept.source_bytes,
            context=plan.at_context or 0,
            layers=layers,
            values=plan.kv.values,
        )

    def told_of_groups(self, recipes: Sequence[Recipe]) -> str | None:
        """What there is to say where a conversion would have longer groups than these statistics allow."""
        layers, band = self.kept.shapes.covariance.shape[:2]
        longest = max(self._settled(recipe, layers).plan.group_size for recipe in recipes)
        if longest <= band:
            return None
        return (
            f"Groups have at most {band} layers, as these statistics do; clla convert would collect others for up to "
            f"{longest} at the smallest budget"
        )

    def plan(self, recipe: Recipe) -> Plan:
        """The plan that a conversion would make.

        Raises:
            UsageError: as `settle`.
        """
        recipe, old = self.settle(recipe), self.kept.plan
        plan = make_plan(
            self.spectra.stats,
            recipe.plan,
            budget=Budget.of(recipe.budget, source_bytes=self.kept.source_bytes),
            kv_itemsize=old.kv_itemsize,
            kept_layers=old.kept_layers,
            kept_window=old.kept_window,
            made_from=plan_digest(self.kept.shapes.made_from, recipe),
            spectra=self.spectra,
        )
        return replace(plan, kept_slot_bytes=old.kept_slot_bytes, kept_state_bytes=old.kept_state_bytes)


def summary(budget: str, plan: Plan) -> dict[str, Any]:
    """One line of a sweep.

    Returns:
        `budget` as asked for; `bytes_per_token` in all at the plan's context and their `share` of the source's;
        `row_bytes` of the latents; `window`; number of `groups`; total `rank`; `mean_bits` of a component;
        `predicted_loss` in the metric's units.
    """
    tiers = [bits for group in plan.groups for bits in group.tier_bits]
    total = plan.bytes_at(plan.at_context) / plan.at_context if plan.at_context else float(plan.row_bytes)
    return {
        "budget": budget,
        "bytes_per_token": total,
        "share": total / plan.source_bytes_per_token,
        "row_bytes": plan.row_bytes,
        "window": plan.window,
        "groups": len(plan.groups),
        "rank": len(tiers) * plan.tier_size,
        "mean_bits": sum(tiers) / len(tiers) if tiers else 0.0,
        "predicted_loss": plan.predicted_loss,
    }
