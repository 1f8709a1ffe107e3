"""Small SVG pictures: elements, scales and axes. Colours and fonts are classes that the page's style sheet sets.

Elements are built as a tree, so whatever text they hold is escaped and every picture is well-formed XML.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from xml.etree import ElementTree

from markupsafe import Markup

from clla.report import words

Point = tuple[float, float]
TICK, TITLE = 15, 30  # px below the frame, of numbers and of an axis's title


@dataclass(frozen=True)
class Scale:
    """From values to px, linear or logarithmic.

    Attributes:
        low, high: values at the ends, low < high; positive for a logarithmic scale.
        start, stop: their px.
        log: whether it is logarithmic.
        title: what it measures.
        write: how its numbers are written.
        most: numbers along its axis.
        places: of the numbers, instead of round values.
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool = False
    title: str = ""
    write: Callable[[float], str] = words.short
    most: int = 6
    places: Sequence[float] | None = None

    def __call__(self, value: float) -> float:
        low, high, value = (self._scaled(v) for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value

    def holds(self, value: float) -> bool:
        """Whether a value lies between the ends, but for rounding."""
        slack = 1e-6 * abs(self.stop - self.start)
        return min(self.start, self.stop) - slack <= self(value) <= max(self.start, self.stop) + slack

    @property
    def ticks(self) -> Sequence[float]:
        """Where its numbers stand."""
        if self.places is not None:
            return self.places
        return self._log_ticks(self.most) if self.log else self._linear_ticks(self.most)

    def _linear_ticks(self, most: int) -> list[float]:
        rough = (self.high - self.low) / max(1, most - 1)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * m for m in (1, 2, 2.5, 5, 10, 20) if power * m >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _log_ticks(self, most: int) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for leading in ((1, 2, 5), (1, 3), (1,)):
            found = [m * 10.0**e for e in range(first, last + 1) for m in leading if self.holds(m * 10.0**e)]
            if len(found) <= most:
                return found
        return found[:: -(-len(found) // most)]


@dataclass
class Drawing:
    """One picture.

    Attributes:
        width, height: px, at which its letters have the size that the style sheet says.
        label: what it shows, for those who do not see it.
    """

    width: float
    height: float
    label: str
    root: ElementTree.Element = field(init=False)

    def __post_init__(self) -> None:
        box = f"0 0 {_number(self.width)} {_number(self.height)}"
        attributes = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": box, "role": "img", "aria-label": self.label}
        size = {"width": _number(self.width), "height": _number(self.height)}
        self.root = ElementTree.Element("svg", {**attributes, **size})

    def add(self, tag: str, cls: str = "", *, tip: str = "", text: str = "", **attributes: float | str) -> None:
        """Add an element.

        Args:
            tag: its name.
            cls: classes.
            tip: shown where the pointer rests on it.
            text: its content.
            attributes: an underscore stands for a hyphen.
        """
        given = {"class": cls} if cls else {}
        for name, value in attributes.items():
            given[name.replace("_", "-")] = value if isinstance(value, str) else _number(value)
        element = ElementTree.SubElement(self.root, tag, given)
        element.text = text or None
        if tip:
            title = ElementTree.SubElement(element, "title")
            title.text, title.tail = tip, element.text
            element.text = None

    def rect(self, cls: str, x: float, y: float, width: float, height: float, tip: str = "") -> None:
        self.add("rect", cls, tip=tip, x=x, y=y, width=max(0.0, width), height=max(0.0, height))

    def line(self, cls: str, start: Point, stop: Point) -> None:
        self.add("line", cls, x1=start[0], y1=start[1], x2=stop[0], y2=stop[1])

    def text(self, cls: str, x: float, y: float, text: str, anchor: str = "start", tip: str = "") -> None:
        self.add("text", cls, tip=tip, text=text, x=x, y=y, text_anchor=anchor)

    def path(self, cls: str, points: Iterable[Point], *, closed: bool = False, tip: str = "") -> None:
        steps = [f"{_number(x)} {_number(y)}" for x, y in points]
        if steps:
            self.add("path", cls, tip=tip, d="M" + "L".join(steps) + ("Z" if closed else ""))

    def mark(self, shape: str, cls: str, at: Point, tip: str = "", size: float = 4.5) -> None:
        """A point: a `circle`, `square` or `diamond`."""
        x, y = at
        if shape == "circle":
            self.add("circle", cls, tip=tip, cx=x, cy=y, r=size)
        elif shape == "square":
            self.add("rect", cls, tip=tip, x=x - size, y=y - size, width=2 * size, height=2 * size)
        else:
            wide = 1.3 * size
            self.path(cls, ((x, y - wide), (x + wide, y), (x, y + wide), (x - wide, y)), closed=True, tip=tip)

    def axes(self, x: Scale, y: Scale) -> None:
        """Grid, numbers and titles; the title of y, whose start is below, stands above its axis."""
        bottom, top, left = y.start, y.stop, x.start
        for value in y.ticks:
            self.line("grid", (left, y(value)), (x.stop, y(value)))
            self.text("num", left - 6, y(value) + 4, y.write(value), "end")
        for value in x.ticks:
            self.line("grid", (x(value), bottom), (x(value), bottom + 4))
            self.text("num", x(value), bottom + TICK + 2, x.write(value), "middle")
        self.line("axis", (left, bottom), (x.stop, bottom))
        self.text("title", (left + x.stop) / 2, bottom + TITLE + 4, x.title, "middle")
        self.text("title", 2, top - 10, y.title)

    def markup(self) -> Markup:
        return Markup(ElementTree.tostring(self.root, encoding="unicode"))  # the tree has escaped all text


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
