"""Plans whose budget counts latents alone, as the benchmarks of quality state it."""

from __future__ import annotations

from clla.artifacts.plan import Plan
from clla.artifacts.stats import Stats
from clla.convert.stages import Run
from clla.plan.budget import Budget
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
        config: planner, latent source, widths, …
        percent: of the source's bytes per token.
        window: newest tokens kept exact, on top.
    """
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
