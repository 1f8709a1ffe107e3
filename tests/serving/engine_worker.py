"""Run a vLLM engine in a process of its own: python engine_worker.py JOB.json RESULT.json.

A job has the engine's keywords and rounds of prompts; prompts of one round are given at once. The result has their
greedy tokens, how many tokens came from the prefix cache, and what pages the engine made.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def allocated_pages(worker: Any) -> dict[str, Any]:
    """What a worker has: bytes of its blocks, its layers, and elements of the codec."""
    own = worker.worker.model_runner
    return {
        "bytes": own.kv_cache_config.kv_cache_tensors[0].size,
        "layers": [list(group.layer_names) for group in own.kv_cache_config.kv_cache_groups],
        "codec": sum(p.numel() for p in own.model.codec.parameters()),
    }


def pages(llm: Any) -> dict[str, Any]:
    """Block counts and sizes of the engine's groups of layers; only where it runs in this process."""
    core = llm.llm_engine.engine_core.engine_core
    found = core.scheduler.kv_cache_config
    allocated = core.model_executor.collective_rpc(allocated_pages)
    return {
        "ranks": allocated,
        "blocks": found.num_blocks,
        "bytes": found.kv_cache_tensors[0].size,
        "groups": [
            {
                "kind": type(group.kv_cache_spec).__name__,
                "block": group.kv_cache_spec.block_size,
                "page": group.kv_cache_spec.page_size_bytes,
                "layers": len(group.layer_names),
            }
            for group in found.kv_cache_groups
        ],
    }


def main() -> None:
    job, result = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    from vllm import LLM, SamplingParams

    llm = LLM(**{"dtype": "float32", "enforce_eager": True, **job["engine"]})
    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True)
    rounds = [
        [
            {"tokens": list(answer.outputs[0].token_ids), "cached": answer.num_cached_tokens}
            for answer in llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        ]
        for prompts in job["rounds"]
    ]
    found: dict[str, Any] = {"rounds": rounds}
    if job.get("pages"):
        found["pages"] = pages(llm)
    if job.get("metrics"):
        found["metrics"] = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
