"""Recipes that ship with the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def builtin_recipes() -> dict[str, Path]:
    """Names and files of the recipes that ship with the package."""
    folder = Path(str(resources.files("clla") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
