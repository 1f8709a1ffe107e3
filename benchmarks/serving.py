"""Throughput of a converted checkpoint and of its source in vLLM, with the same memory for both caches.

    python benchmarks/serving.py CHECKPOINT [--requests 64] [--prompt-tokens 1024] [--new-tokens 64] [--rounds 2]
        [--max-num-seqs 64] [--cache-gib 1] [--eager] [--json]

Run it with the Python that has vLLM. Both models are served by the same engine with the same settings, one after the
other in processes of their own: random prompts, all given at once, greedy tokens to the same length. What does not fit
the cache waits, as it does in a server. The first round warms up and is not counted. On a GPU leave --cache-gib out:
each engine then takes what its weights leave (--gpu-memory-utilization), and give it more requests than it can hold.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoTokenizer

from clla import console, register
from clla.bench.machine import machine_facts
from clla.checkpoint.load import load_checkpoint
from clla.tables import Table

WORKER = "CLLA_BENCHMARK_ENGINE"  # set in the processes that run an engine


def main(
    checkpoint: Annotated[str, typer.Argument(help="Converted checkpoint.")],
    requests: Annotated[int, typer.Option(min=1, help="Prompts a round.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each prompt.")] = 1024,
    new_tokens: Annotated[int, typer.Option(min=1, help="Of each answer.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that are counted.")] = 2,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests that vLLM computes at once.")] = 64,
    cache_gib: Annotated[float | None, typer.Option(help="Memory for the cache; default: as vLLM decides.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "bfloat16",
    eager: Annotated[bool, typer.Option("--eager", help="Without compiling, for a short try.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
) -> None:
    """Tokens per second of both, and how many tokens their caches hold."""
    register()
    loaded = load_checkpoint(checkpoint, device=torch.device("cpu"), dtype="auto")
    model: Any = loaded.model
    engine: dict[str, Any] = {
        "max_model_len": prompt_tokens + new_tokens,
        "max_num_seqs": max_num_seqs,
        "dtype": dtype,
        "enforce_eager": eager,
        "enable_prefix_caching": False,
    }
    if cache_gib is not None:
        engine["kv_cache_memory_bytes"] = int(cache_gib * 2**30)
    job = {"requests": requests, "prompt": prompt_tokens, "new": new_tokens, "rounds": rounds}
    job["vocabulary"] = model.config.get_text_config().vocab_size
    found = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        model.source.save_pretrained(source)
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(source)
        del loaded, model
        for name, path in (("source", str(source)), ("converted", checkpoint)):
            found.append({"model": name, **run({**job, "engine": {**engine, "model": path}}, Path(folder))})
    result = {
        "machine": machine_facts(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "settings": {**job, **engine},
        "rows": found,
    }
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        console.show(table(found))


def run(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One engine in a process of its own."""
    result = folder / "result.json"
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, WORKER: json.dumps({**job, "result": str(result)})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"the engine failed:\n{done.stdout[-4000:]}")
    capacity = re.search(r"KV cache size: ([\d,]+) tokens", done.stdout)
    assert capacity is not None, "the engine states what its cache holds"
    return {**json.loads(result.read_text()), "cache_tokens": int(capacity[1].replace(",", ""))}


def engine_main() -> None:
    """In the process of an engine."""
    from vllm import LLM, SamplingParams

    job = json.loads(os.environ[WORKER])
    llm = LLM(disable_log_stats=True, **job["engine"])
    sampling = SamplingParams(temperature=0, max_tokens=job["new"], ignore_eos=True)
    random = torch.Generator().manual_seed(0)
    seconds = []
    for number in range(job["rounds"] + 1):
        ids = torch.randint(0, job["vocabulary"], (job["requests"], job["prompt"]), generator=random).tolist()
        count = job["requests"] if number else min(4, job["requests"])
        start = time.perf_counter()
        answers = llm.generate([{"prompt_token_ids": p} for p in ids[:count]], sampling, use_tqdm=False)
        if number:
            seconds.append(time.perf_counter() - start)
        assert all(len(answer.outputs[0].token_ids) == job["new"] for answer in answers)
    new = job["requests"] * job["new"]
    Path(job["result"]).write_text(json.dumps({"seconds": seconds, "new_tokens_per_second": new / min(seconds)}))


def table(rows: list[dict[str, Any]]) -> Table:
    """Figures of both, and the ratio to the source."""
    base = rows[0]["new_tokens_per_second"]
    cells = [
        (row["model"], f"{row['cache_tokens']:,}", f"{speed:,.1f}", f"{speed / base:.2f}")
        for row in rows
        for speed in (row["new_tokens_per_second"],)
    ]
    titles = ("", "tokens the cache holds", "new tokens per second, prompts included", "ratio")
    return Table.of(titles, cells, title="vLLM, the same memory for both caches")


if __name__ == "__main__":
    if WORKER in os.environ:
        engine_main()
    else:
        typer.run(main)
