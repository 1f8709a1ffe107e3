"""What commands share: errors as messages and exit codes, option groups, lists of numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from clla import console
from clla.errors import CllaError, UsageError
from clla.places import expanded
from clla.recipes import builtin_recipes

CALIBRATION, PLAN, HEAL, OUTPUT, RUN = "Calibration", "Budget and plan", "Healing", "Output", "Run"


def one_of(*words: str) -> Callable[[str], list[str]]:
    """Completion of an option that takes one of some words."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def recipe_names(incomplete: str) -> list[str]:
    """Completion of a built-in recipe's name."""
    return [name for name in builtin_recipes() if name.startswith(incomplete)]


def path(text: str) -> Path:
    """A path option or argument, `~` taken for the home directory: the shell leaves `--output=~/x` alone."""
    try:
        return expanded(text)
    except CllaError as error:
        raise typer.BadParameter(str(error)) from error


Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda, …", rich_help_panel=RUN, autocompletion=one_of("auto", "cpu", "cuda"))
]
DTYPES = one_of("auto", "float32", "bfloat16", "float16")
PLANNERS = one_of("dynamic", "uniform", "cluster", "pyramid", "kvsharer")
TRAINED = one_of("codec", "attention", "all")
SOURCES = one_of("group", "first")
PLACEMENTS = one_of("auto", "device", "spread", "stream")
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16.", rich_help_panel=RUN, autocompletion=DTYPES)]

# What a plan is made from; `clla convert` and `clla plan` take the same.
RecipeName = Annotated[
    str,
    typer.Option(
        help="Built-in recipe or YAML file; other options override it.",
        rich_help_panel=PLAN,
        autocompletion=recipe_names,
    ),
]
KVBudget = Annotated[Optional[str], typer.Option(help="'6.25%', '0.0625' or '1440B' a token.", rich_help_panel=PLAN)]
Window = Annotated[Optional[int], typer.Option(help="Newest tokens kept exact.", rich_help_panel=PLAN)]
Sinks = Annotated[Optional[int], typer.Option(help="First tokens kept exact.", rich_help_panel=PLAN)]
Evict = Annotated[
    Optional[float],
    typer.Option(help="Share of the latents that leaves again, least attended first.", rich_help_panel=PLAN),
]
MaxGroupSize = Annotated[Optional[int], typer.Option(help="Most layers that share a latent.", rich_help_panel=PLAN)]
Bits = Annotated[Optional[str], typer.Option(help="Bit widths allowed, e.g. '2,4,8'.", rich_help_panel=PLAN)]
LatentSource = Annotated[
    Optional[str],
    typer.Option(help="Latent source: group or first.", rich_help_panel=PLAN, autocompletion=SOURCES),
]
Tracker = Annotated[Optional[str], typer.Option(help="Log training to: tensorboard, wandb, …", rich_help_panel=HEAL)]


@contextmanager
def errors(as_json: bool = False, *, interrupted: str = "a conversion goes on with --resume") -> Iterator[None]:
    """Turn mistakes into one message and an exit code: 2 usage or recipe, 1 everything else."""
    try:
        yield
    except CllaError as error:
        show_error(error)
        if as_json:
            print(json.dumps(as_object(error)))
        raise typer.Exit(error.exit_code) from error
    except OSError as error:
        console.messages.print(f"[red]Error:[/red] {_escape(str(error))}", soft_wrap=True)
        console.messages.print("  remedy:   check that the path exists and may be written to", soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        console.say(f"Interrupted; {interrupted}")
        raise typer.Exit(130) from None


def show_error(error: CllaError) -> None:
    """A mistake on stderr: what was got, what was expected and the remedy."""
    console.messages.print(f"[red]Error:[/red] {_escape(error.got)}", soft_wrap=True)
    if error.expected:
        console.messages.print(f"  expected: {_escape(error.expected)}", soft_wrap=True)
    if error.remedy:
        console.messages.print(f"  remedy:   {_escape(error.remedy)}", soft_wrap=True)


def as_object(error: CllaError) -> dict[str, str]:
    """A mistake as `--json` prints it."""
    return {"error": error.got, "expected": error.expected, "remedy": error.remedy}


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def start() -> None:
    """What every command that touches a model does first."""
    from transformers.utils import logging

    import clla

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    clla.register()


def integers(text: str, option: str = "--contexts") -> tuple[int, ...]:
    """Positive whole numbers from a comma-separated option."""
    try:
        numbers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        numbers = (0,)
    if any(number < 1 for number in numbers):
        raise UsageError(f"{option} {text}", expected="positive whole numbers, e.g. 512,2048", remedy="correct it")
    return numbers


def show_healing(healing: Any, after: Any) -> None:
    """Tables and verdict of a healing run."""
    for table in healing.tables(after):
        console.show(table)
    console.results.print(healing.verdict)
