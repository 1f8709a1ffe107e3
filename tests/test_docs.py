"""What the documentation says exists: links, commands and their options, the reference of recipes, extras, versions."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import typer
import yaml
from typer.core import TyperGroup

import clla
from clla.cli import app
from clla.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import fresh_install  # noqa: E402
import recipes  # noqa: E402
import walkthrough  # noqa: E402

PAGES = sorted(
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    if (ROOT / name).is_file()
)
COMMANDS = typer.main.get_command(app)
ABBREVIATED = {"...", "…"}


def identity(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(text: str) -> set[str]:
    """Names of headings as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=identity)
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        found = page.parent / path if path else page
        if not found.exists() or (anchor and anchor not in anchors(found.read_text(encoding="utf-8"))):
            broken.append(target)
    assert not broken


def quoted(text: str) -> list[str]:
    """Command lines of clla in code blocks for a shell and in inline code, comments and prompts cut off."""
    found = []
    for block in re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, re.DOTALL):
        found += [line.removeprefix("$ ") for line in block.replace("\\\n", " ").splitlines() if "clla" in line]
    found += re.findall(r"`([^`\n]*\bclla [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    commands = []
    for line in found:
        match = re.search(r"(?:^|[;|&] *|-m )clla ((?:-|[a-z]).*)", line)
        if match is not None:
            commands.append(re.split(r" # | +#|[;|&<>]", " ".join(match[1].split("\n")))[0].strip())
    return commands


def mistake(command: str) -> str | None:
    """What the command tree says of a command line; arguments may be left out, as prose does."""
    words = [word for word in shlex.split(command) if word not in ABBREVIATED]
    node = COMMANDS
    while isinstance(node, TyperGroup) and words and not words[0].startswith("-"):
        if words[0] not in node.commands:
            return f"no command {words[0]}"
        node = node.commands[words.pop(0)]
    options = {name for parameter in node.params for name in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in {*options, "--help"}]
    return f"no option {', '.join(unknown)}" if unknown else None


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in ("walkthrough.md", "CHANGELOG.md")], ids=identity)
def test_quoted_commands_parse(page: Path) -> None:
    commands = quoted(page.read_text(encoding="utf-8"))
    assert page.name not in ("README.md", "quickstart.md") or page.parent.name == "docs" or len(commands) > 5
    assert not [f"{command}: {wrong}" for command in commands if (wrong := mistake(command))]


def test_wrong_commands_are_found() -> None:
    page = "```sh\nclla convert MODEL --kv-bugdet 3%  # a comment\nclla recepies ls\nclla recipes cp a b\n```"
    assert [mistake(command) for command in quoted(page)] == ["no option --kv-bugdet", "no command recepies", None]


def test_reference_of_recipes_is_up_to_date(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert text == recipes.page(), "run: python docs/recipes.py"
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == len(recipes.EXAMPLES)
    for block in blocks:
        path = tmp_path / "recipe.yaml"
        path.write_text(block)
        dumped = load_recipe(str(path)).model_dump(mode="json")
        for section, values in yaml.safe_load(block).items():
            assert section == "schema_version" or values.items() <= dumped[section].items()


def test_extras_that_messages_name_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [path.read_text(encoding="utf-8") for path in [*(ROOT / "clla").rglob("*.py"), *PAGES]]
    named = {
        extra
        for text in texts
        for found in re.findall(r"(?:clla|'\.)\[([a-z,]+)\]", text)
        for extra in found.split(",")
    }
    assert named and named <= set(project["optional-dependencies"])


def test_changelog_knows_the_version() -> None:
    assert f"## [{clla.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("lacking", ["", "clla/data/text.xz", "LICENSE"])
def test_contents_of_distributions_are_checked(tmp_path: Path, lacking: str) -> None:
    package = {"clla/__init__.py", "clla/data/text.xz"}
    wheel, sdist = tmp_path / "clla-1.0-py3-none-any.whl", tmp_path / "clla-1.0.tar.gz"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("clla-1.0.dist-info/METADATA", "Metadata-Version: 2.4\nName: clla\nVersion: 1.0\n")
        for name in package | {"clla-1.0.dist-info/licenses/LICENSE"}:
            if not lacking or not name.endswith(lacking):
                archive.writestr(name, "")
    with tarfile.open(sdist, "w:gz") as tar:
        for name in package | {"LICENSE", "README.md", "pyproject.toml"}:
            tar.addfile(tarfile.TarInfo(f"clla-1.0/{name}"))
    if not lacking:
        fresh_install.check_contents(wheel, sdist, package)
        return
    with pytest.raises(SystemExit, match="text.xz" if "data" in lacking else "no licence"):
        fresh_install.check_contents(wheel, sdist, package)


def test_walkthrough_leaves_out_what_is_missing_and_hides_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    command = tmp_path / "venv" / "bin" / "clla"
    command.write_text(
        '#!/bin/sh\n[ "$1" = eval ] || { echo "No such command" >&2; exit 2; }\n'
        'echo "in $PWD"\nprintf "\\033[1m 3%%|###\\n" >&2\nseq 100\n'
    )
    command.chmod(0o755)
    environment = fresh_install.Environment(tmp_path / "venv", home)
    steps = (walkthrough.Step("clla eval x", title="One"), walkthrough.Step("clla nothing x"), walkthrough.Step("true"))
    kept = walkthrough.existing(steps, environment)
    assert [step.command for step in kept] == ["clla eval x", "true"] and "clla nothing x" in capsys.readouterr().err
    part = walkthrough.run(kept[0], environment)
    assert "## One" in part and "in ~\n" in part and "[… 61 lines …]" in part and "3%" not in part
    with pytest.raises(SystemExit, match="expected 0"):
        walkthrough.run(walkthrough.Step("clla nothing x"), environment)
    command.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(SystemExit, match="--help failed"):
        walkthrough.existing(steps, environment)
