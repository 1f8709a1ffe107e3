"""The command line as terminals, pipes and shells see it: completion, colours, bars, narrow tables, slips."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from typing import get_args

import pytest
import typer

from clla.cli import app
from clla.recipe import HealConfig, PlanConfig, RuntimeConfig
from clla.recipes import builtin_recipes

MAIN = "import sys; sys.argv[0] = 'clla'; from clla.cli import main; main()"
COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9]")
PLAIN = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS")}


def piped(*arguments: str, script: str = MAIN, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env={**PLAIN, **variables}, capture_output=True, text=True, check=False)


def in_terminal(*arguments: str, **variables: str) -> str:
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments],
        env={**PLAIN, "TERM": "xterm-256color", **variables},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    process.wait()
    os.close(ours)
    return written.decode()


def test_help_of_every_command_needs_neither_torch_nor_transformers() -> None:
    script = """
import sys
sys.argv = ["clla"]
import typer
from typer.testing import CliRunner
from clla.cli import app
names = sorted(typer.main.get_command(app).commands)
for arguments in [[], *([name] for name in names), ["recipes", "show"], ["recipes", "ls"]]:
    arguments = [*arguments, "--help"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and "Usage" in done.output, (arguments, done.output)
loaded = {"torch", "transformers", "matplotlib"} & set(sys.modules)
assert not loaded, loaded
print(" ".join(names))
"""
    done = piped(script=script)
    assert done.returncode == 0, done.stderr
    assert {"plan", "doctor", "convert", "eval", "heal"} <= set(done.stdout.split())


def test_a_command_imports_no_other_command() -> None:
    done = piped(
        script=MAIN.replace("main()", "sys.argv[1:] = ['recipes', 'ls']\ntry: main()\nfinally: print(*sys.modules)")
    )
    loaded = {name for name in done.stdout.split() if name.startswith(("clla.commands.", "torch", "numpy"))}
    assert loaded == {"clla.commands.options", "clla.commands.failures", "clla.commands.recipes"}


def test_helps_are_sentences_and_only_what_is_on_can_be_switched_off() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, option in [(name, option) for name, command in commands.items() for option in command.params]:
        assert not option.secondary_opts or option.default is True, (name, option.name)
        fragment = re.match(r"(Of|For|Default)\b", option.help or "Of")
        assert not fragment and option.help.endswith((".", "…")), (name, option.name, option.help)


def completed(shell: str, line: str) -> str:
    script = MAIN.replace("main()", "sys.argv[1:] = []\ntry: main()\nfinally: assert 'torch' not in sys.modules")
    words = line.split(" ")
    variables = {"_CLLA_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": line, "COMP_WORDS": line}
    variables |= {"COMP_CWORD": str(len(words) - 1), "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = piped(script=script, **variables)
    assert "Error" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("shell", ("bash", "zsh", "fish"))
def test_completion_knows_recipes(shell: str) -> None:
    found = completed(shell, "clla convert x --recipe ")
    assert all(name in found for name in builtin_recipes())
    source = piped(_CLLA_COMPLETE=f"source_{shell}")
    assert source.returncode == 0 and "_CLLA_COMPLETE" in source.stdout


def test_completion_knows_choices() -> None:
    assert completed("bash", "clla convert x --planner u").split() == ["uniform"]
    assert completed("bash", "clla recipes show b").split() == ["balanced"]


def test_choices_are_those_of_recipes() -> None:
    def literal(section: type, field: str) -> list[str]:
        wanted = section.model_fields[field].annotation  # type: ignore[attr-defined]
        inner = [arg for arg in get_args(wanted) if arg is not type(None)]
        return list(get_args(inner[0]) or inner)

    for option, section, field in (
        ("planner", PlanConfig, "planner"),
        ("latent-input", PlanConfig, "latent_input"),
        ("heal-train", HealConfig, "train"),
        ("placement", RuntimeConfig, "placement"),
        ("dtype", RuntimeConfig, "compute_dtype"),
    ):
        assert completed("bash", f"clla convert x --{option} ").split() == literal(section, field)


def test_slips_are_answered_with_the_nearest_word() -> None:
    assert "Did you mean 'convert'" in piped("convrt").stderr
    assert "--kv-budget" in piped("convert", "x", "--kv-buget", "3%").stderr


@pytest.mark.slow
@pytest.mark.parametrize("arguments", (("recipes", "cp", "nope"), ("convert", "--help"), ("convert", "--nope")))
def test_colours_are_for_terminals_that_want_them(arguments: tuple[str, ...]) -> None:
    plain = piped(*arguments)
    assert "\x1b" not in plain.stdout + plain.stderr
    assert COLOUR.search(in_terminal(*arguments))
    assert not COLOUR.search(in_terminal(*arguments, NO_COLOR="1"))
    assert "\x1b" not in in_terminal(*arguments, TERM="dumb")
    forced = piped(*arguments, FORCE_COLOR="1")
    assert COLOUR.search(forced.stdout + forced.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("variables", ({}, {"FORCE_COLOR": "1"}, {"TERM": "dumb"}))
def test_a_bar_in_a_log_is_one_line(variables: dict[str, str]) -> None:
    script = """
import time
from clla import console
with console.progress("Working", 40) as advance:
    for _ in range(40):
        advance(1)
        time.sleep(0.02)
"""
    written = piped(script=script, **variables).stderr
    assert "\x1b" not in written and "\r" not in written
    assert len(written.strip().splitlines()) == 1 and "40/40" in written


@pytest.mark.slow
def test_tables_are_not_cut_in_a_narrow_terminal() -> None:
    script = """
from clla import console
from clla.tables import Table
titles = ("predicted-loss", "bytes/token", "a-long-heading", "another-heading")
console.show(Table.of(titles, [("0.12345678", "123,456,789", "some words", "x")]))
titles, cells = ("some setting", *["bytes at 2048"] * 12, "last"), ("6.25 %, window 128", *["100.0 %"] * 12, "50 %")
console.show(Table.of(titles, [cells], words=1))
"""
    written = piped(script=script, COLUMNS="30").stdout
    assert "…" not in written
    assert all(cell in written for cell in ("some words", "6.25 %, window 128", "100.0 %", "50 %", "last"))
    assert all(word in written for word in ("predicted-loss", "123,456,789", "a-long-heading", "another-heading"))
