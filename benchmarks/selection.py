"""Quality against the number of old tokens that a new one reads in full, one token per step.

python benchmarks/selection.py CHECKPOINT [--text FILE] [--context 3584] [--tokens 96] [--attend-top-k 0,256]
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from clla import console, register
from clla.checkpoint.load import load_checkpoint
from clla.modeling import attention_clla
from clla.modeling.hooks_clla import CACHE
from clla.source.device import pick_device
from clla.tables import Table
from clla.text.sequences import evaluation_samples


def main(
    checkpoint: Annotated[str, typer.Argument(help="Converted checkpoint.")],
    text: Annotated[str, typer.Option(help="Text to measure on; default: the end of the bundled text.")] = "bundled",
    num_samples: Annotated[int, typer.Option(min=1, help="Samples of text.")] = 2,
    context: Annotated[int, typer.Option(min=256, help="Tokens before those that are measured.")] = 3584,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens measured, each a step of its own.")] = 96,
    attend_top_k: Annotated[str, typer.Option(help="Numbers of tokens that are read in full.")] = "0,128,256,512",
    buckets: Annotated[str, typer.Option(help="Old tokens with one rotation; default: what the model allows.")] = "",
    ranks: Annotated[str, typer.Option(help="Components that judge; default: as built.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of both models: auto, float32, bfloat16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
) -> None:
    """Mean KL to the source and to reading everything with exact rotations, nats per token."""
    register()
    loaded = load_checkpoint(checkpoint, device=pick_device(device), dtype=dtype)
    model: Any = loaded.model
    ids = evaluation_samples(text, loaded.tokenizer, count=num_samples, length=context + tokens).to(model.device)
    with torch.inference_mode():
        plain = [model.source(row[None], use_cache=False, logits_to_keep=tokens).logits[0] for row in ids]
        source = [logits.float().log_softmax(-1) for logits in plain]
        exact = read(model, ids, tokens, 0, 1)
        found: list[dict[str, Any]] = []

        def told(read_in_full: int, bucket: int | None, rank: int | None, got: list[Tensor]) -> None:
            measured = {"kl": kl(source, got), "kl_to_exact": kl(exact, got)}
            found.append({"attend_top_k": read_in_full, "bucket": bucket, "rank": rank, **measured})
            console.say(json.dumps(found[-1]))

        told(0, 1, None, exact)
        judges: list[int | None] = [int(part) for part in ranks.split(",") if part]
        lengths: list[int | None] = [int(part) for part in buckets.split(",") if part]
        for rank in judges or [None]:
            if rank is not None:
                attention_clla.JUDGING_RANK, attention_clla.JUDGING_SHARE = rank, 10**6
            for bucket in lengths or [None]:
                for count in (int(part) for part in attend_top_k.split(",")):
                    told(count, bucket, rank, read(model, ids, tokens, count, bucket))
    if as_json:
        print(json.dumps({"checkpoint": Path(checkpoint).name, "context": context, "rows": found}))
        return
    titles = ("tokens read in full", "bucket", "judged by", "KL to the source", "KL to exact reading")
    rows = []
    for row in found:
        by = f"{row['rank'] or 'default'} components" if row["attend_top_k"] else ""
        how = str(row["attend_top_k"] or "all"), str(row["bucket"] or "default"), by
        rows.append((*how, f"{row['kl']:.5f}", f"{row['kl_to_exact']:.5f}"))
    console.show(Table.of(titles, rows, words=2))


def read(model: Any, ids: Tensor, tokens: int, attend_top_k: int, bucket: int | None) -> list[Tensor]:
    """Log-probabilities [tokens, V] of each text's last tokens, which come one at a time."""
    model.attend_top_k, model.rotation_bucket = attend_top_k, bucket
    found = []
    for row in ids:
        cache, logits = model.new_cache(), []
        starts = [*range(0, len(row) - tokens, model.prefill_chunk), *range(len(row) - tokens, len(row) + 1)]
        for start, stop in pairwise(starts):
            part = {"input_ids": row[None, start:stop], CACHE: cache, "use_cache": True, "logits_to_keep": 1}
            logits.append(model(**part).logits[0])
        found.append(torch.cat(logits[-tokens:]).float().log_softmax(-1))
    return found


def kl(reference: list[Tensor], other: list[Tensor]) -> float:
    return sum(float((a.exp() * (a - b)).sum(-1).mean()) for a, b in zip(reference, other, strict=True)) / len(other)


if __name__ == "__main__":
    typer.run(main)
