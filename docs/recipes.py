"""Write docs/recipes.md, the reference of recipes, from their schema: python docs/recipes.py"""

from __future__ import annotations

import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from clla.recipe import Provenance, Recipe, builtin_recipes, load_recipe

PAGE = Path(__file__).resolve().parent / "recipes.md"
HEAD = """# Recipes

A recipe is a YAML file with everything that decides a conversion. Every field has a default, so a recipe holds only
what differs: `clla recipes cp balanced mine.yaml` copies one to start from, `clla convert MODEL --recipe mine.yaml`
uses it, and options of the command line override it. `clla recipes show mine.yaml` prints it with all defaults, and all
mistakes are told at once. A converted checkpoint holds its own as `clla_recipe.yaml`, which repeats the conversion.

This page is written from the schema by `python docs/recipes.py`; `clla recipes show --schema` prints that as JSON.

## Built-in recipes
"""
# Values for the examples; each section's is a whole recipe that is read by the tests.
EXAMPLES: dict[str, dict[str, Any]] = {
    "calibration": {"dataset": "mine.jsonl", "tokens": 65536, "sequence_length": 2048},
    "budget": {"kv_budget": "3%", "budget_context": 32768, "exact_window": 64},
    "plan": {"max_layers_per_group": 4, "bits": [2, 4, 8]},
    "runtime": {"compute_dtype": "bfloat16", "placement": "stream"},
    "heal": {"tokens": 4000000, "train": "codec"},
}
BOUNDS = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}"}


def page() -> str:
    """The whole text."""
    rows = [(name, load_recipe(name)) for name in builtin_recipes()]
    parts = [
        HEAD
        + "\n"
        + _table(("name", "budget", "what it is"), [(f"`{n}`", r.budget.kv_budget, r.description) for n, r in rows])
    ]
    top, sections = [], []
    for name, field in Recipe.model_fields.items():
        section = _section(field)
        if section is None:
            top.append(_row(name, field))
        elif section is not Provenance:
            sections.append((name, field, section))
    parts.append("## Top level\n\n" + _table(("field", "type", "default", "range", "meaning"), top))
    for name, field, section in sections:
        about = " ".join((section.__doc__ or "").split())
        optional = "" if field.default is PydanticUndefined else f" Optional: {field.description}."
        fields = [_row(key, value) for key, value in section.model_fields.items()]
        example = yaml.safe_dump({"schema_version": 1, name: EXAMPLES[name]}, sort_keys=False)
        table = _table(("field", "type", "default", "range", "meaning"), fields)
        parts.append(f"## `{name}`\n\n{about}{optional}\n\n{table}\n\n```yaml\n{example}```")
    parts.append(
        f"## `provenance`\n\n{' '.join((Provenance.__doc__ or '').split())} It names the model, its revision, "
        "and the versions of the packages."
    )
    return "\n\n".join(parts) + "\n"


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kinds = [field.annotation, *get_args(field.annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _row(name: str, field: FieldInfo) -> tuple[str, ...]:
    default = "none" if field.default is None else f"`{_plain(field.default)}`" if field.default != "" else "empty"
    bounds = [form.format(found) for mark, form in BOUNDS.items() for m in field.metadata
              if (found := getattr(m, mark, None)) is not None]  # fmt: skip
    return f"`{name}`", _type(field.annotation), default, ", ".join(bounds), str(field.description)


def _plain(value: Any) -> str:
    return (
        str(list(value)) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _type(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin is tuple:
        return f"list of {_type(inner[0])}s"
    if origin in (types.UnionType, typing.Union):
        return ", ".join(_type(part) for part in inner if part is not type(None))
    names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    return names.get(annotation) or str(annotation)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(
        "| " + " | ".join(re.sub(r"\s+", " ", cell.replace("|", "\\|")) for cell in line) + " |" for line in lines
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
