"""What commands share: errors as messages and exit codes, option groups, lists of numbers."""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, get_args, get_origin

import typer
from rich.markup import escape
from typer.core import TyperGroup

from clla import console
from clla.commands.failures import explained, wants_traceback
from clla.errors import CllaError, UsageError, is_unicode
from clla.recipe import SECTIONS
from clla.recipes import builtin_recipes
from clla.storage.places import expanded

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from clla.arguments import Settings

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
    str,
    typer.Option(
        help="Device to compute on: auto, cpu, cuda or cuda:N.",
        rich_help_panel=RUN,
        autocompletion=one_of("auto", "cpu", "cuda"),
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Dtype of the weights: auto, float32, bfloat16 or float16.",
        rich_help_panel=RUN,
        autocompletion=one_of("auto", "float32", "bfloat16", "float16"),
    ),
]
RecipeName = Annotated[
    str,
    typer.Option(
        help="Built-in recipe or YAML file; other options override it.",
        rich_help_panel=PLAN,
        autocompletion=recipe_names,
    ),
]
ReportTo = Annotated[Optional[str], typer.Option(help="Log training to: tensorboard, wandb, …", rich_help_panel=HEAL)]
AsJson = Annotated[bool, typer.Option("--json", help="Print figures as JSON.", rich_help_panel=OUTPUT)]
Evaluate = Annotated[bool, typer.Option("--eval/--no-eval", help="Measure before and after.", rich_help_panel=RUN)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in --output.", rich_help_panel=OUTPUT)]
PANELS = {"budget": PLAN, "plan": PLAN, "calibration": CALIBRATION, "heal": HEAL, "runtime": RUN}


def with_options(fields: Mapping[str, tuple[str, str]]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each of these fields of a recipe, in place of its last parameter `**changes`.

    Args:
        fields: section and field by the option's name.
    """
    found = {
        name: _option(SECTIONS[section].model_fields[field], name, PANELS[section])
        for name, (section, field) in fields.items()
    }
    return _generated(found, {})


def with_settings(settings: type[Settings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each of the settings, in place of its last parameter `**settings`."""
    fields = settings.model_fields
    found = {
        name: _option(field, name, (field.json_schema_extra or {}).get("panel"))  # type: ignore[union-attr, arg-type]
        for name, field in fields.items()
    }
    shown = {name: field.default for name, field in fields.items() if isinstance(field.default, str | int | float)}
    return _generated(found, shown)


def _generated(
    annotations: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**options: Any) -> None:
            command(**options)

        *own, _ = inspect.signature(command, eval_str=True).parameters.values()
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [parameter.replace(kind=keyword) for parameter in own] + [
            inspect.Parameter(name, keyword, default=defaults.get(name), annotation=annotation)
            for name, annotation in annotations.items()
        ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _option(field: FieldInfo, name: str, panel: str | None) -> Any:
    """The annotation of an option that stands for a field: its type, help, panel and completion."""
    inner = [kind for kind in get_args(field.annotation) if kind is not type(None)] or [field.annotation]
    words = get_args(field.annotation if get_origin(field.annotation) is Literal else inner[0])
    choices = words if words and all(isinstance(word, str) for word in words) else ()
    plain = get_origin(field.annotation) is not tuple and inner[0] in (int, float, bool, Path)
    kind: Any = inner[0] if plain else str
    told = field.description or ""
    told = f"{', '.join(choices[:-1])} or {choices[-1]}: {told}" if choices else told[:1].upper() + told[1:]
    option = typer.Option(
        *([f"--{name.replace('_', '-')}"] if kind is bool and not field.default else []),
        help=f"{escape(told)}.",
        rich_help_panel=panel,
        autocompletion=one_of(*choices) if choices else None,
        parser=path if kind is Path else None,
    )
    return Annotated[Optional[kind], option]


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


class Checked(TyperGroup):
    """A group of commands, and what goes wrong before one of them begins."""

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


def show_healing(healing: Any, after: Any) -> None:
    """Table and verdict of a healing run."""
    from clla.evaluate.report import healing_table

    if table := healing_table(healing.before, after):
        console.show(table)
    console.results.print(healing.verdict)
