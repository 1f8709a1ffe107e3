"""Quality, memory, errors and healing as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clla.artifacts.plan import Plan
from clla.evaluate.layer_errors import LayerError
from clla.report import words
from clla.report.svg import Drawing, Point, Scale

TALL = 270
LEFT = 52  # px for the numbers of y
LETTER = 7.6  # px, of a bold one, on the generous side
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Measured:
    """Attributes: kind: `other`, `own` or `before`; label; bytes per token; kl: nats per token, above zero."""

    kind: str
    label: str
    nbytes: float
    kl: float


SHAPES = {
    "other": "square",
    "own": "circle",
    "before": "diamond",
    "key": "square",
    "value": "diamond",
    "output": "circle",
}


def draw_quality(points: Sequence[Measured], frontier: Sequence[Point], source_bytes: float, width: int) -> Drawing:
    """KL against cache bytes, both logarithmic: what was measured, and what the plan expects of other budgets.

    Args:
        points: measured.
        frontier: (bytes per token, expected KL), ascending in bytes.
        source_bytes: per token.
        width: px.
    """
    least = min(p.nbytes for p in points) / 2
    frontier = [(b, kl) for b, kl in frontier if least <= b <= source_bytes and kl > 0]
    kls = [p.kl for p in points] + [kl for _, kl in frontier]
    titles, low = ("cache, bytes per token", "KL to the source, nats per token"), max(p.kl for p in points) / 1e3
    most = 8 if width > 500 else 5
    x = Scale(least, source_bytes * 1.25, LEFT, width - 12, log=True, title=titles[0], most=most)
    y = Scale(max(min(kls), low) / 2, max(kls) * 2, TALL - 48, 30, log=True, title=titles[1])
    drawing = Drawing(width, TALL, "KL to the source against cache bytes per token")
    drawing.axes(x, y)
    drawing.line("source-line", (x(source_bytes), y.start), (x(source_bytes), y.stop))
    drawing.text("label source", x(source_bytes) - 6, y.stop + 10, "source", "end")
    drawing.path("expected", [(x(b), y(kl)) for b, kl in frontier if y.holds(kl)])
    places = [(x(point.nbytes), y(point.kl)) for point in points]
    taken = [(a - 7, b - 7, a + 7, b + 7) for a, b in places]
    for point, at in zip(points, places, strict=True):
        tip = f"{point.label}: {point.nbytes:,.0f} bytes per token, KL {point.kl:.4f}"
        drawing.mark(SHAPES[point.kind], f"mark {point.kind}", at, tip, 5.5)
        anchor, where, box = _free_place(at, LETTER * len(point.label), taken, (LEFT, y.stop - 8, x.stop, y.start))
        taken.append(box)
        drawing.text(f"label {point.kind}", *where, point.label, anchor)
    return drawing


def _free_place(at: Point, width: float, taken: Sequence[Box], frame: Box) -> tuple[str, Point, Box]:
    """Where a label of some width beside a point touches nothing: its anchor, its place and the room it takes."""
    (x, y), found = at, []
    for below in (False, True):
        base = y + 19 if below else y - 8
        found.append(("start", (x + 9, base), (x + 9, base - 11, x + 9 + width, base + 3)))
        found.append(("end", (x - 9, base), (x - 9 - width, base - 11, x - 9, base + 3)))
    for option in found:
        left, top, right, bottom = option[2]
        inside = left >= frame[0] and right <= frame[2] and top >= frame[1] and bottom <= frame[3]
        if inside and not any(left < c and right > a and top < d and bottom > b for a, b, c, d in taken):
            return option
    return found[0]


def draw_memory(plan: Plan, contexts: Sequence[int], width: int) -> Drawing:
    """Bytes of one sequence's cache against its length, both logarithmic; where the converted one becomes smaller.

    Args:
        plan: of the converted model.
        contexts: shortest and longest.
        width: px.
    """
    low, high = contexts
    lengths = [round(low * (high / low) ** (i / 48)) for i in range(49)]

    def both(c: int) -> tuple[float, float]:
        kept = plan.kept_bytes_at(c)
        return plan.source_bytes_per_token * c + kept, plan.bytes_at(c) + kept

    source, own = zip(*map(both, lengths), strict=True)
    drawing = Drawing(width, TALL, "Cache of one sequence against its length, source and converted")
    what, places = "tokens in one sequence", _doublings(low, high, 8 if width > 500 else 5)
    x = Scale(low, high, LEFT + 8, width - 12, log=True, title=what, write=words.tokens, places=places)
    ends = min(*source, *own) / 3, max(*source, *own) * 1.5
    y = Scale(*ends, TALL - 48, 30, log=True, title="cache", write=words.size)
    drawing.axes(x, y)
    drawing.path("curve source", [(x(c), y(v)) for c, v in zip(lengths, source, strict=True)])
    drawing.path("curve own", [(x(c), y(v)) for c, v in zip(lengths, own, strict=True)])
    middle = 33
    drawing.text("label source", x(lengths[middle]) - 8, y(source[middle]) - 6, "source", "end")
    drawing.text("label own", x(lengths[middle]) + 6, y(own[middle]) + 16, "converted")
    if plan.break_even is not None and low <= plan.break_even <= high:
        at = (x(plan.break_even), y(both(plan.break_even)[1]))
        drawing.mark("circle", "mark own", at, f"smaller than the source's from {plan.break_even:,} tokens on", 5)
        drawing.text("quiet", at[0] + 9, at[1] + 14, f"smaller from {plan.break_even:,} tokens")
    for c in map(round, _doublings(low, high, 40)):
        for name, value in zip(("source", "converted"), both(c), strict=True):
            drawing.mark("circle", "hit", (x(c), y(value)), f"{c:,} tokens, {name}: {words.size(value)}", 9)
    return drawing


def draw_layers(errors: Sequence[LayerError], plan: Plan, width: int) -> Drawing:
    """Relative errors of each layer's keys, values and attention output; bands are the groups."""
    drawing = Drawing(width, TALL, "Relative error of the keys, values and attention output of each layer")
    place = {error.layer: i for i, error in enumerate(errors)}
    top = max(max(e.key, e.value, e.output or 0.0) for e in errors)
    names = {i: str(error.layer) for i, error in enumerate(errors)}
    places = range(0, len(errors), -(-len(errors) // (16 if width > 500 else 7)))
    x = Scale(-0.6, len(errors) - 0.4, LEFT, width - 12, title="layer", write=lambda i: names[round(i)], places=places)
    y = Scale(0, max(top * 1.12, 1e-6), TALL - 48, 30, title="relative error", write=words.percent)
    for number, group in enumerate(plan.groups):
        inside = [place[layer] for layer in group.layers if layer in place]
        if inside and number % 2 == 0:
            start, stop = x(min(inside) - 0.5), x(max(inside) + 0.5)
            drawing.rect("band", start, y.stop, stop - start, y.start - y.stop)
    drawing.axes(x, y)
    for kind in ("value", "key", "output"):
        points = [(x(i), y(v), e.layer, v) for i, e in enumerate(errors) if (v := getattr(e, kind)) is not None]
        drawing.path(f"curve {kind}", [(a, b) for a, b, _, _ in points])
        for a, b, layer, v in points:
            name = "attention output" if kind == "output" else f"{kind}s"
            drawing.mark(SHAPES[kind], f"mark {kind}", (a, b), f"layer {layer}: {name} {words.percent(v)}", 3)
    return drawing


def draw_healing(history: Sequence[dict[str, Any]], width: int) -> Drawing:
    """KL against trained tokens, held out and in training."""
    drawing = Drawing(width, TALL, "KL to the source against the tokens trained on")
    held = [(p["tokens"], p["held_out"]) for p in history if p["held_out"] is not None]
    seen = [(p["tokens"], p["kl"]) for p in history if p["kl"] is not None and p["tokens"]]
    far, high = (max((point[i] for point in held + seen), default=0) for i in (0, 1))
    x = Scale(0, max(far, 1), LEFT, width - 16, title="tokens trained on", most=6 if width > 500 else 4)
    y = Scale(0, max(high * 1.1, 1e-9), TALL - 48, 30, title="KL to the source, nats per token")
    drawing.axes(x, y)
    drawing.path("curve training", [(x(t), y(k)) for t, k in seen])
    drawing.path("curve own", [(x(t), y(k)) for t, k in held])
    for tokens, kl in held:
        drawing.mark("circle", "mark own", (x(tokens), y(kl)), f"{tokens:,} tokens: held-out KL {kl:.4f}", 4)
    return drawing


def _doublings(low: float, high: float, most: int) -> list[float]:
    """Powers of two between the ends, at most `most` of them, evenly spread."""
    found = [2.0**e for e in range(64) if low <= 2.0**e <= high]
    return found[:: -(-len(found) // most)] if found else []
