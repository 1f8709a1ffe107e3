"""The house: every file has a room, rooms know only those below them, no circles, no borrowed private names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import clla

PACKAGE = Path(clla.__file__).parent
# A room or a file of the hall imports only from levels before its own, and from its own room.
LEVELS = (
    ("_version", "errors", "linalg", "modeling", "recipes", "tables"),
    ("native",),
    ("console", "registration", "storage", "usage"),
    ("artifacts", "hub", "text"),
    ("recipe",),
    ("arguments", "source"),
    ("calibrate", "plan"),
    ("checkpoint", "evaluate"),
    ("baselines", "publish"),
    ("heal",),
    ("convert",),
    ("bench", "compare", "export", "report", "serving"),
    ("api", "doctor"),
    ("commands",),
    ("cli",),
    ("__init__", "__main__"),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
MODULES = {
    ".".join(("clla", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(module: str) -> Iterator[tuple[str, str | None]]:
    """Modules of the package that a module imports, at any depth, and the name that it takes from each."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name.split(".")[0] == "clla")
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            whole = ".".join(filter(None, (base, node.module)))
            for alias in node.names if whole.split(".")[0] == "clla" else ():
                inner = f"{whole}.{alias.name}"
                yield (inner, None) if inner in MODULES else (whole, alias.name)


def test_every_file_has_a_room() -> None:
    inside = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {name.removesuffix(".py") for name in inside} == set(LEVEL)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    own, level = room_of(module), LEVEL[room_of(module)]
    upwards = [name for name, _ in imports_of(module) if room_of(name) != own and LEVEL[room_of(name)] >= level]
    assert not upwards


def test_no_file_imports_itself_by_way_of_others() -> None:
    graph = {module: {name for name, _ in imports_of(module)} for module in MODULES}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("module", MODULES)
def test_private_names_stay_in_their_file(module: str) -> None:
    private = [name for _, name in imports_of(module) if name and re.match(r"_(?!_)", name)]
    assert not private


def test_names_of_files_are_written_once() -> None:
    """Each file of a checkpoint or work directory is a constant that others import."""
    found: dict[str, set[str]] = {}
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and re.fullmatch(r"[\w.-]+\.(json|safetensors|yaml|md|png|svg|html)", text):
                found.setdefault(text, set()).add(module)
    assert not {name: modules for name, modules in found.items() if len(modules) > 1}


def test_shipped_code_knows_nothing_of_the_package() -> None:
    for module in (name for name in MODULES if room_of(name) == "modeling"):
        text = MODULES[module].read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) clla", text, flags=re.MULTILINE), module
