"""The plan as pictures: which layers share what, what a sequence keeps, and what each group's components are worth."""

from __future__ import annotations

import math
from itertools import groupby, pairwise
from typing import Any

from clla.artifacts.plan import LayerGroup, Plan, encoded_slots
from clla.evaluate.plan_tables import runs_of
from clla.plan.rate import ERROR_SHARE
from clla.report import words
from clla.report.svg import Drawing, Point, Scale

ROWS_HEIGHT = 440  # of all layers together, at most, unless rows would become lower than the least
ROW_HEIGHTS = (9.0, 18.0)
GAP = 4.0  # between groups


def draw_plan(plan: Plan, width: int) -> Drawing:
    """One row per layer from the first down; layers of a group have the same bar, its components by their bits."""
    wide = width > 500
    owner: dict[int, LayerGroup | None] = dict.fromkeys(plan.kept_layers)
    owner |= {layer: group for group in plan.groups for layer in group.layers}
    blocks = [(group, [layer for layer, _ in part]) for group, part in _neighbours(owner)]
    height = min(max(ROWS_HEIGHT / len(owner), ROW_HEIGHTS[0]), ROW_HEIGHTS[1])
    left, right, top = 46, (150 if wide else 58), 22
    ranks = [len(group.tier_bits) * plan.tier_size for group in plan.groups]
    x = Scale(0, max([*ranks, plan.tier_size]), left, width - right, most=6 if wide else 4)
    bottom = top + height * len(owner) + GAP * (len(blocks) - 1)
    shown = f"{words.count(len(plan.groups), 'group')} of layers, components of each by their bits"
    drawing = Drawing(width, bottom + 38, f"The plan: {shown}")
    drawing.text("title", 2, 12, "layers")
    drawing.text("title", width - 2, 12, "rank, bytes per token" if wide else "bytes", "end")
    y, middles = float(top), dict[int, list[float]]()
    for group, layers in blocks:
        tall = height * len(layers)
        label = words.span(layers)
        drawing.text("num", left - 9, y + tall / 2 + 4, label, "end")
        if group is None:
            tip = f"{words.layers(layers)}: not converted, the source's own bounded cache"
            drawing.rect("kept", left, y, x.stop - left, tall, tip)
            if tall > 11:
                drawing.text("quiet", left + 8, y + tall / 2 + 4, "kept as it is" if wide else "kept")
        else:
            _bar(drawing, x, y, (len(layers), height), plan, group)
            if id(group) not in middles:
                nbytes = f"{plan.row_bytes_of(group):,} B"
                text = f"{len(group.tier_bits) * plan.tier_size:,} · {nbytes}" if wide else nbytes
                drawing.text("num", width - 2, y + tall / 2 + 4, text, "end")
            middles.setdefault(id(group), []).append(y + tall / 2)
        y += tall + GAP
    for places in middles.values():
        for place in places if len(places) > 1 else []:  # layers of one group that others part
            drawing.path("axis", [(left, place), (left - 4, place), (left - 4, places[-1])])
    for value in x.ticks:
        drawing.line("grid", (x(value), bottom), (x(value), bottom + 4))
        drawing.text("num", x(value), bottom + 17, words.short(value), "middle")
    drawing.line("axis", (left, bottom), (x.stop, bottom))
    drawing.text("title", (left + x.stop) / 2, bottom + 33, "latent components, most important first", "middle")
    return drawing


def _neighbours(owner: dict[int, LayerGroup | None]) -> Any:
    """Runs of layers that follow one another and belong together."""
    return ((key[1], part) for key, part in groupby(sorted(owner.items()), key=lambda item: (id(item[1]), item[1])))


def _bar(drawing: Drawing, x: Scale, y: float, rows: tuple[int, float], plan: Plan, group: LayerGroup) -> None:
    """Components of a group over its layers: `rows` says how many lie together and how high each is."""
    where = words.layers(group.layers)
    share, tall = words.percent(_share_of_loss(plan, group)), rows[0] * rows[1]
    runs = runs_of(group, plan.tier_size)
    for bits, first, stop in runs:
        tip = (
            f"{where}: components {first:,} to {stop - 1:,} in {words.count(bits, 'bit')} each, "
            f"{(stop - first) * bits // 8:,} bytes per token; the group has {share} of the predicted loss"
        )
        drawing.rect(f"b{bits}", x(first), y, x(stop) - x(first), tall, tip)
    for number in range(1, rows[0]):
        line = y + number * rows[1]
        drawing.line("between", (x(0), line), (x(len(group.tier_bits) * plan.tier_size), line))
    for bits, first, stop in runs:
        if x(stop) - x(first) >= 13 and tall >= 11:
            drawing.text(f"on b{bits}-on", (x(first) + x(stop)) / 2, y + tall / 2 + 4, str(bits), "middle")


