"""`clla bench`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Optional

import typer

from clla import console
from clla.bench.options import Options
from clla.commands.options import AsJson, errors, start, with_settings


@with_settings(Options)
def bench(
    checkpoint: Annotated[Optional[str], typer.Argument(help="Converted checkpoint; or give --shape.")] = None,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Measure speed and memory, source and converted model side by side."""
    with errors(as_json, interrupted="nothing was written; the checkpoint is as it was"):
        options = Options.checked(**settings)
        start()
        from clla.bench.run import run_bench

        report = run_bench(checkpoint, options)
        if as_json:
            print(json.dumps(report.to_json()))
            return
        for table in report.tables():
            console.show(table)
        if options.plot is not None:
            console.say(f"Wrote {options.plot}")
