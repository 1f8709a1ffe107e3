"""`clla heal`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from clla import console
from clla.commands.options import HEAL, OUTPUT, RUN, TRAINED, Device, Dtype, Tracker, errors, path, show_healing, start


def heal(
    checkpoint: Annotated[str, typer.Argument(help="Directory that clla convert wrote, or user/repo\\[@revision].")],
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", help="Default: CHECKPOINT-healed.", rich_help_panel=OUTPUT, parser=path),
    ] = None,
    tokens: Annotated[Optional[int], typer.Option(help="Default: by budget and device.", rich_help_panel=HEAL)] = None,
    train: Annotated[
        Optional[str],
        typer.Option(help="codec, attention or all weights.", rich_help_panel=HEAL, autocompletion=TRAINED),
    ] = None,
    codec_lr: Annotated[Optional[float], typer.Option(help="Learning rate of the codec.", rich_help_panel=HEAL)] = None,
    weight_lr: Annotated[
        Optional[float], typer.Option(help="Learning rate of the weights.", rich_help_panel=HEAL)
    ] = None,
    sequence_length: Annotated[
        Optional[int],
        typer.Option(help="Tokens per sequence; default: 2048, or what the model takes.", rich_help_panel=HEAL),
    ] = None,
    batch_tokens: Annotated[Optional[int], typer.Option(help="Tokens a step.", rich_help_panel=HEAL)] = None,
    codec_share: Annotated[
        Optional[float],
        typer.Option(help="Share of the tokens that first trains codecs on attention outputs.", rich_help_panel=HEAL),
    ] = None,
    cache_share: Annotated[
        Optional[float], typer.Option(help="Last share of the steps, on the model's own cache.", rich_help_panel=HEAL)
    ] = None,
    evaluations: Annotated[
        Optional[int], typer.Option(help="Times that held-out KL is measured and all is saved.", rich_help_panel=HEAL)
    ] = None,
    dataset: Annotated[
        Optional[str],
        typer.Option(
            help="Text to train on; default: that of the calibration. 'self': the model's own.", rich_help_panel=HEAL
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Compute layers twice to save memory.", rich_help_panel=HEAL),
    ] = False,
    seed: Annotated[Optional[int], typer.Option(help="Of the order of the text.", rich_help_panel=HEAL)] = None,
    teacher: Annotated[
        Optional[str],
        typer.Option(
            help="Source model; default: the checkpoint's own weights, or where they came from.", rich_help_panel=HEAL
        ),
    ] = None,
    tracker: Tracker = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last saved step.", rich_help_panel=RUN)
    ] = False,
    work_dir: Annotated[
        Optional[Path], typer.Option(help="Keep text and states here.", rich_help_panel=RUN, parser=path)
    ] = None,
    report: Annotated[bool, typer.Option(help="Measure before and after.", rich_help_panel=RUN)] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace what is in --output.", rich_help_panel=OUTPUT)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Train a converted model briefly against its source, to buy back what its budget lost."""
    with errors(as_json, interrupted="the checkpoint is as it was, and nothing half-written was left"):
        start()
        from accelerate import PartialState

        from clla import api

        done = api.heal_model(
            checkpoint,
            output=output,
            tokens=tokens,
            train=train,
            codec_lr=codec_lr,
            weight_lr=weight_lr,
            sequence_length=sequence_length,
            batch_tokens=batch_tokens,
            codec_share=codec_share,
            cache_share=cache_share,
            evaluations=evaluations,
            dataset=dataset,
            gradient_checkpointing=gradient_checkpointing,
            seed=seed,
            teacher=teacher,
            tracker=tracker,
            device=device,
            dtype=dtype,
            resume=resume,
            work_dir=work_dir,
            report=report,
            overwrite=overwrite,
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
