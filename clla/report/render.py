"""The page from its data: pictures and tables put into the template, which escapes whatever is put into it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from clla.evaluate.plan_tables import groups_table
from clla.evaluate.report import healing_table
from clla.report import charts, plan_charts, tables, words
from clla.report.data import PageData
from clla.report.svg import Drawing
from clla.storage.files import write_text

GENERATOR = '<meta name="generator" content="clla report">'
WIDE, HALF, NARROW = 1000, 560, 350  # px of pictures: over the page, beside a table, on a phone
CONTROL = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "␡"}


def render(data: PageData) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader("clla", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    style, script = (_file(name) for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html.j2").render(
        data=data,
        tables=tables,
        words=words,
        groups_table=groups_table,
        healed=healing_table(data.file.before, data.file.report),
        figures=_figures(data),
        style=Markup(style),
        script=Markup(script),
        script_digest=digest,
        generator=Markup(GENERATOR),
        used_bits=lambda plan: {bits for group in plan.groups for bits in group.tier_bits},
    )


def write_page(path: Path, html: str) -> None:
    """Write a page; text that is no Unicode becomes question marks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, html.encode("utf-8", "replace").decode())


def _figures(data: PageData) -> dict[str, Any]:
    """Pictures by name, each for a wide and a narrow page; what cannot be drawn is left out."""
    plan = data.plan
    found: dict[str, Any] = {
        "sequence": _both(partial(plan_charts.draw_sequence, plan, data.context), WIDE),
        "plan": _both(partial(plan_charts.draw_plan, plan), WIDE),
    }
    longest = data.reach.positions or max(131_072, 4 * data.context)
    found["memory"] = _both(partial(charts.draw_memory, plan, (64, longest)), HALF)
    if points := tables.measured_points(data):
        assert data.file.report is not None
        source = data.file.report.quality["source"]["bytes_per_token"]
        found["quality"] = _both(partial(charts.draw_quality, points, tables.frontier(data), source), HALF)
    spectra = data.file.outlook.get("spectra") or []
    bounds = plan_charts.spectrum_bounds(spectra)
    if bounds is not None and len(spectra) == len(plan.groups):
        drawn = (plan_charts.draw_spectrum(plan, i, spectrum, bounds) for i, spectrum in enumerate(spectra))
        found["spectra"] = [drawing.markup() for drawing in drawn]
    if data.errors:
        found["layers"] = _both(partial(charts.draw_layers, data.errors, plan), WIDE)
    if data.file.healing is not None and data.file.healing.get("history"):
        found["healing"] = _both(partial(charts.draw_healing, data.file.healing["history"]), HALF)
    return found


def _both(draw: Callable[[int], Drawing], wide: int) -> Markup:
    """A picture for a wide page and one for a phone, of which the style sheet shows one."""
    return Markup('<div class="on-wide">{}</div><div class="on-narrow">{}</div>').format(
        draw(wide).markup(), draw(NARROW).markup()
    )


def _file(name: str) -> str:
    return (resources.files("clla.report") / name).read_text(encoding="utf-8")


def _visible(value: Any) -> Any:
    """Control characters, which browsers drop or take for something else, as their pictures."""
    return value.translate(CONTROL) if isinstance(value, str) and not isinstance(value, Markup) else value
