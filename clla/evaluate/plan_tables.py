"""A plan as tables for the terminal."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby

from rich.table import Table

from clla.artifacts import Plan
from clla.modeling.quantize_clla import RowLayout, layout_of


def plan_tables(plan: Plan, predicted_kl: float | None) -> list[Table]:
    """The plan for the terminal: groups, ranks, bits by tier, bytes, predicted loss; KL where it is known."""
    table = Table(title="Plan")
    for title in ("layers", "rank", "bits:components", "bytes/token", "share of loss"):
        table.add_column(title, justify="right" if title not in ("layers", "bits:components") else "left")
    total = plan.predicted_loss or 1.0
    for group in plan.groups:
        first, last = group.layers[0], group.layers[-1]
        layout = RowLayout(group.tier_bits, plan.tier_size)
        packed = layout_of(asdict(group), {"tier_size": plan.tier_size, "rope_bits": plan.rope_bits})
        table.add_row(
            f"{first}–{last}" if first != last else str(first),
            str(layout.rank),
            bit_runs(layout),
            str(packed.row_bytes),
            f"{100 * group.predicted_loss / total:.1f} %",
        )
    at, rows_kept = plan.at_context, plan.capacity
    summary = Table(show_header=False, box=None)
    source = plan.source_bytes_per_token
    rows = [
        ("source KV", f"{source:,} bytes a token"),
        ("latents", f"{plan.row_bytes:,} bytes a token ({100 * plan.row_bytes / source:.2f} %)"),
        ("exact", f"window {plan.window} (+{plan.flush_block}), {plan.sinks} sinks: {plan.exact_bytes:,.0f} bytes"),
    ]
    if plan.decoupled:
        count = 2 * len(plan.groups[0].rope_pairs)
        rows.append(("rotary keys", f"{count} components a group of {plan.rope_bits} bits, counted with the latents"))
    if rows_kept is not None:
        rows.append(("eviction", f"a group keeps at most {rows_kept:,} latents, the most attended"))
    if at is not None:
        total_bytes = plan.bytes_at(at) / at
        rows.append((f"in all at {at:,}", f"{total_bytes:,.0f} bytes a token ({100 * total_bytes / source:.2f} %)"))
    if predicted_kl is not None:
        rows.append(("predicted KL", f"{predicted_kl:.4f} nats a token if no token were exact"))
    if plan.kept_layers:
        bounded = f"a window of {plan.kept_window} tokens" if plan.kept_window else "a state of fixed size"
        rows.append(("left alone", f"layers {list(plan.kept_layers)}: their cache is bounded by {bounded}"))
    for row in rows:
        summary.add_row(*row)
    return [table, summary]


def bit_runs(layout: RowLayout) -> str:
    """Bits and how many components have them, most important first: `6:16 4:120 2:64`."""
    runs = [(bits, len(list(run))) for bits, run in groupby(layout.tier_bits)]
    return " ".join(f"{bits}:{count * layout.tier_size}" for bits, count in runs)
