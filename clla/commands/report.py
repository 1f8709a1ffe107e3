"""`clla report`."""

from __future__ import annotations

import json
import webbrowser
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from clla import console
from clla.commands.options import OUTPUT, AsJson, errors, path, start, with_settings
from clla.report.options import Options


@with_settings(Options)
def report(
    checkpoint: Annotated[str, typer.Argument(help="Converted checkpoint.")],
    output: Annotated[
        Optional[Path],
        typer.Option(
            "--output",
            "-o",
            help="File to write; default: CHECKPOINT-report.html.",
            rich_help_panel=OUTPUT,
            parser=path,
        ),
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Show it in the browser.", rich_help_panel=OUTPUT)] = False,
    prompt: Annotated[Optional[list[str]], typer.Option(help="Prompt to continue, too; may be repeated.")] = None,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Write one HTML page about a converted model: plan, quality, memory, errors of layers, samples."""
    with errors(as_json, interrupted="no page was written; the checkpoint is as it was"):
        options = Options.checked(**settings)
        start()
        from clla.hub.revision import beside
        from clla.report.run import make_page

        page = (output or beside(checkpoint, "-report.html")).resolve()
        data = make_page(checkpoint, page, options, prompts=tuple(prompt or ()))
        if as_json:
            found = {
                "output": str(page),
                "layers": [asdict(error) for error in data.errors],
                "samples": [asdict(sample) for sample in data.samples],
                "missing": [asdict(item) for item in data.missing],
                "measured": data.file.report.to_json() if data.file.report else None,
            }
            print(json.dumps(found))
        for item in data.missing:
            console.say(f"{item.what}: not on the page. {item.why} {item.how}")
        console.say(f"Wrote {page}")
        if open_it and not webbrowser.open(page.as_uri()):
            console.say("No browser could be opened; open the file yourself")
