"""`clla report`."""

from __future__ import annotations

import json
import webbrowser
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer

from clla import console
from clla.commands.options import OUTPUT, AsJson, Device, Dtype, errors, path, start
from clla.recipe import LARGEST


def report(
    checkpoint: Annotated[str, typer.Argument(help="Converted checkpoint.")],
    output: Annotated[
        Optional[Path],
        typer.Option(
            "--output",
            "-o",
            "--html",
            help="File to write; default: CHECKPOINT-report.html.",
            rich_help_panel=OUTPUT,
            parser=path,
        ),
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Show it in the browser.", rich_help_panel=OUTPUT)] = False,
    samples: Annotated[
        Optional[int],
        typer.Option(min=0, max=LARGEST, help="Built-in prompts to continue; default: 3, with --prompt none."),
    ] = None,
    prompt: Annotated[Optional[list[str]], typer.Option(help="Continue this, too; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=LARGEST, help="Tokens to write after each prompt.")] = 160,
    text: Annotated[str, typer.Option(help="Text to measure on; default: the end of the bundled text.")] = "bundled",
    num_samples: Annotated[
        int, typer.Option(min=0, max=LARGEST, help="Samples of text that errors of layers are measured on; 0: none.")
    ] = 2,
    sequence_length: Annotated[
        Optional[int],
        typer.Option(min=2, max=LARGEST, help="Tokens per sample; default: 2048, or what the model takes."),
    ] = None,
    source_model: Annotated[
        Optional[str], typer.Option(help="Source model, where the weights were trained; default: from the recipe.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Write one HTML page about a converted model: plan, quality, memory, errors of layers, samples."""
    with errors(as_json, interrupted="no page was written; the checkpoint is as it was"):
        start()
        from clla.hub.revision import beside
        from clla.report import Options, make_page

        page = (output or beside(checkpoint, "-report.html")).resolve()
        options = Options(
            html=page,
            samples=samples if samples is not None else 0 if prompt else 3,
            prompts=tuple(prompt or ()),
            new_tokens=max_new_tokens,
            text=text,
            windows=num_samples,
            window_length=sequence_length,
            teacher=source_model,
            device=device,
            dtype=dtype,
        )
        data = make_page(checkpoint, options)
        if as_json:
            found = {
                "output": str(page),
                "layers": [asdict(error) for error in data.errors],
                "samples": [asdict(sample) for sample in data.samples],
                "missing": [asdict(item) for item in data.missing],
                "measured": data.report.to_json() if data.report else None,
            }
            print(json.dumps(found))
        for item in data.missing:
            console.say(f"{item.what}: not on the page. {item.why} {item.how}")
        console.say(f"Wrote {page}")
        if open_it and not webbrowser.open(page.as_uri()):
            console.say("No browser could be opened; open the file yourself")
