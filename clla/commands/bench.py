"""`clla bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from clla import console
from clla.commands.options import OUTPUT, Device, Dtype, errors, integers, path, start
from clla.recipe import LARGEST

SHAPE = "A shape instead of a checkpoint"


def bench(
    checkpoint: Annotated[Optional[str], typer.Argument(help="Converted checkpoint; or give --shape.")] = None,
    shape: Annotated[
        Optional[str],
        typer.Option(
            help="Random weights of a known shape instead: smollm2-135m, llama-3.2-1b, llama-3-8b, qwen3-8b or tiny.",
            rich_help_panel=SHAPE,
        ),
    ] = None,
    kv_budget: Annotated[
        Optional[str], typer.Option(help="Of the shape's latents: '6.25%', '1440B', …", rich_help_panel=SHAPE)
    ] = None,
    max_layers_per_group: Annotated[
        Optional[int], typer.Option(min=1, max=LARGEST, help="Layers that share a latent.", rich_help_panel=SHAPE)
    ] = None,
    contexts: Annotated[
        Optional[str], typer.Option(help="Tokens in the cache; default 512,2048, on a GPU 2048,8192,32768.")
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="Sequences at once, e.g. 1,8.")] = "1",
    new_tokens: Annotated[int, typer.Option(min=2, max=LARGEST, help="Tokens decoded in each pass.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, max=LARGEST, help="Timed passes of each model.")] = 3,
    prefill_chunk: Annotated[
        Optional[int],
        typer.Option(
            min=1,
            max=LARGEST,
            help="Tokens a call of the prefill; default as in generate(): the source takes all at once.",
        ),
    ] = None,
    largest_batch: Annotated[
        bool, typer.Option("--largest-batch", help="Find the most sequences that decode at the longest context.")
    ] = False,
    memory_limit: Annotated[
        Optional[str], typer.Option(help="For the caches of the largest batch, on a CPU: e.g. 2GB.")
    ] = None,
    attend_top_k: Annotated[
        Optional[int], typer.Option(min=1, max=LARGEST, help="Only so many old tokens are decoded in full, the best.")
    ] = None,
    static: Annotated[bool, typer.Option("--static", help="Tell the converted cache its length beforehand.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST, help="Of tokens and random weights.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    plot: Annotated[
        Optional[Path], typer.Option(help="Draw speed against context.", rich_help_panel=OUTPUT, parser=path)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Measure speed and memory, source and converted model side by side."""
    with errors(as_json, interrupted="nothing was written; the checkpoint is as it was"):
        start()
        from clla.arguments import parse_size
        from clla.bench import Options, run_bench

        options = Options(
            shape=shape,
            kv_budget=kv_budget,
            max_layers_per_group=max_layers_per_group,
            contexts=integers(contexts) if contexts is not None else None,
            batch_sizes=integers(batch_sizes, "--batch-sizes"),
            new_tokens=new_tokens,
            repeats=repeats,
            prefill_chunk=prefill_chunk,
            largest_batch=largest_batch,
            memory_limit=parse_size(memory_limit, "--memory-limit") if memory_limit is not None else None,
            attend_top_k=attend_top_k,
            static=static,
            device=device,
            dtype=dtype,
            seed=seed,
            plot=plot,
        )
        report = run_bench(checkpoint, options)
        if as_json:
            print(json.dumps(report.to_json()))
            return
        for table in report.tables():
            console.show(table)
        if plot is not None:
            console.say(f"Wrote {plot}")
