"""`clla heal`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from clla import console
from clla.commands.options import (
    HEAL,
    OUTPUT,
    RUN,
    AsJson,
    Device,
    Dtype,
    Evaluate,
    Overwrite,
    ReportTo,
    errors,
    path,
    show_healing,
    start,
    with_options,
)
from clla.recipe import OPTIONS_OF


@with_options(OPTIONS_OF["heal"])
def heal(
    checkpoint: Annotated[str, typer.Argument(help="Directory that clla convert wrote, or user/repo\\[@revision].")],
    output: Annotated[
        Optional[Path],
        typer.Option(
            "--output",
            "-o",
            help="Directory of the healed checkpoint; default: CHECKPOINT-healed.",
            rich_help_panel=OUTPUT,
            parser=path,
        ),
    ] = None,
    source_model: Annotated[
        Optional[str],
        typer.Option(
            help="Source model; default: the checkpoint's own weights, or where they came from.", rich_help_panel=HEAL
        ),
    ] = None,
    report_to: ReportTo = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last saved step.", rich_help_panel=RUN)
    ] = False,
    work_dir: Annotated[
        Optional[Path], typer.Option(help="Keep text and states here.", rich_help_panel=RUN, parser=path)
    ] = None,
    evaluate: Evaluate = True,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    **changes: Any,
) -> None:
    """Train a converted model briefly against its source, to buy back what its budget lost."""
    with errors(as_json, interrupted="the checkpoint is as it was, and nothing half-written was left"):
        start()
        from accelerate import PartialState

        from clla import api

        done = api.heal_model(
            checkpoint,
            output=output,
            source_model=source_model,
            report_to=report_to,
            device=device,
            dtype=dtype,
            resume=resume,
            work_dir=work_dir,
            evaluate=evaluate,
            overwrite=overwrite,
            **changes,
        )
        if not PartialState().is_main_process:
            return
        if as_json:
            measured = done.report.to_json() if done.report else None
            print(json.dumps({"output": str(done.output), "measured": measured, "healing": done.healing.to_json()}))
            return
        show_healing(done.healing, done.report)
        console.say(f"Wrote {done.output}")
        console.say(f"A page about it: clla report {done.output}")
