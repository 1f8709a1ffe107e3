"""`clla eval`."""

from __future__ import annotations

import json
from typing import Annotated, Optional

import typer

from clla import console
from clla.commands.options import AsJson, Device, Dtype, SequenceLength, SourceModel, Text, errors, integers, start
from clla.recipe import LARGEST


def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Converted checkpoint: a directory or user/repo\\[@revision].")],
    text: Text = "bundled",
    num_samples: Annotated[int, typer.Option(min=1, max=LARGEST, help="Samples of text.")] = 4,
    sequence_length: SequenceLength = None,
    chunk: Annotated[
        Optional[int], typer.Option(min=1, max=LARGEST, help="Tokens per step; default: the exact window.")
    ] = None,
    attend_top_k: Annotated[
        Optional[int],
        typer.Option(min=1, max=LARGEST, help="Old tokens read in full; steps then are as short as that takes."),
    ] = None,
    contexts: Annotated[
        Optional[str],
        typer.Option(help="Context lengths at which caches are measured; default: 512,2048,8192, as far as it goes."),
    ] = None,
    retrieval: Annotated[bool, typer.Option(help="Also plant codes and ask for them.")] = True,
    retrieval_context: Annotated[
        Optional[int],
        typer.Option(
            min=128, max=LARGEST, help="Tokens around a planted code; default: 4096, or what the model takes."
        ),
    ] = None,
    retrieval_trials: Annotated[int, typer.Option(min=1, max=LARGEST, help="Number of codes.")] = 8,
    source_model: SourceModel = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, KL, retrieval and cache bytes of a converted model against its source."""
    with errors(as_json, interrupted="nothing was written; the checkpoint is as it was"):
        start()
        from clla import api

        report = api.evaluate_model(
            checkpoint,
            text=text,
            num_samples=num_samples,
            sequence_length=sequence_length,
            chunk=chunk,
            attend_top_k=attend_top_k,
            contexts=integers(contexts) if contexts is not None else None,
            retrieval=retrieval,
            retrieval_context=retrieval_context,
            retrieval_trials=retrieval_trials,
            source_model=source_model,
            device=device,
            dtype=dtype,
        )
        if as_json:
            print(json.dumps(report.to_json()))
            return
        for table in report.tables():
            console.show(table)
