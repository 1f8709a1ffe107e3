"""Pictures: the plan as layers by bits, quality against bytes, healing, and speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clla.artifacts.plan import Plan
from clla.evaluate.plan_tables import span
from clla.modeling.quantize_clla import RowLayout

SOURCE_COLOUR, OWN_COLOUR = "#7a7a7a", "#c8452d"


def axes_of(width: float, height: float) -> Any:
    """Axes of a new picture of this width and height in inches."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def save(axes: Any, path: Path, *, x: str, y: str, title: str = "", log: str = "") -> None:
    """Write a picture.

    Args:
        axes: drawn.
        path: PNG or SVG to write.
        x, y: what the axes measure.
        title: above the picture.
        log: which of `x` and `y` are logarithmic.
    """
    axes.set(xlabel=x, ylabel=y, **{f"{axis}scale": "log" for axis in log})
    axes.set_title(title, fontsize=10)
    axes.figure.savefig(path, dpi=120)


def label(axes: Any, text: str, at: tuple[float, float]) -> None:
    """Words beside a point."""
    axes.annotate(text, at, textcoords="offset points", xytext=(6, 6), fontsize=8)


def draw_plan(plan: Plan, path: Path) -> None:
    """Layer groups as bars of latent components, darker with more bits.

    Args:
        plan: what to draw.
        path: PNG to write.
    """
    axes = axes_of(8, 0.6 + 0.32 * len(plan.groups))
    for y, group in enumerate(plan.groups):
        for bits, first, stop in RowLayout(group.tier_bits, plan.tier_size).classes:
            shade = 0.2 + 0.8 * min(bits, 8) / 8
            axes.barh(y, stop - first, left=first, height=0.8, color=OWN_COLOUR, alpha=shade, edgecolor="white")
            axes.text((first + stop) / 2, y, str(bits), ha="center", va="center", fontsize=7)
    labels = [span(group.layers) for group in plan.groups]
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    save(axes, path, x="latent component, most important first (number: bits)", y="layers")


def draw_quality(points: dict[str, tuple[float, float]], path: Path, *, title: str, curve: str = "") -> None:
    """Perplexity against cache bytes per token, on a logarithmic axis of bytes.

    Args:
        points: (bytes per token, perplexity) by label; the first is the source.
        path: PNG to write.
        title: above the picture.
        curve: labels that start with this are joined by a line.
    """
    axes = axes_of(7, 4)
    for i, (name, (nbytes, perplexity)) in enumerate(points.items()):
        own = name.startswith(curve) if curve else i == len(points) - 1
        axes.plot(nbytes, perplexity, "o" if own else "s", color=OWN_COLOUR if own else SOURCE_COLOUR)
        label(axes, name, (nbytes, perplexity))
    line = sorted(xy for name, xy in points.items() if curve and name.startswith(curve))
    if line:
        axes.plot(*zip(*line, strict=True), color=OWN_COLOUR, linewidth=1)
    axes.axhline(next(iter(points.values()))[1], color=SOURCE_COLOUR, linewidth=0.8, linestyle=":")
    axes.margins(x=0.2)
    save(axes, path, x="KV cache, bytes per token", y="perplexity", title=title, log="x")


def draw_frontier(points: list[tuple[str, float, float]], path: Path, *, title: str) -> None:
    """Predicted loss against cache bytes per token, both logarithmic.

    Args:
        points: label, bytes per token and loss.
        path: picture to write.
        title: above the picture.
    """
    axes = axes_of(7, 4)
    axes.plot([x for _, x, _ in points], [y for _, _, y in points], "o-", color=OWN_COLOUR, linewidth=1)
    for name, x, y in points:
        label(axes, name, (x, y))
    axes.margins(x=0.15, y=0.15)
    save(axes, path, x="KV cache, bytes per token", y="predicted loss", title=title, log="xy")


def draw_healing(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """KL against trained tokens, held out and in training.

    Args:
        runs: points with `tokens`, `kl` and `held_out`, by label.
        path: PNG to write.
    """
    axes = axes_of(7, 4)
    for i, (run, points) in enumerate(runs.items()):
        colour = OWN_COLOUR if not i else f"C{i - 1}"
        tokens = [point["tokens"] for point in points]
        name = f"{run}, " if run else ""
        axes.plot(tokens, [point["held_out"] for point in points], "o-", color=colour, label=name + "held out")
        seen = [(point["tokens"], point["kl"]) for point in points if point["tokens"]]
        axes.plot(*zip(*seen, strict=True) if seen else ([], []), ":", color=colour, label=name + "training")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
    save(axes, path, x="tokens trained on", y="KL to the source, nats per token")


def draw_speed(lines: dict[str, dict[int, float]], path: Path, *, title: str) -> None:
    """Tokens decoded per second against the context.

    Args:
        lines: tokens per second by context, by label; those of the source are grey.
        path: PNG or SVG to write.
        title: above the picture.
    """
    axes = axes_of(7, 4)
    marks = "osD^vP*X"
    for i, (name, points) in enumerate(lines.items()):
        colour = SOURCE_COLOUR if name.startswith("source") else OWN_COLOUR
        xy = list(points), list(points.values())
        axes.plot(*xy, marks[i // 2 % len(marks)] + "-", color=colour, label=name, linewidth=1, markersize=5)
    contexts = sorted({context for points in lines.values() for context in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
    save(axes, path, x="tokens in the cache", y="tokens decoded per second", title=title)
