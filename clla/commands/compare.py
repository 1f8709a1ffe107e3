"""`clla compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from clla import console
from clla.commands.options import AsJson, errors, path, start, with_settings
from clla.compare.options import Options
from clla.storage.filenames import COMPARISON
from clla.storage.places import check_writable, holding


@with_settings(Options)
def compare(
    model: Annotated[str, typer.Argument(help="Hub id (user/repo\\[@revision]), directory, .gguf file, or 'demo'.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of table and pictures.", parser=path)] = Path(
        "comparison"
    ),
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Run published methods and ours side by side on one model, at equal measured bytes."""
    with errors(as_json, interrupted="no table was written; statistics that were complete stay in --work-dir"):
        options = Options.checked(**settings)
        assert options.shares, "a mistake in them is told first"
        start()
        from clla.compare.run import run_comparison

        check_writable(output / COMPARISON, "--output")
        if options.work_dir is not None:
            check_writable(options.work_dir / "stats", "--work-dir")
        with holding(output, *([options.work_dir] if options.work_dir is not None else [])):
            result = run_comparison(model, options)
            result.save(output)
        if as_json:
            print(json.dumps(result.to_json()))
            return
        for table in result.tables():
            console.show(table)
        console.say(f"Wrote {output}: comparison.json, .csv, .png and .svg")
