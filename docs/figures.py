"""Draw the pictures of docs/concepts.md: python docs/figures.py

Transparent, in greys and a red that can be read on white and on black.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.patches import FancyArrowPatch, Rectangle

from clla.evaluate.figures import OWN_COLOUR, SOURCE_COLOUR, axes_of

FOLDER = Path(__file__).resolve().parent / "concepts"
INK = "#808080"
LAYERS, KV_VALUES, HALF = 32, 2048, 2  # Llama-3-8B: 8 key-value heads of 128, keys and values, 16 bits


def canvas(width: float, height: float) -> Any:
    """A picture without axes, in units of its size."""
    axes = axes_of(width, height)
    axes.set(xlim=(0, 10 * width), ylim=(0, 10 * height))
    axes.axis("off")
    return axes


def box(
    axes: Any, x: float, y: float, w: float, h: float, *, own: bool = False, alpha: float = 1.0, text: str = ""
) -> None:
    """A filled rectangle with a white label."""
    colour = OWN_COLOUR if own else SOURCE_COLOUR
    axes.add_patch(Rectangle((x, y), w, h, facecolor=colour, alpha=alpha, linewidth=0))
    if text:
        axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", color="white", fontsize=9)


def label(axes: Any, x: float, y: float, text: str, **options: Any) -> None:
    """Plain words."""
    axes.text(x, y, text, **{"color": INK, "fontsize": 10, "va": "center", **options})


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], *, own: bool = False) -> None:
    """From one point to another."""
    colour = OWN_COLOUR if own else INK
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, linewidth=1.2))


def save(axes: Any, name: str) -> None:
    """The same bytes each time, so that a picture changes only where its drawing does."""
    with matplotlib.rc_context({"svg.hashsalt": "clla", "svg.fonttype": "path"}):
        axes.figure.savefig(FOLDER / f"{name}.svg", transparent=True, metadata={"Date": None})


def cost() -> None:
    """Gigabytes of cache against context, for the shape of Llama-3-8B."""
    axes = axes_of(7, 3.4)
    contexts = [2**n for n in range(11, 18)]
    source = [c * LAYERS * KV_VALUES * HALF / 2**30 for c in contexts]
    exact = (128 + 16 + 4) * LAYERS * KV_VALUES * HALF / 2**30
    share = 0.0625 - exact / source[contexts.index(32768)]  # a budget of 6.25 % in all at 32768 tokens
    own = [min(s, exact + share * s) for s in source]
    lines = ((source, SOURCE_COLOUR, "16-bit cache", -2), (own, OWN_COLOUR, "6.25 % at 32,768 tokens", -1))
    for values, colour, name, at in lines:
        axes.plot(contexts, values, "o-", color=colour, markersize=4)
        name_place = {"textcoords": "offset points", "xytext": (-8, 9), "ha": "right", "color": colour}
        axes.annotate(name, (contexts[at], values[at]), **name_place)
        end = {"textcoords": "offset points", "xytext": (7, -3), "color": colour}
        axes.annotate(f"{values[-1]:.1f} GiB", (contexts[-1], values[-1]), **end)
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{c:,}" for c in contexts])
    axes.minorticks_off()
    axes.margins(x=0.16)
    axes.set_xlabel("tokens of one sequence", color=INK)
    axes.set_ylabel("GiB of cache", color=INK)
    axes.tick_params(colors=INK)
    for spine in axes.spines.values():
        spine.set_color(INK)
    save(axes, "cost")


def groups() -> None:
    """Six layers that cache keys and values each, and two groups with a latent each."""
    axes = canvas(7, 3.3)
    label(axes, 10, 31, "before: every layer its own", ha="center")
    label(axes, 49, 31, "after: one latent a group of layers", ha="center")
    for i in range(6):
        y = 24 - 4.6 * i
        label(axes, 0, y + 1.6, f"layer {i}", fontsize=9)
        box(axes, 7, y, 7, 3.4, text="keys")
        box(axes, 14.4, y, 7, 3.4, text="values")
        box(axes, 32, y, 4, 3.4, alpha=0.75, text="k, v")
        middle = 20.9 if i < 3 else 7.1
        arrow(axes, (36.4, y + 1.7), (45.5, middle), own=True)
        arrow(axes, (56.5, middle), (64, y + 1.7), own=True)
        label(axes, 64.5, y + 1.7, f"layer {i}", fontsize=9)
    for middle in (20.9, 7.1):
        box(axes, 46, middle - 2.2, 10, 4.4, own=True, text="latent")
    label(axes, 40, 28, "encode", fontsize=9, ha="center", color=OWN_COLOUR)
    label(axes, 60.5, 28, "decode", fontsize=9, ha="center", color=OWN_COLOUR)
    save(axes, "groups")


def timeline() -> None:
    """Which tokens are exact and which are latents."""
    axes = canvas(7, 1.9)
    box(axes, 1, 8, 6, 5, text="sinks")
    box(axes, 7.6, 8, 36.4, 5, own=True, text="older tokens: latents, packed")
    box(axes, 44.6, 8, 17, 5, text="window: exact")
    box(axes, 62.2, 8, 6, 5, alpha=0.75, text="new")
    label(axes, 4, 15.2, "4 tokens", ha="center", fontsize=9)
    label(axes, 26, 15.2, "grows with the context", ha="center", fontsize=9, color=OWN_COLOUR)
    label(axes, 53, 15.2, "newest W tokens, a fixed amount", ha="center", fontsize=9)
    arrow(axes, (49, 7.4), (40, 7.4), own=True)
    label(axes, 44.5, 4.6, "16 at a time leave the window and are encoded", ha="center", fontsize=9)
    save(axes, "timeline")


def tiers() -> None:
    """Components of a latent by importance, in classes of bits."""
    axes = axes_of(7, 2.8)
    start = 0
    for width, count in ((8, 8), (6, 8), (5, 8), (4, 16), (3, 16), (2, 16), (1, 8), (0, 16)):
        x = (start, start + count)
        colour, alpha = (OWN_COLOUR, 0.5 + 0.5 * width / 8) if width else (SOURCE_COLOUR, 0.35)
        axes.fill_between(x, [14 - at / 8 for at in x], color=colour, alpha=alpha, linewidth=0)
        place = {"ha": "center", "color": "white" if width else INK}
        axes.text(start + count / 2, 0.6, str(width) if width else "dropped", **place)
        start += count
    axes.set_ylim(bottom=0)
    axes.set_yticks([])
    axes.set_xticks([])
    axes.set_xlabel("components of a latent, most important first (number: bits stored)", color=INK)
    axes.set_ylabel("what it is worth (log)", color=INK)
    for spine in axes.spines.values():
        spine.set_color(INK)
    save(axes, "tiers")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for draw in (cost, groups, timeline, tiers):
        draw()
