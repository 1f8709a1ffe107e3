"""Plans whose budget counts latents alone, as the benchmarks of quality state it."""

from __future__ import annotations

from clla.artifacts.plan import Plan
from clla.artifacts.stats import Stats
from clla.convert.stages import Run
from clla.plan.budget import Budget, derive_group_size
from clla.plan.make import make_plan
from clla.plan.spectra import Spectra
from clla.recipe import PlanConfig, parse_budget

SINKS = 4


def plan_latents(run: Run, spectra: Spectra, stats: Stats, config: PlanConfig, *, percent: float, window: int) -> Plan:
    """The plan whose latents take some percent of the source's cache.

    Args:
        run: whose source is converted.
        spectra: of the stats, weighted as `config` wants them.
        stats: of the source.
        config: planner, latent source, widths, …; where it names no size of groups it is that of a recipe with this
            budget.
        percent: of the source's bytes per token.
        window: newest tokens kept exact, on top.
    """
    if config.max_layers_per_group is None:
        size = min(derive_group_size(percent / 100, stats.width, config.source), stats.covariance.shape[1])
        config = config.model_copy(update={"max_layers_per_group": size})
    return make_plan(
        stats,
        config,
        budget=Budget(parse_budget(f"{percent}%", source_bytes=run.source.bytes_per_token), None, window, SINKS),
        kv_itemsize=run.source.dtype.itemsize,
        kept_layers=run.source.kept_layers,
        kept_window=run.source.kept_window,
        made_from="",
        spectra=spectra,
    )
