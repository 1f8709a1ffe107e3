"""Codecs and converted pico models made without calibration text."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from forks import Fork
from torch import Tensor, nn
from transformers import PreTrainedModel
from typer.testing import CliRunner, Result

from clla.artifacts.codec import Codec
from clla.artifacts.plan import LayerGroup, Plan
from clla.artifacts.stats import Stats
from clla.calibrate.collect import Collection, Collector, collect
from clla.calibrate.rope_detection import rope_settings
from clla.checkpoint.assemble import attach, clla_block
from clla.cli import app
from clla.convert.factor import make_codec
from clla.modeling.modeling_clla import CllaForCausalLM
from clla.plan.decoupled import DecoupledSpectra, uncentred
from clla.plan.metrics import weigh
from clla.recipe import Recipe
from clla.source.families import kv_shape, split_layers


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    """Random token ids [batch, length]."""
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def mostly_slow(names: Iterable[Any], *fast: Any) -> list[Any]:
    """Parameters of a matrix of tests, of which `make test` runs only those of these few names."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


def stats_of(
    model: PreTrainedModel, *, band: int = 4, with_inputs: bool = True, with_queries: bool = False, batches: int = 8
) -> Stats:
    """Moments from random tokens, enough for full-rank covariances."""
    layers, _ = split_layers(model.config)
    rope = rope_settings(model, layers)
    wanted = Collection(layers, kv_shape(model.config), band, rope, with_inputs=with_inputs, with_queries=with_queries)
    return collect(Collector(model, wanted), [tokens(4, 64, seed) for seed in range(batches)], made_from="test")


def plan_of(
    stats: Stats,
    model: PreTrainedModel,
    *,
    bits: int | tuple[int, ...] = 16,
    groups: tuple[tuple[int, ...], ...] = (),
    source: str = "group",
    window: int = 16,
    sinks: int = 4,
    flush_block: int = 4,
    tier_size: int = 16,
    rank: int | None = None,
) -> Plan:
    """A plan with the same bits in every tier, full rank unless told otherwise."""
    _, kept = split_layers(model.config)
    if not groups:
        groups = (stats.layers[:3], stats.layers[3:]) if len(stats.layers) > 3 else (stats.layers,)
    built = []
    for layers in groups:
        full = model.config.hidden_size if source == "first" else len(layers) * stats.kv.values
        tiers = min(rank or full, full) // tier_size
        built.append(LayerGroup(tuple(layers), bits if isinstance(bits, tuple) else (bits,) * tiers, 1.0))
    return Plan(
        groups=tuple(built),
        kv=stats.kv,
        kv_itemsize=4,
        tier_size=tier_size,
        window=window,
        sinks=sinks,
        flush_block=flush_block,
        source=source,
        budget_bytes=0.0,
        at_context=None,
        made_from="test",
        kept_layers=kept,
    )


def converted_of(model: PreTrainedModel, plan: Plan, stats: Stats, *, prefill_chunk: int = 24) -> CllaForCausalLM:
    """The pico model running on the plan's cache."""
    recipe = Recipe().override({"plan": {"latent_input": "all_layers" if plan.source == "group" else "first_layer"}})
    codec: Codec = make_codec(weigh(stats, recipe), plan, stats)
    block = clla_block(
        plan,
        rope=rope_settings(model, stats.layers),
        kv_dtype=torch.float32,
        prefill_chunk=prefill_chunk,
    )
    return attach(model, codec, block)


def strict_of(
    model: PreTrainedModel,
    stats: Stats,
    *,
    groups: tuple[tuple[int, ...], ...] = (),
    components: int | None = None,
    bits: int = 16,
    rope_bits: int = 16,
    rank: int | None = None,
    layout: bool = False,
) -> tuple[CllaForCausalLM, Plan]:
    """The pico model with decoupled keys: all components, full rank and 16 bits unless told otherwise.

    `layout` keeps to what DeepseekV3 can express.
    """
    assert stats.frequencies is not None
    groups = groups or tuple((layer,) for layer in stats.layers)
    every = 2 * stats.kv.num_key_value_heads * stats.frequencies.shape[1]
    spectra = DecoupledSpectra(
        uncentred(stats) if layout else stats,
        source="first",
        components=components or every,
        context=64,
        once=layout,
    )
    plan = plan_of(stats, model, bits=bits, groups=groups, source="first", window=0, sinks=0, rank=rank)
    built = tuple(
        replace(group, rope_pairs=spectra.split(stats.layers.index(group.layers[0]), len(group.layers)).pairs)
        for group in plan.groups
    )
    plan = replace(plan, groups=built, rope_bits=rope_bits)
    codec = make_codec(spectra, plan, spectra.stats)
    block = clla_block(plan, rope=rope_settings(model, stats.layers), kv_dtype=torch.float32, prefill_chunk=24)
    return attach(model, codec, block), plan


def kept_bytes(owner: object) -> int:
    """Bytes of every tensor storage reachable from an object of ours, each counted once; modules hold weights."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    waiting = [owner]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, list | tuple | set):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
        elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module):
            waiting += vars(value).values()
    return sum(storages.values())


def clla(*arguments: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


def two_processes(*arguments: object, **variables: str) -> list[Fork]:
    """Python started twice with these arguments, each process told of the other as launchers do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": "1", **variables}
    return [Fork(*arguments, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]


def finish(processes: list[Fork]) -> None:
    """Wait for processes that ought to succeed."""
    codes = [process.wait() for process in processes]
    assert codes == [0] * len(codes), "\n".join(process.output[-3000:] for process in processes)
