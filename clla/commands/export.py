"""`clla export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from clla import console
from clla.commands.options import OUTPUT, RUN, AsJson, Device, errors, path, start
from clla.errors import UsageError

FORMATS = ("deepseek",)


def export(
    checkpoint: Annotated[str, typer.Argument(help="Directory that clla convert or clla heal wrote.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory to write.", rich_help_panel=OUTPUT, parser=path)
    ],
    format: Annotated[
        str,
        typer.Option(help="deepseek writes DeepseekV3, as other engines run it.", rich_help_panel=OUTPUT),
    ] = "deepseek",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: AsJson = False,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="Dtype of the weights: auto, float32 or bfloat16.", rich_help_panel=RUN)
    ] = "auto",
) -> None:
    """Write a conversion with decoupled keys as a model of other engines; its latents are not quantized there."""
    with errors(as_json, interrupted="nothing was written; the checkpoint is as it was"):
        if format not in FORMATS:
            raise UsageError(f"--format {format}", expected=" or ".join(FORMATS), remedy="use one of them")
        if dtype not in ("auto", "float32", "bfloat16"):
            raise UsageError(f"--dtype {dtype}", expected="auto, float32 or bfloat16", remedy="use one of them")
        start()
        from clla.export.write import export_checkpoint
        from clla.source.device import pick_device

        folder = output.resolve()
        done = export_checkpoint(checkpoint, folder, device=pick_device(device), dtype=dtype, overwrite=overwrite)
        if as_json:
            told = {"output": str(folder), "config": done.config, "kl_to_checkpoint": done.kl, "healed": done.healed}
            print(json.dumps(told))
            return
        console.results.print(
            f"DeepseekV3 with latents of {done.config['kv_lora_rank']} and rotary keys of "
            f"{done.config['qk_rope_head_dim']} components per layer, not quantized; KL to the checkpoint without its "
            f"quantizer {done.kl:.1g} nats per token"
        )
        if not done.healed:
            console.say("The checkpoint was not healed: neither is this one of use before clla heal has trained it")
        console.say(f"Wrote {folder}")
