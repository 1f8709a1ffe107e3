"""What commands share: errors as messages and exit codes, option groups, lists of numbers."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from typer.core import TyperGroup

from clla import console
from clla.commands.failures import explained, wants_traceback
from clla.errors import CllaError, UsageError, is_unicode
from clla.recipes import builtin_recipes
from clla.storage.places import expanded

MOST = 2**53  # of any number: more is a slip, and neither JSON nor torch would hold it
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
def errors(as_json: bool = False, *, interrupted: str) -> Iterator[None]:
    """Turn whatever goes wrong into one message and an exit code: 2 usage or recipe, 1 everything else.

    Args:
        as_json: print the error on stdout, too.
        interrupted: what Ctrl-C or SIGTERM (exit codes 130 and 143) leave behind, where the run does not say it itself.
    """
    try:
        with _terminated():
            yield
            sys.stdout.flush()
    except BrokenPipeError:  # nobody reads any longer, as in `clla … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except KeyboardInterrupt as stop:
        console.label("Interrupted", "", f"; {'; '.join(_notes(stop)) or interrupted}")
        raise typer.Exit(128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT)) from None
    except Exception as error:
        if isinstance(error, typer.Exit | typer.Abort) or hasattr(error, "format_message"):
            raise  # typer's own
        found = explained(error)
        show_error(found, _notes(error))
        if as_json:
            print(json.dumps(as_object(found)))
        if wants_traceback():
            traceback.print_exception(error)
        raise typer.Exit(found.exit_code) from error


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that nothing half-written stays."""

    def stop(number: int, frame: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Commands(TyperGroup):
    """All commands, and what goes wrong before one of them begins."""

    def main(self, *args: Any, **options: Any) -> Any:
        console.write_anything()
        try:
            with errors(interrupted="nothing had begun"):
                return super().main(*args, **options)
        except typer.Exit as stop:
            sys.exit(stop.exit_code)

    def invoke(self, ctx: Any) -> Any:
        as_json = "--json" in ctx.args
        try:
            with errors(as_json, interrupted="nothing had begun"):
                _check_words(ctx.args)
            return super().invoke(ctx)
        except Exception as error:
            if as_json and hasattr(error, "format_message"):  # a slip in the options, which typer shows on stderr
                print(json.dumps(as_object(UsageError(error.format_message(), remedy="see the command's --help"))))
            raise


def _check_words(words: list[str]) -> None:
    """Refuse options and arguments that are empty, which a path or a number would be made of in silence, or no UTF-8.

    Raises:
        UsageError: there is one.
    """
    for word in words:
        if not is_unicode(word):
            raise UsageError(
                f"{word} is no UTF-8", expected="options and names in UTF-8", remedy="convert it, or rename the file"
            )
    for before, word in zip(["", *words], words, strict=False):
        joined = word.startswith("--") and word.endswith("=")
        if word == "" or joined:
            name = word.removesuffix("=") if joined else before if before.startswith("-") else "an argument"
            raise UsageError(
                f"{name} is empty",
                expected="a value",
                remedy="give it one or leave it out; a shell variable that is not set makes an empty one",
            )


def show_error(error: CllaError, notes: list[str] | None = None) -> None:
    """A mistake on stderr: what was got, what was expected and the remedy."""
    console.label("Error:", "red", f" {error.got}")
    if error.expected:
        console.label("  expected:", "", f" {error.expected}")
    if error.remedy:
        console.label("  remedy:", "", f"   {error.remedy}")
    for note in notes or []:
        console.label("  note:", "", f"     {note}")


def as_object(error: CllaError) -> dict[str, str]:
    """A mistake as `--json` prints it."""
    return {"error": error.got, "expected": error.expected, "remedy": error.remedy}


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))


def start() -> None:
    """What every command that touches a model does first."""
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # its errors are raised, and told once
    from transformers.utils import logging

    from clla.registration import register

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    register()


def integers(text: str, option: str = "--contexts") -> tuple[int, ...]:
    """Positive whole numbers from a comma-separated option."""
    try:
        numbers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        numbers = (0,)
    if not numbers or any(not 1 <= number <= MOST for number in numbers):
        raise UsageError(f"{option} {text}", expected="positive whole numbers, e.g. 512,2048", remedy="correct it")
    return numbers


def show_healing(healing: Any, after: Any) -> None:
    """Tables and verdict of a healing run."""
    for table in healing.tables(after):
        console.show(table)
    console.results.print(healing.verdict)
