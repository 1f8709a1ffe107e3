"""Converted models on several devices, and partly offloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, infer_auto_device_map
from conftest import byte_tokenizer
from conversions import full_rank, lossy
from helpers import tokens

from clla.bench.shapes import random_plan, shape_config
from clla.checkpoint.assemble import clla_block
from clla.checkpoint.write import write_checkpoint
from clla.modeling.configuration_clla import CllaConfig
from clla.modeling.modeling_clla import CllaForCausalLM
from clla.modeling.placement_clla import beside_layers, device_map_of

OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 258}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("placed") / "model"
    lossy(sinks=2).save_pretrained(folder)
    return folder


def _dispatched(load: Callable[..., Any], folder: str) -> Any:
    model = load()
    split = infer_auto_device_map(model, max_memory={"cpu": "200KB"}, no_split_module_classes=model._no_split_modules)
    return dispatch_model(model, split, main_device="cpu", offload_dir=folder)


PLACEMENTS: dict[str, Callable[[Any, str], Any]] = {
    "auto, small": lambda load, _: load(device_map="auto", max_memory={"cpu": "200KB"}),
    "by hand": lambda load, _: load(device_map={"source.model": "cpu", "source.lm_head": "disk", "codec": "disk"}),
    "cpu_offload": lambda load, _: cpu_offload(load(), execution_device="cpu"),
    "disk_offload": lambda load, folder: disk_offload(load(), folder, execution_device="cpu"),
    "dispatch_model": _dispatched,
}  # fmt: skip


@pytest.mark.parametrize("name", PLACEMENTS)
def test_offloaded_models_give_the_same_tokens(name: str, saved: Path, tmp_path: Path) -> None:
    def load(**options: Any) -> CllaForCausalLM:
        return CllaForCausalLM.from_pretrained(saved, offload_folder=str(tmp_path / "a"), **options)

    placed = PLACEMENTS[name](load, str(tmp_path / "b"))
    assert any(p.is_meta for p in placed.parameters()), "nothing is offloaded"
    ids = tokens(1, 30)
    assert torch.equal(placed.generate(ids, **OPTIONS), load().generate(ids, **OPTIONS))


@pytest.mark.parametrize("part", ["source.model.embed_tokens", "codec.groups.0"])
def test_any_part_can_be_offloaded(part: str, saved: Path) -> None:
    model, ids = CllaForCausalLM.from_pretrained(saved), tokens(1, 30)
    expected = model.generate(ids, **OPTIONS)
    cpu_offload(model.get_submodule(part), execution_device=torch.device("cpu"))
    assert torch.equal(model.generate(ids, **OPTIONS), expected)


def test_the_device_map_knows_dtypes_by_name(saved: Path) -> None:
    for options in ({"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}, {"dtype": "auto"}):
        model = CllaForCausalLM.from_pretrained(saved, device_map="auto", **options)
        assert model.dtype == (torch.float32 if options == {"dtype": "auto"} else torch.bfloat16)


SOURCE_PARTS = {f"source.model.layers.{i}": ("cpu", "disk")[i % 2] for i in range(4)} | {
    "source.model.embed_tokens": "disk", "source.model.norm": "cpu", "source.model.rotary_emb": "cpu",
    "source.lm_head": "disk", "codec": "disk"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"device_map": "auto", "max_memory": {"cpu": "200KB"}}, {"device_map": {"source": "cpu", "codec": "cpu"}},
     {"device_map": {"": "disk"}}, {"device_map": {"model": "cpu", "lm_head": "disk"}}, {"device_map": SOURCE_PARTS}],
    ids=["auto", "whole", "everything", "the source's names", "parts"],
)  # fmt: skip
def test_codecs_alone_are_placed_likewise(options: dict[str, Any], tmp_path: Path) -> None:
    converted = lossy(sinks=2)
    converted.source.save_pretrained(tmp_path / "source")
    (tmp_path / "codec").mkdir()
    write_checkpoint(tmp_path / "codec", converted, byte_tokenizer(), base_model={"path": str(tmp_path / "source")})
    placed = CllaForCausalLM.from_pretrained(tmp_path / "codec", offload_folder=str(tmp_path / "off"), **options)
    assert not any(p.is_meta for p in placed.codec.parameters())
    ids = tokens(1, 30)
    expected = converted.generate(ids, **OPTIONS)
    assert torch.equal(placed.generate(ids, **OPTIONS), expected)
    placed.save_pretrained(tmp_path / "whole")
    assert torch.equal(CllaForCausalLM.from_pretrained(tmp_path / "whole").generate(ids, **OPTIONS), expected)


def test_codecs_of_offloaded_layers_lie_where_these_are_computed() -> None:
    layers = {f"model.layers.{i}": home for i, home in enumerate(("cpu", 0, "disk", 1))}
    found = beside_layers(lossy(), {"model.embed_tokens": "cpu", **layers, "model.norm": 1, "lm_head": 1})
    assert found["source.model.layers.3"] == 1 and found["source.lm_head"] == 1
    assert [found[f"codec.groups.{i}"] for i in range(2)] == [0, 1]


def on_meta() -> CllaForCausalLM:
    """A conversion in the shape of Llama-3-8B, without memory."""
    config = shape_config("llama-3-8b")
    plan = random_plan(config, kv_budget="6.25%", max_layers_per_group=6)
    rope = {"form": "halves", "plain_layers": []}
    block = clla_block(plan, rope=rope, kv_dtype=torch.bfloat16, prefill_chunk=512)
    with torch.device("meta"):
        return CllaForCausalLM(CllaConfig(text_config=config, clla=block, dtype=torch.bfloat16)).to(torch.bfloat16)


def homes(device_map: dict[str, Any], names: list[str]) -> list[Any]:
    """Devices of modules, by the longest name in the map that each begins with."""
    return [
        device_map[max((key for key in device_map if name.startswith(key + ".") or name == key), key=len)]
        for name in names
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "memory",
    [
        {0: "12GiB", 1: "22GiB"},
        {0: "9GiB", 1: "9GiB"},
        {0: "8GiB", "cpu": "60GiB"},
        {0: "5GiB", 1: "5GiB", "cpu": "9GiB"},
    ],
    ids=["two", "two, full", "one and the CPU", "everything"],
)
@pytest.mark.parametrize("strategy", ["auto", "sequential"])
def test_codecs_lie_beside_their_first_layers(strategy: str, memory: dict[Any, str]) -> None:
    model = on_meta()
    groups = model.config.clla["groups"]
    sizes = {name: p.nbytes for name, p in model.named_parameters()}
    found = device_map_of(on_meta(), strategy, memory, torch.bfloat16)
    layers = homes(found, [f"source.model.layers.{spec['layers'][0]}" for spec in groups])
    codecs = homes(found, [f"codec.groups.{i}" for i in range(len(groups))])
    assert codecs == [0 if layer in ("cpu", "disk") else layer for layer in layers]
    assert len(set(layers)) > 1, "all lie on one device: nothing is shown"
    names = list(sizes)
    used = sum(size for (name, size), home in zip(sizes.items(), homes(found, names), strict=True) if home == 0)
    assert used <= float(memory[0].removesuffix("GiB")) * 2**30


def test_a_device_map_of_ones_own_is_kept(saved: Path, tmp_path: Path) -> None:
    own = {"source": "cpu", "codec": "disk"}
    assert CllaForCausalLM.from_pretrained(saved, device_map=own, offload_folder=tmp_path).hf_device_map == own


def test_models_of_two_conversions_in_one_source() -> None:
    """Both have hooks on the decoder; each call goes through those of its own cache."""
    first, second, ids = full_rank(), lossy(), tokens(1, 60)
    with torch.no_grad():
        expected = second(ids).logits
        first.watch_source()
        torch.testing.assert_close(second(ids).logits, expected)