def draw_sequence(plan: Plan, context: int, width: int) -> Drawing:
    """One sequence from its first token to its newest: what is exact, and what is latents. Not to scale."""
    wide = width > 500
    rows = encoded_slots(context, plan.window, plan.flush_block)
    exact = context - rows
    label = f"A sequence of {context:,} tokens: {plan.sinks} sinks and the newest {exact} exact, the others latents"
    drawing = Drawing(width, 58, label)
    parts = [
        ("exact", 0.12 if wide else 0.2, f"{plan.sinks} sinks", "exact", plan.sinks > 0),
        ("latent", 0.64 if wide else 0.48, f"{rows:,} tokens", f"latents, {plan.row_bytes:,} bytes each", rows > 0),
        ("exact", 0.24 if wide else 0.32, f"newest {exact:,}", "exact", plan.window > 0),
    ]
    shown = [part for part in parts if part[4]]
    x, scale = 0.0, width / sum(part[1] for part in shown)
    for cls, share, title, note, _ in shown:
        drawing.rect(f"seq-{cls}", x + 1, 4, share * scale - 2, 26)
        drawing.text(f"on seq-{cls}-on", x + share * scale / 2, 21, title, "middle")
        drawing.text("quiet", x + share * scale / 2, 47, note, "middle")
        x += share * scale
    return drawing


def draw_spectrum(
    plan: Plan, index: int, spectrum: dict[str, Any], bounds: tuple[float, float, float], width: int = 330
) -> Drawing:
    """Worth of one group's components, and what their bits leave of it, on a logarithmic scale.

    Args:
        plan: its groups.
        index: of the group.
        spectrum: of the group, from the outlook.
        bounds: lowest and highest worth to show, and the energy of all groups, of which shares are shown.
        width: px.
    """
    group, total = plan.groups[index], bounds[2]
    curve = [(c, w / total) for c, w in zip(spectrum["component"], spectrum["worth"], strict=True) if w > 0]
    rank = len(group.tier_bits) * plan.tier_size
    where = words.layers(group.layers)
    label = f"{where}: rank {rank:,} of {spectrum['components']:,}"
    drawing = Drawing(width, 230, f"Worth of the latent components of {label}")
    x = Scale(0, max(spectrum["components"], 1), 58, width - 8, title="component", most=5)
    y = Scale(bounds[0] / total, bounds[1] / total, 190, 40, log=True, write=_power, most=5)
    drawing.text("head", 2, 12, label)
    drawing.text("quiet", 2, 28, words.percent(_share_of_loss(plan, group)) + " of the predicted loss")
    drawing.axes(x, y)
    runs = [*runs_of(group, plan.tier_size), (0, rank, int(spectrum["component"][-1]) + 1)]
    lost: list[Point] = []
    for bits, first, stop in (run for run in runs if run[2] > run[1]):
        part = _cut(curve, first, stop)
        if not part:
            continue
        tip = f"{words.count(bits, 'bit')}: components {first:,} to {stop - 1:,}" if bits else "not kept"
        outline = [(x(c), y(max(w, y.low))) for c, w in part]
        edge = [(outline[-1][0], y.start), (outline[0][0], y.start)]
        drawing.path(f"b{bits}", outline + edge, closed=True, tip=tip)
        lost += [(x(c), y(left)) for c, w in part if (left := w * ERROR_SHARE[bits]) >= y.low]
        if bits and x(stop) - x(first) >= 11 and y.start - outline[-1][1] >= 16:
            drawing.text(f"on b{bits}-on", (x(first) + x(stop)) / 2, y.start - 6, str(bits), "middle", tip)
    drawing.path("lost", lost)
    drawing.line("cut", (x(rank), y.start), (x(rank), y.stop))
    return drawing


def spectrum_bounds(spectra: list[dict[str, Any]]) -> tuple[float, float, float] | None:
    """Lowest and highest worth over all groups, at most six decades apart, and their energy; None without any."""
    worth = [w for spectrum in spectra for w in spectrum["worth"] if w > 0]
    energy = sum(spectrum["energy"] for spectrum in spectra)
    if not worth or energy <= 0:
        return None
    high = 10 ** math.ceil(math.log10(max(worth) / energy)) * energy
    low = 10 ** math.floor(math.log10(max(min(worth), max(worth) * 1e-5) / energy)) * energy
    return low, high, energy


def _share_of_loss(plan: Plan, group: LayerGroup) -> float:
    return group.predicted_loss / (plan.predicted_loss or 1.0)


def _cut(curve: list[Point], first: float, stop: float) -> list[Point]:
    """The part of a curve between two components, its ends interpolated."""
    if not curve:
        return []
    inner = [point for point in curve if first < point[0] < stop]
    ends = [(at, value) for at in (first, min(stop, curve[-1][0])) if (value := _at(curve, at)) is not None]
    return sorted({*ends, *inner})


def _at(curve: list[Point], component: float) -> float | None:
    for (a, low), (b, high) in pairwise(curve):
        if a <= component <= b:
            return math.exp(math.log(low) + (math.log(high) - math.log(low)) * (component - a) / (b - a))
    return None


def _power(share: float) -> str:
    return words.percent(share) if share >= 1e-5 else f"10{_superscript(round(math.log10(share)) + 2)} %"


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
