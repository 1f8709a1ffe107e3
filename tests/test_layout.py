"""The import graph: stages do not know each other, the shipped code knows nothing of the package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import clla

PACKAGE = Path(clla.__file__).parent
STAGES = {"calibrate", "convert", "evaluate", "heal"}
# These know the order of the stages.
COMPOSERS = {
    "convert/pipeline.py",
    "convert/run.py",
    "convert/healing.py",
    "convert/healing_text.py",
    "convert/heal_checkpoint.py",
}


def imported(path: Path) -> set[str]:
    """Absolute names that a module imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_layout(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    stage, names = relative.parts[0], imported(path)
    if stage in STAGES and str(relative) not in COMPOSERS:
        others = {f"clla.{other}" for other in STAGES - {stage}}
        assert not [name for name in names for other in others if name.startswith(other)]
        assert not [name for name in names if name.startswith("clla.report")]  # a page is made when all is done
    if stage == "modeling":
        assert not [name for name in names if name.split(".")[0] == "clla"]
