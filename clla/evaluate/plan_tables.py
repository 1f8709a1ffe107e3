"""A plan as tables, and how its layers and bits are written."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from clla.artifacts.plan import LayerGroup, Plan
from clla.tables import Table


def groups_table(plan: Plan) -> Table:
    """Layers, rank, bits, bytes and predicted loss of each layer group."""
    total = plan.predicted_loss or 1.0
    rows = [
        (
            span(group.layers),
            bit_runs(group, plan.tier_size),
            f"{len(group.tier_bits) * plan.tier_size:,}",
            f"{plan.row_bytes_of(group):,}",
            f"{100 * group.predicted_loss / total:.1f} %",
        )
        for group in plan.groups
    ]
    return Table.of(("layers", "bits:components", "rank", "bytes per token", "of loss"), rows, title="Plan", words=2)


def plan_tables(plan: Plan, predicted_kl: float | None) -> list[Table]:
    """Groups, and the plan as a whole: bytes, what stays exact, and KL where it is known."""
    at, source = plan.at_context, plan.source_bytes_per_token
    rows = [
        ("source KV", f"{source:,} bytes per token"),
        ("latents", f"{plan.row_bytes:,} bytes per token ({100 * plan.row_bytes / source:.2f} %)"),
        ("exact", f"window {plan.window} (+{plan.flush_block}), {plan.sinks} sinks: {plan.exact_bytes:,.0f} bytes"),
    ]
    if plan.codec_bytes is not None:
        from_ = plan.break_even_beside(plan.codec_bytes)
        pays = "more than is saved" if from_ is None else f"with them memory is saved from {from_:,} tokens on"
        rows.append(("weights of the codec", f"{plan.codec_bytes / 1e6:,.1f} MB; {pays}"))
    rows.append(("read per layer", f"{plan.components_read:,.0f} components per token"))
    if plan.decoupled:
        count = 2 * len(plan.groups[0].rope_pairs)
        rows.append(("rotary keys", f"{count} components per group of {plan.rope_bits} bits, counted with the latents"))
    if at is not None:
        total_bytes = plan.bytes_at(at) / at
        rows.append((f"in all at {at:,}", f"{total_bytes:,.0f} bytes per token ({100 * total_bytes / source:.2f} %)"))
    if predicted_kl is not None:
        rows.append(predicted_row(predicted_kl))
    if plan.kept_layers:
        rows.append(("left alone", f"layers {list(plan.kept_layers)}: their cache is bounded by {plan.bound}"))
    return [groups_table(plan), Table.of((), rows, words=2)]


def predicted_row(kl: float) -> tuple[str, str]:
    """What is predicted of a plan, in nats per token, and how far that can be trusted."""
    return "predicted KL", f"{kl:.4f} nats per token by second order; six to fourteen times that was measured"


def bit_runs(group: LayerGroup, tier_size: int) -> str:
    """Bits and how many components have them, most important first: `6:16 4:120 2:64`."""
    return " ".join(f"{bits}:{stop - first}" for bits, first, stop in runs_of(group, tier_size))


def runs_of(group: LayerGroup, tier_size: int) -> list[tuple[int, int, int]]:
    """(bits, first component, last + 1) of each width, most important first."""
    runs, first = [], 0
    for bits, tiers in groupby(group.tier_bits):
        stop = first + len(list(tiers)) * tier_size
        runs.append((bits, first, stop))
        first = stop
    return runs


def span(layers: Sequence[int]) -> str:
    """Layers in a few characters: 4, 1–6, 3, 7–9."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
