"""Pipeline ranks."""

from __future__ import annotations

import pytest

from .conftest import Checkpoint, Run, greedy, prompt


def test_two_pipeline_ranks(three_groups: Checkpoint, run_engine: Run) -> None:
    prompts = [prompt(length, seed) for seed, length in enumerate((40, 133, 300, 21))]
    engine = {
        "model": str(three_groups[0]),
        "max_model_len": 512,
        "pipeline_parallel_size": 2,
        "enable_prefix_caching": False,
        "enforce_eager": False,
        "compilation_config": {"backend": "eager"},
    }
    found = run_engine(engine, [prompts], own_process=False, pages=True, variables={"VLLM_PP_LAYER_PARTITION": "4,2"})
    import json, re
    print(json.dumps(found["pages"]), [l for l in found["log"].splitlines() if "KV cache" in l or "cache group" in l])
    assert [answer["tokens"] for answer in found["rounds"][0]] == [greedy(three_groups[1], ids) for ids in prompts]
