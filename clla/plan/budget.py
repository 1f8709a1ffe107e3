"""From a budget to the bits that the latents get: the exact window and the sinks counted."""

from __future__ import annotations

from dataclasses import dataclass

from clla.artifacts.plan import encoded_slots, exact_bytes_of
from clla.errors import UsageError
from clla.plan.rate import SCALE_BITS
from clla.recipe import BudgetConfig, PlanConfig, Recipe, parse_budget

WINDOWS = (128, 64, 32, 16)
WINDOW_SHARE = 1 / 3  # of the budget, at most, when the window is derived
GROUP_SIZE, GROUP_SHARE = 6, 1 / 16  # layers per group, enough for this share of the source's bytes
LARGEST_GROUP = 16  # layers; all of them are too many for the calibration text
COORDINATES = 12_288  # of a group: the time that its moments take grows with their third power


@dataclass(frozen=True)
class Budget:
    """What the cache may take.

    Attributes:
        bytes: per token.
        context: tokens at which the budget holds; None counts latents only.
        window: exact newest tokens, W.
        sinks: exact first tokens, S.
    """

    bytes: float
    context: int | None
    window: int
    sinks: int

    @classmethod
    def of(cls, config: BudgetConfig, *, source_bytes: float) -> Budget:
        """A settled recipe's budget, of a source with `source_bytes` KV bytes per token."""
        assert config.exact_window is not None, "the recipe is settled"
        amount = parse_budget(config.kv_budget, source_bytes=source_bytes)
        return cls(amount, config.budget_context or None, config.exact_window, config.num_sinks)


def derive_window(config: PlanConfig, *, budget: float, source_bytes: int, context: int | None, sinks: int) -> int:
    """Largest window among 128, 64, 32 and 16 that takes at most a third of the budget.

    Args:
        config: for the flush block and the latent source.
        budget: bytes per token.
        source_bytes: the source's KV bytes per token.
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


def derive_group_size(share: float, values: int, source: str = "group") -> int:
    """Most layers per group: as many as keep the components that a layer reads about the same.

    Longer groups lose less, but a latent's components grow with its layers and with the budget, and every layer of the
    group reads them all.

    Args:
        share: budget as a share of the source's bytes.
        values: coordinates of a layer's moments.
        source: of the latents; one made from the first layer's input says little of layers far above it.
    """
    if source == "first":
        return GROUP_SIZE
    most = min(LARGEST_GROUP, COORDINATES // values, round(GROUP_SIZE * GROUP_SHARE / share))
    return max(GROUP_SIZE, most)


def latent_bits(config: PlanConfig, budget: Budget, *, source_bytes: int) -> int:
    """Bits per token that the budget leaves for the latents.

    Raises:
        UsageError: no window for latents of all layers; window and sinks alone take more than the budget, or it leaves
            less than one tier.
    """
    context, window, sinks = budget.context, budget.window, budget.sinks
    if window == 0 and config.source == "group":
        raise UsageError(
            "--exact-window 0 with --latent-input all_layers",
            expected="a window of at least 1: a group's latent is known only after its last layer",
            remedy="use --exact-window 1 or more, or --latent-input first_layer",
        )
    smallest = min(config.bits) * config.tier_size + SCALE_BITS
    if context is None:
        if budget.bytes * 8 < smallest:
            least = -(-smallest // 8)
            raise UsageError(
                f"the budget of {budget.bytes:.4g} bytes per token leaves nothing for latents",
                expected=f"at least {least} bytes ({100 * least / source_bytes:.2g} % of the source)",
                remedy="raise --kv-budget",
            )
        return int(budget.bytes * 8)
    fixed = exact_bytes_of(source_bytes, 0, window, sinks, config.flush_block, config.source)
    encoded = encoded_slots(context, window, config.flush_block)
    carried = exact_bytes_of(0, 1, window, sinks, config.flush_block, config.source)  # rows of exact tokens
    bits = int((budget.bytes * context - fixed) / (encoded + carried) * 8) if encoded + carried else -1
    if bits < smallest:
        share = (fixed + (encoded + carried) * smallest / 8) / context
        raise UsageError(
            f"the budget of {budget.bytes:.0f} bytes per token at {context} tokens leaves nothing for latents: "
            f"the exact window ({window} + {config.flush_block}) and {sinks} sinks take {fixed / context:.0f}",
            expected=f"more than {share:.0f} bytes ({100 * share / source_bytes:.2f} % of the source)",
            remedy="raise --kv-budget or --budget-context, lower --exact-window, or lower plan.flush_block in a recipe",
        )
    return bits


def settle_budget(recipe: Recipe, *, source_bytes: int, context: int, layers: int, values: int) -> Recipe:
    """A recipe with context, window and group size filled in, and its budget checked.

    Args:
        recipe: what was asked for.
        source_bytes: the source's KV bytes per token.
        context: at which a budget holds that names none; 0 counts latents only.
        layers: convertible ones, L.
        values: that each of them caches per token, n.

    Raises:
        UsageError: as `latent_bits` and `parse_budget`.
    """
    own = recipe.budget
    budget = parse_budget(own.kv_budget, source_bytes=source_bytes)
    at = context if own.budget_context is None else own.budget_context
    window = own.exact_window
    if window is None:
        window = derive_window(
            recipe.plan, budget=budget, source_bytes=source_bytes, context=at or None, sinks=own.num_sinks
        )
    latent_bits(recipe.plan, Budget(budget, at or None, window, own.num_sinks), source_bytes=source_bytes)
    group = recipe.plan.max_layers_per_group or derive_group_size(
        budget / source_bytes, min(values, recipe.calibration.basis), recipe.plan.source
    )
    return recipe.override(
        {
            "budget": {"budget_context": at, "exact_window": window},
            "plan": {"max_layers_per_group": min(group, layers)},
        }
    )
