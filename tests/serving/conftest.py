"""Checkpoints of pico models, engines in processes of their own, and what transformers answers.

These tests need a virtual environment with vLLM (`make test-vllm`); the ordinary run leaves them out.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import clla
from clla.modeling.modeling_clla import CllaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import HALF_SLIDING, byte_tokenizer, pico_config, pico_of
from forks import Fork, imported_once
from helpers import converted_of, plan_of, stats_of, strict_of

clla.register()  # in an engine its plugin does so
imported_once("vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "clla.serving.model")
os.environ.pop("TRITON_INTERPRET")  # no engine has it

Checkpoint = tuple[Path, CllaForCausalLM]
NEW = 32  # greedy tokens that are compared
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "CLLA_ROTATION_BUCKET": "1",  # as prompts read, so that steps and prompts computed again are the same
}
WORKER = Path(__file__).with_name("engine_worker.py")


def prompt(length: int, seed: int, shared: int = 0) -> list[int]:
    """Random token ids; prompts with the same `shared` begin with the same so many."""
    first = torch.randint(0, 256, (shared,), generator=torch.Generator().manual_seed(1000))
    rest = torch.randint(0, 256, (length - shared,), generator=torch.Generator().manual_seed(seed))
    return torch.cat((first, rest)).tolist()


def of_group(
    kind: str, bits: int, rank: int | None = None, groups: tuple[tuple[int, ...], ...] = (), **extra: Any
) -> CllaForCausalLM:
    """A converted pico model: W = 16, 4 sinks, blocks of 4."""
    source = pico_of(pico_config(kind, head_dim=32, **extra))
    stats = stats_of(source)
    plan = plan_of(stats, source, bits=bits, rank=rank, groups=groups, window=16, sinks=4, flush_block=4)
    return converted_of(source, plan, stats, prefill_chunk=1000)


def of_input(window: int, sinks: int) -> CllaForCausalLM:
    """The same with latents from the input of a group's first layer."""
    source = pico_of(pico_config("llama", head_dim=32))
    stats = stats_of(source)
    plan = plan_of(stats, source, bits=4, rank=64, source="first", window=window, sinks=sinks, flush_block=4)
    return converted_of(source, plan, stats, prefill_chunk=1000)


def decoupled() -> CllaForCausalLM:
    """The same with decoupled keys: nothing exact, rotary keys of eight components of six bits."""
    source = pico_of(pico_config("qwen3", head_dim=32))
    stats = stats_of(source, with_queries=True)
    groups = stats.layers[:2], stats.layers[2:]
    return strict_of(source, stats, groups=groups, components=8, bits=4, rope_bits=6, rank=64)[0]


# Few components of four bits: what is read from latents changes the tokens. The least components of a full rank are
# rounding noise that the encoder makes large: tokens would differ by it.
FORMS: dict[str, Callable[[], CllaForCausalLM]] = {
    "group": lambda: of_group("qwen3", 4, rank=64),
    "beside sliding layers": lambda: of_group("gemma3_text", 4, rank=64, **HALF_SLIDING),
    "first, with a window": lambda: of_input(window=16, sinks=4),
    "first, sinks alone": lambda: of_input(window=0, sinks=4),
    "first, nothing exact": lambda: of_input(window=0, sinks=0),
    "decoupled": decoupled,
}


def saved(folder: Path, model: CllaForCausalLM) -> CllaForCausalLM:
    """The model, saved with a tokenizer."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The default form."""
    folder = tmp_path_factory.mktemp("coarse")
    return folder, saved(folder, FORMS["group"]())


@pytest.fixture(scope="session")
def fine(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Sixteen bits: tokens are those of the source, however prompts are cut."""
    folder = tmp_path_factory.mktemp("fine")
    return folder, saved(folder, of_group("llama", 16))


@pytest.fixture(scope="session")
def three_groups(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Six layers, so that the engine's own cut in halves goes through the middle group."""
    folder, groups = tmp_path_factory.mktemp("three-groups"), ((0, 1), (2, 3), (4, 5))
    return folder, saved(folder, of_group("qwen3", 4, rank=64, groups=groups, num_hidden_layers=6))


@torch.no_grad()
def greedy(model: CllaForCausalLM, ids: list[int], cuts: tuple[int, ...] = ()) -> list[int]:
    """Greedy tokens of transformers, the prompt cut at the given places."""
    cache, bounds, logits = model.new_cache(), [0, *cuts, len(ids)], torch.empty(0)
    for start, stop in itertools.pairwise(bounds):
        logits = model(torch.tensor([ids[start:stop]]), past_key_values=cache, logits_to_keep=1).logits
    found: list[int] = []
    while True:
        found.append(int(logits[0, -1].argmax()))
        if len(found) == NEW:
            return found
        logits = model(torch.tensor([found[-1:]]), past_key_values=cache).logits


@torch.no_grad()
def greedy_of_source(model: CllaForCausalLM, ids: list[int]) -> list[int]:
    """Greedy tokens of the model on its own cache."""
    found: Tensor = model.source.generate(
        torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=258
    )
    return found[0, len(ids) :].tolist()


def environment(**more: str) -> dict[str, str]:
    """For engine processes: little memory, one thread, the plugin as installed."""
    return {**os.environ, **SETTINGS, **more}


Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run_engine(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run an engine on rounds of prompts (see `engine_worker.py`); `log` has what it printed."""

    def run(
        engine: dict[str, Any],
        rounds: list[list[list[int]]],
        *,
        own_process: bool,
        variables: dict[str, str] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("engine")
        job = {"engine": engine, "rounds": rounds, "tokens": NEW, **more}
        (folder / "job.json").write_text(json.dumps(job))
        settings = {**SETTINGS, "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(own_process)), **(variables or {})}
        done = Fork(WORKER, folder / "job.json", folder / "result.json", **settings)
        assert done.wait() == 0, done.output[-6000:]
        return {**json.loads((folder / "result.json").read_text()), "log": done.output}

    return run
