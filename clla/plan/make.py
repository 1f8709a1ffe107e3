"""From statistics and a budget to a plan."""

from __future__ import annotations

from collections.abc import Callable

from clla.artifacts.plan import LayerGroup, Plan
from clla.artifacts.stats import Stats
from clla.errors import UsageError
from clla.modeling.quantize_clla import ROPE_TIER, RowLayout
from clla.plan.budget import Budget, latent_bits
from clla.plan.decoupled import DecoupledSpectra
from clla.plan.planners import PLANNERS, Choices, Room
from clla.plan.rate import SCALE_BITS
from clla.plan.spectra import Spectra
from clla.recipe import PlanConfig, Recipe
from clla.storage.files import digest


def plan_digest(stats_key: str, recipe: Recipe) -> str:
    """What a plan is made from: the stats, and a recipe's settled plan and budget."""
    return digest(stats_key, recipe.plan.model_dump(mode="json"), recipe.budget.model_dump(mode="json"))


def make_plan(
    stats: Stats,
    config: PlanConfig,
    *,
    budget: Budget,
    kv_itemsize: int,
    kept_layers: tuple[int, ...],
    kept_window: int,
    made_from: str,
    spectra: Spectra,
    measure: Callable[[Plan], float] | None = None,
    on_step: Callable[[int], None] = lambda _: None,
) -> Plan:
    """Choose layer groups, ranks and bits.

    Args:
        stats: moments and metric.
        config: planner, widths, group size.
        budget: what the cache may take.
        kv_itemsize: bytes of an exact component.
        kept_layers: left with the source's own cache.
        kept_window: their sliding window.
        made_from: hash of the stats and settings.
        spectra: weighted moments of `stats`.
        measure: damage that the model takes from a plan, for planners that look at the model.
        on_step: called after each step, for progress.

    Raises:
        UsageError: the budget does not hold window and sinks; the planner needs `measure`.
    """
    source_bytes = len(stats.layers) * stats.kv.values * kv_itemsize
    bits = latent_bits(config, budget, source_bytes=source_bytes)
    room = Room(bits, rotary_bits(config, spectra, bits) if isinstance(spectra, DecoupledSpectra) else 0)

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
            window=budget.window,
            sinks=budget.sinks,
            flush_block=config.flush_block,
            source=config.source,
            budget_bytes=budget.bytes,
            at_context=budget.context,
            made_from=made_from,
            kept_layers=kept_layers,
            kept_window=kept_window,
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
    groups = -(-len(spectra.stats.layers) // config.group_size)
    least = groups * (own + min(config.bits) * config.tier_size + SCALE_BITS)
    if bits < least:
        raise UsageError(
            f"{bits // 8} bytes per token do not hold {groups} rotary keys of {own // 8} bytes and their latents",
            expected=f"at least {-(-least // 8)} bytes",
            remedy="raise --kv-budget or plan.max_layers_per_group, or lower plan.qk_rope_head_dim or plan.rope_bits",
        )
    return own
