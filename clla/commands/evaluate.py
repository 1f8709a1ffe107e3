"""`clla eval`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from clla import console
from clla.commands.options import AsJson, errors, start, with_settings
from clla.evaluate.options import Options


@with_settings(Options)
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Converted checkpoint: a directory or user/repo\\[@revision].")],
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Measure perplexity, KL, retrieval and cache bytes of a converted model against its source."""
    with errors(as_json, interrupted="nothing was written; the checkpoint is as it was"):
        options = Options.checked(**settings)
        start()
        from clla import api

        report = api.evaluate_model(checkpoint, **options.model_dump(exclude_none=True))
        if as_json:
            print(json.dumps(report.to_json()))
            return
        for table in report.tables():
            console.show(table)
