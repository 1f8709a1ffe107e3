"""`clla card`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from clla import console
from clla.commands.options import errors, path
from clla.storage.filenames import MODEL_CARD


def card(
    checkpoint: Annotated[Path, typer.Argument(help="Directory that clla convert or clla heal wrote.", parser=path)],
    repo_id: Annotated[
        Optional[str], typer.Option(help="Hub id that its code loads; default: the directory's name.")
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Replace README.md, edits included, instead of printing.")
    ] = False,
) -> None:
    """Make the model card of a checkpoint again, from its report."""
    with errors(interrupted="the card is as it was"):
        from clla.publish.card import render, write_card

        name = repo_id or checkpoint.resolve().name
        if write:
            write_card(checkpoint, name)
            console.say(f"Wrote {checkpoint / MODEL_CARD}")
        else:
            print(render(checkpoint, name), end="")
