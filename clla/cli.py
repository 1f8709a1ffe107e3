"""The command line, put together from `clla.commands`: a command is imported when it is asked for."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Annotated, Any

import typer

from clla._version import __version__
from clla.commands.options import Checked
from clla.usage import called

# In the order of the help: the name of each command, and its file and function in `clla.commands`.
COMMANDS = {
    "convert": "convert",
    "plan": "plan",
    "heal": "heal",
    "eval": "evaluate",
    "compare": "compare",
    "bench": "bench",
    "generate": "generate",
    "card": "card",
    "report": "report",
    "push": "push",
    "doctor": "doctor",
    "export": "export",
    "recipes": "recipes",
}


class _Imported(Mapping[str, Any]):
    """Commands by name, each imported when it is looked up."""

    def __getitem__(self, name: str) -> Any:
        file = COMMANDS[name]
        found = getattr(import_module(f"clla.commands.{file}"), file)
        if isinstance(found, typer.Typer):  # a group
            return typer.main.get_command(found)
        alone = typer.Typer(rich_markup_mode="rich", add_completion=False)
        alone.command(name=name)(found)
        return typer.main.get_command(alone)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class Commands(Checked):
    """All commands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = ChainMap(dict(self.commands), _Imported())  # type: ignore[arg-type]


app = typer.Typer(
    cls=Commands,
    rich_markup_mode="rich",  # a bracket in a help text is escaped
    help="Convert language models to Cross-Layer Latent Attention: one dial, the KV byte budget.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point."""
    app()


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
    context.with_resource(called(f"clla {context.invoked_subcommand}"))
