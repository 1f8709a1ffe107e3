"""`clla eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from clla import console
from clla.commands.shared import Device, errors, integers, start
from clla.errors import UsageError


def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Converted checkpoint.")],
    text: Annotated[str, typer.Option(help="Text to measure on; default: the end of the bundled text.")] = "bundled",
    windows: Annotated[int, typer.Option(min=1, help="Windows of text.")] = 4,
    window_length: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 2048,
    chunk: Annotated[Optional[int], typer.Option(min=1, help="Tokens a step; default: the exact window.")] = None,
    select_tokens: Annotated[
        Optional[int], typer.Option(min=1, help="Old tokens read in full; steps then are as short as that takes.")
    ] = None,
    contexts: Annotated[str, typer.Option(help="Context lengths at which caches are measured.")] = "512,2048,8192",
    retrieval: Annotated[bool, typer.Option(help="Also plant codes and ask for them.")] = True,
    retrieval_context: Annotated[int, typer.Option(min=128, help="Tokens around a planted code.")] = 4096,
    retrieval_trials: Annotated[int, typer.Option(min=1, help="Number of codes.")] = 8,
    teacher: Annotated[
        Optional[str], typer.Option(help="Source model, where the weights were trained; default: from the recipe.")
    ] = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
) -> None:
    """Measure perplexity, KL, retrieval and cache bytes of a converted model against its source."""
    with errors(as_json):
        start()
        from clla.calibrate.data import evaluation_windows
        from clla.evaluate.report import before_and_after
        from clla.load import load_checkpoint, recipe_of, teacher_of
        from clla.source import pick_device

        lengths, where = integers(contexts), pick_device(device)
        loaded = load_checkpoint(checkpoint, device=where, dtype=dtype)
        if select_tokens is not None:
            chunk = _select(loaded.model, select_tokens, chunk)
        trained = teacher is not None or loaded.model.config.clla.get("healed") is not None
        source = teacher_of(loaded, recipe_of(Path(checkpoint).expanduser()), teacher, where) if trained else None
        ids = evaluation_windows(text, loaded.tokenizer, count=windows, length=window_length)
        with console.progress("Measuring (windows)", len(ids)) as advance:
            report = before_and_after(
                loaded.model,
                loaded.tokenizer,
                loaded.plan,
                ids,
                chunk=chunk,
                contexts=lengths,
                retrieval_context=retrieval_context if retrieval else 0,
                retrieval_trials=retrieval_trials,
                source_model=source,
                on_step=advance,
            )
        if as_json:
            print(json.dumps(report.to_json()))
            return
        for table in report.tables():
            console.results.print(table)


def _select(model: Any, tokens: int, chunk: Optional[int]) -> int:
    """Have a model select tokens; tokens a step at which it does so."""
    model.select_tokens = tokens
    most = model.reading_tokens
    if chunk is not None and chunk > most:
        raise UsageError(
            f"steps of {chunk} tokens read all old ones", expected=f"at most {most}", remedy=f"pass --chunk {most}"
        )
    return min(most, chunk or most)
