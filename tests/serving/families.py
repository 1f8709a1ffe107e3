"""Which families vLLM serves: a tiny model of each, greedy tokens beside those of transformers.

    OMP_NUM_THREADS=1 .venv-vllm/bin/python -m tests.serving.families [FAMILY …] > docs/serving-models.md

Run by hand, since it starts an engine for each. Where tokens differ, the source itself is tried in the same way.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .conftest import NEW, WORKER, environment, greedy, greedy_of_source, prompt, saved  # isort: split

from conftest import FAMILY_CONFIGS, OTHER_CONFIGS, byte_tokenizer, pico_config, pico_of
from helpers import converted_of, plan_of, stats_of

PROMPTS = [prompt(length, seed) for seed, length in enumerate((40, 133, 77))]
HEAD = f"""# Models in vLLM

Written by `tests/serving/families.py`: a tiny random model of every family, in fp32, converted to 64 components of four
bits per layer group with a window of 16, in vLLM 0.32 on a CPU. {len(PROMPTS)} prompts at once, {NEW} greedy tokens
each, are compared with those of the same checkpoint in transformers. Where they differ, it is rounding, or the source
itself is another model in vLLM: its own tokens, in vLLM and in transformers, are compared as well.

| model | in vLLM |
|---|---|"""


def main() -> None:
    families = {**FAMILY_CONFIGS, **OTHER_CONFIGS}
    print(HEAD)
    for name in sys.argv[1:] or sorted(families):
        kind, extra = families[name]
        # Heads of 32 channels: vLLM has no kernels for smaller ones.
        wide = {"head_dim": 32} if "head_dim" in extra else {"hidden_size": 128}
        try:
            source = pico_of(pico_config(kind, **{**extra, **wide}))
            source(torch.tensor(PROMPTS[:1]))
        except Exception as error:  # a family whose sizes hang together otherwise
            print(f"| {name} | not tried: {type(error).__name__} |", flush=True)
            continue
        print(f"| {name} | {verdict(source)} |", flush=True)


def verdict(source: PreTrainedModel) -> str:
    """How a model fares."""
    stats = stats_of(source)
    plan = plan_of(stats, source, bits=4, rank=64, window=16, sinks=4, flush_block=4)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "source"
        source.save_pretrained(plain)
        byte_tokenizer().save_pretrained(plain)
        model = converted_of(source, plan, stats, prefill_chunk=1000)
        saved(Path(folder) / "converted", model)
        found = served(Path(folder) / "converted")
        if isinstance(found, str):
            return found
        count = equal(found, [greedy(model, ids) for ids in PROMPTS])
        total = NEW * len(PROMPTS)
        if count == total:
            return "the same tokens"
        own = served(plain)
        if isinstance(own, str):
            return f"{count} of {total} tokens"
        same = equal(own, [greedy_of_source(model, ids) for ids in PROMPTS])
        return f"{count} of {total} tokens; the source {same} of {total}"


def equal(found: list[list[int]], want: list[list[int]]) -> int:
    """Tokens that are the same."""
    return sum(a == b for f, w in zip(found, want, strict=True) for a, b in zip(f, w, strict=True))


def served(folder: Path) -> list[list[int]] | str:
    """Greedy tokens of an engine, or why there are none."""
    job: dict[str, Any] = {"engine": {"model": str(folder), "max_model_len": 256}, "rounds": [PROMPTS], "tokens": NEW}
    (folder / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, WORKER, folder / "job.json", folder / "result.json"],
        env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if not done.returncode:
        return [answer["tokens"] for answer in json.loads((folder / "result.json").read_text())["rounds"][0]]
    reason = re.findall(r"on a compressed cache: ([^.]*)\.", done.stdout)
    if reason:
        return f"refused: {reason[-1]}"
    errors = re.findall(r"^(?:\[rank0\]: )?(\w+(?:\.\w+)*Error: .*)$", done.stdout, re.MULTILINE)
    return f"vLLM ends with `{errors[-1][:120]}`" if errors else "vLLM ends without an error"


if __name__ == "__main__":
    main()
