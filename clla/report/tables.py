"""Sentences and tables of the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from clla.artifacts.plan import Plan
from clla.evaluate.plan_tables import predicted_row
from clla.report import words
from clla.report.charts import Measured
from clla.report.data import PageData
from clla.report.samples import Sample
from clla.tables import Table

SIZES = (1e9, 8e9, 24e9, 80e9)
ENDLESS = 1 << 50  # tokens


@dataclass(frozen=True)
class Tile:
    """One figure of the head. Attributes: value; what it is; note."""

    value: str
    title: str
    note: str


def headline(data: PageData) -> str:
    """The numbers that matter, in one sentence."""
    plan, context = data.plan, data.context
    own, source = plan.bytes_at(context) / context, plan.source_bytes_per_token
    what = f"the cache of the {words.count(plan.num_layers, 'converted layer')}" if plan.kept_layers else "the cache"
    text = (
        f"At {context:,} tokens {what} takes {own:,.0f} bytes per token instead of {source:,} "
        f"({words.percent(own / source)}, {source / own:.3g} times less)"
    )
    if data.file.report is None:
        return text + "; what that costs was not measured."
    quality = data.file.report.quality
    before, after = quality["source"]["perplexity"], quality["converted"]["perplexity"]
    return (
        f"{text}; perplexity goes from {before:.3f} to {after:.3f} ({100 * (after / before - 1):+.2f} %), "
        f"with a KL of {quality['converted']['kl']:.4f} nats per token to the source."
    )


def tiles(data: PageData) -> list[Tile]:
    """Figures that stand above everything."""
    plan, context = data.plan, data.context
    own, source = plan.bytes_at(context) / context, plan.source_bytes_per_token
    whose = "of these layers' cache" if plan.kept_layers else "of the source's cache"
    found = [
        Tile(words.percent(own / source), whose, f"at {context:,} tokens"),
        Tile(f"{own:,.0f} B", "per token", f"source {source:,} B"),
    ]
    if data.file.report is not None:
        quality = data.file.report.quality
        before, after = quality["source"]["perplexity"], quality["converted"]["perplexity"]
        found.append(Tile(f"{100 * (after / before - 1):+.2f} %", "perplexity", f"{before:.3f} → {after:.3f}"))
        found.append(Tile(f"{quality['converted']['kl']:.4f}", "KL, nats per token", "to the source"))
    if plan.break_even is not None and plan.break_even > 1:
        whole = None if plan.codec_bytes is None else plan.break_even_beside(plan.codec_bytes)
        note = "than the source's cache" if whole is None else f"with the codec's weights: {whole:,}"
        found.append(Tile(f"{plan.break_even:,}", "tokens until it is smaller", note))
    return found


def measured_points(data: PageData) -> list[Measured]:
    """Points of the picture of quality."""
    if data.file.report is None:
        return []
    found = []
    if data.file.before is not None:
        row = data.file.before.quality["converted"]
        found.append(Measured("before", "before healing", row["bytes_per_token"], row["kl"]))
    for name, row in data.file.report.quality.items():
        if name != "source":
            found.append(
                Measured("own" if name == "converted" else "other", _brief(name), row["bytes_per_token"], row["kl"])
            )
    return [point for point in found if point.kl > 0]


def frontier(data: PageData) -> list[tuple[float, float]]:
    """(bytes per token, KL) that the plan expects of other budgets, scaled to what was measured of this one."""
    report, expected = data.file.report, data.file.outlook.get("frontier") or {}
    if report is None or not expected.get("row_bytes"):
        return []
    if data.file.healing is not None and data.file.before is None:
        return []
    kl = (data.file.before or report).quality["converted"]["kl"]
    kept = data.plan.kept_bytes_at(report.context)
    return [
        ((data.plan.bytes_at(report.context, row) + kept) / report.context, loss * kl)
        for row, loss in zip(expected["row_bytes"], expected["loss"], strict=True)
    ]


def fits_table(plan: Plan) -> Table:
    """How long one sequence may be for its cache to fit."""

    def longest(nbytes: Callable[[int], float], room: float) -> int:
        low, high = 0, ENDLESS
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if nbytes(middle) <= room else (low, middle - 1)
        return low

    rows = []
    for room in SIZES:
        source = longest(lambda c: plan.source_bytes_per_token * c + plan.kept_bytes_at(c), room)
        own = longest(lambda c: plan.bytes_at(c) + plan.kept_bytes_at(c), room)
        times = f"{own / source:.1f} ×" if source and own < ENDLESS else ""
        rows.append((words.size(room), f"{source:,}", f"{own:,}" if own < ENDLESS else "any", times))
    return Table.of(("cache memory", "source, tokens", "converted, tokens", ""), rows)


def parts_table(data: PageData) -> Table:
    """What the bytes per token consist of."""
    plan, context = data.plan, data.context
    whole = plan.bytes_at(context) + plan.kept_bytes_at(context)
    exact_bytes = plan.exact_bytes_at(context)
    latents = plan.bytes_at(context) - exact_bytes
    exact = f"exact: newest {plan.window} to {plan.window + plan.flush_block} tokens, {plan.sinks} sinks"
    parts = [(exact, exact_bytes), (f"latents of {words.count(len(plan.groups), 'group')}", latents)]
    if plan.kept_bytes_at(context):
        parts.append((f"{words.count(len(plan.kept_layers), 'layer')} kept as they are", plan.kept_bytes_at(context)))
    rows = [(name, f"{nbytes / context:,.0f}", words.percent(nbytes / whole)) for name, nbytes in parts]
    return Table.of((f"at {context:,} tokens", "bytes per token", "share"), rows)


def layer_table(data: PageData) -> Table:
    """Errors of every layer."""
    rows = [
        [str(e.layer), *("" if part is None else words.percent(part) for part in (e.key, e.value, e.output))]
        for e in data.errors
    ]
    return Table.of(("layer", "keys", "values", "attention output"), rows)


def parted_exactly(sample: Sample, data: PageData) -> bool:
    """Whether two continuations part before a latent is read, on the same weights: nothing but rounding differs."""
    return data.healed in ("", "codec") and (sample.coded_from is None or sample.same < sample.coded_from)


def settings(data: PageData) -> list[tuple[str, str]]:
    """How it was made, in pairs."""
    plan, recipe = data.plan, data.recipe
    found: list[tuple[str, str]] = [("source", f"{data.name} ({data.shape})")]
    if recipe is not None:
        found.append(("budget", f"{recipe.budget.kv_budget} at {data.context:,} tokens"))
        calibration = recipe.calibration
        found.append(("calibrated on", f"{calibration.tokens or 0:,} tokens of {data.dataset}"))
        found.append(("planner", f"{recipe.plan.planner}, groups of up to {recipe.plan.group_size} layers"))
    found.append(("latent input", "all layers of a group" if plan.source == "group" else "its first layer"))
    if data.file.predicted_kl is not None:
        found.append(predicted_row(data.file.predicted_kl))
    if kept := data.file.reduction:
        found.append(("moments", f"in {kept['coordinates']:,.0f} of {kept['of']:,.0f} coordinates"))
    found.append(("trained", data.healed or "nothing; the weights are the source's"))
    if recipe is not None and recipe.provenance is not None:
        found.append(("made with", ", ".join(f"{k} {v}" for k, v in recipe.provenance.versions.items())))
    found.append(("this page", f"clla {data.version}, {data.made}"))
    return found


def _brief(name: str) -> str:
    return {"int4": "int4 cache"}.get(name, name)
