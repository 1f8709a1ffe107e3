"""The command line, put together from `clla.commands`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from typing import Annotated

import typer

from clla._version import __version__
from clla.commands import (
    bench,
    card,
    compare,
    convert,
    doctor,
    evaluate,
    export,
    generate,
    heal,
    plan,
    push,
    recipes,
    report,
)
from clla.commands.options import Commands

app = typer.Typer(
    cls=Commands,
    rich_markup_mode="rich",  # a bracket in a help text is escaped
    help="Convert language models to Cross-Layer Latent Attention: one dial, the KV byte budget.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
recipes_app = typer.Typer(help="Built-in recipes.", no_args_is_help=True)
app.command()(convert.convert)
app.command()(plan.plan)
app.command()(heal.heal)
app.command(name="eval")(evaluate.evaluate)
app.command()(compare.compare)
app.command()(bench.bench)
app.command()(generate.generate)
app.command()(card.card)
app.command()(report.report)
app.command()(push.push)
app.command()(doctor.doctor)
app.command()(export.export)
app.add_typer(recipes_app, name="recipes")
recipes_app.command()(recipes.ls)
recipes_app.command()(recipes.show)
recipes_app.command()(recipes.cp)


def main() -> None:
    """Entry point."""
    app()


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit
