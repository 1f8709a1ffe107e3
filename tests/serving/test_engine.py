"""The engine answers what transformers answers, token by token, and its pages have the bytes of the plan."""

from __future__ import annotations

import re
from typing import Any

import pytest

from clla.modeling.modeling_clla import CllaForCausalLM
from clla.modeling.quantize_clla import RowLayout

from .conftest import NEW, Checkpoint, Run, greedy, greedy_of_source, prompt

LENGTHS = (40, 133, 77, 260, 21, 300)
SHARED = 128


def row_bytes(model: CllaForCausalLM) -> int:
    """Latents of a token in the plan."""
    return sum(RowLayout(g.tier_bits, g.tier_size).row_bytes for g in model.config.spec.groups)


@pytest.fixture(scope="module")
def answers(coarse: Checkpoint, run_engine: Run) -> dict[str, Any]:
    """Of one engine: prompts of many lengths at once, then some that share their beginning, one after the other."""
    first = [prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    sharing = [[prompt(length, seed, shared=SHARED)] for seed, length in ((1, 150), (2, 230), (3, 170))]
    found = run_engine(
        {"model": str(coarse[0]), "max_model_len": 512}, [first, *sharing], own_process=False, pages=True
    )
    return {**found, "prompts": [first, *sharing]}


def test_prompts_of_different_lengths_at_once(coarse: Checkpoint, answers: dict[str, Any]) -> None:
    prompts, found = answers["prompts"][0], [answer["tokens"] for answer in answers["rounds"][0]]
    assert found == [greedy(coarse[1], ids) for ids in prompts]
    assert found != [greedy_of_source(coarse[1], ids) for ids in prompts]  # else latents were not read


def test_shared_prefixes_come_from_the_cache(coarse: Checkpoint, answers: dict[str, Any]) -> None:
    first, *later = [answer for (answer,) in answers["rounds"][1:]]
    assert first["cached"] == 0
    for ids, answer in zip([p for (p,) in answers["prompts"][1:]], [first, *later], strict=True):
        hit = answer["cached"]
        assert answer["tokens"] == greedy(coarse[1], ids, cuts=(hit,) if hit else ())
    assert all(0 < answer["cached"] <= SHARED for answer in later)


def test_a_token_has_the_bytes_of_the_plan(coarse: Checkpoint, answers: dict[str, Any]) -> None:
    pages, model = answers["pages"], coarse[1]
    *windows, latents = pages["groups"]
    assert latents["kind"] == "FullAttentionSpec" and latents["layers"] == 1
    assert latents["page"] / latents["block"] == row_bytes(model)
    assert pages["bytes"] == pages["blocks"] * latents["page"]  # no block is padded beyond the latents' own
    kv = model.config.clla["kv"]
    exact = 2 * kv["num_key_value_heads"] * kv["head_dim"] * 4  # fp32
    assert sum(group["layers"] for group in windows) == model.config.text_config.num_hidden_layers
    for group in windows:
        assert group["kind"] == "SinkWindowSpec" and group["page"] == group["block"] * exact
        assert group["page"] * group["layers"] <= latents["page"]


def test_the_engine_states_what_it_holds(answers: dict[str, Any]) -> None:
    stated = re.search(r"KV cache size: ([\d,]+) tokens", answers["log"])
    assert stated is not None
    *windows, latents = answers["pages"]["groups"]
    held = -(-(16 + 4) // windows[0]["block"]) + 1 + 1  # the window, one block begun, the sinks' block
    blocks = -(-512 // latents["block"]) + len(windows) * held
    assert int(stated[1].replace(",", "")) == int(answers["pages"]["blocks"] / blocks * 512)


def test_chunked_prefill(coarse: Checkpoint, run_engine: Run) -> None:
    ids = prompt(300, 7)
    found = run_engine(
        {
            "model": str(coarse[0]),
            "max_model_len": 512,
            "max_num_batched_tokens": 32,
            "max_num_seqs": 4,
            "enable_prefix_caching": False,
        },
        [[ids]],
        own_process=False,
    )
    assert found["rounds"][0][0]["tokens"] == greedy(coarse[1], ids, cuts=tuple(range(32, 300, 32)))


def test_preempted_requests_and_an_engine_of_its_own(fine: Checkpoint, run_engine: Run) -> None:
    """Too few blocks for all: requests are put off and taken up again, with what is left of them in the cache."""
    prompts = [prompt(length, seed, shared=64) for seed, length in enumerate((260, 200, 230, 300, 120, 280))]
    found = run_engine(
        {
            "model": str(fine[0]),
            "max_model_len": 400,
            "max_num_batched_tokens": 64,
            "max_num_seqs": 6,
            "num_gpu_blocks_override": 48,
            "scheduler_reserve_full_isl": False,
            "disable_log_stats": False,
        },
        [prompts, prompts[:2]],
        own_process=True,
        metrics=True,
    )
    assert found["metrics"]["vllm:num_preemptions"] > 0
    want = [greedy(fine[1], ids) for ids in prompts]
    assert [answer["tokens"] for answer in found["rounds"][0]] == want
    assert [answer["tokens"] for answer in found["rounds"][1]] == want[:2]
    assert all(len(answer["tokens"]) == NEW for answer in found["rounds"][0])


def test_two_ranks(coarse: Checkpoint, run_engine: Run) -> None:
    prompts = [prompt(length, seed) for seed, length in enumerate((40, 133, 300))]
    engine = {"model": str(coarse[0]), "max_model_len": 512, "tensor_parallel_size": 2, "enable_prefix_caching": False}
    found = run_engine(engine, [prompts], own_process=True)
    assert [answer["tokens"] for answer in found["rounds"][0]] == [greedy(coarse[1], ids) for ids in prompts]
