"""Pipeline ranks have whole layer groups; other cuts are refused with a partition that works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm import EngineArgs

from clla.errors import CllaError, UnsupportedModelError, UsageError
from clla.modeling.quantize_clla import layout_of
from clla.serving.pipeline_parallel import VARIABLE, check_stages

from .conftest import FORMS, Checkpoint, Run, greedy, prompt, saved

COMPILED = {"enforce_eager": False, "compilation_config": {"backend": "eager"}}  # on a CPU vLLM needs some compilation


def engine_config(folder: Any, **options: Any) -> Any:
    """What `vllm serve` makes of its options before it starts any process."""
    return EngineArgs(model=str(folder), max_model_len=512, dtype="float32", **options).create_engine_config()


@pytest.fixture
def two_ranks(three_groups: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Settings of an engine with two ranks that work."""
    monkeypatch.setenv(VARIABLE, "4,2")
    return engine_config(three_groups[0], pipeline_parallel_size=2)


def test_the_refusal_names_a_partition_that_works(three_groups: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"3,3 layers split a layer group \(layers 2 to 3\)") as caught:
        engine_config(three_groups[0], pipeline_parallel_size=2)
    name, _, value = caught.value.remedy.removeprefix("set ").partition("=")
    monkeypatch.setenv(name, value)
    engine_config(three_groups[0], pipeline_parallel_size=2)


def test_an_even_cut_between_groups_needs_no_partition(three_groups: Checkpoint) -> None:
    assert engine_config(three_groups[0], pipeline_parallel_size=3).parallel_config.world_size == 3


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("1,5", "1,5 layers split a layer group"),
        ("6,0", "6,0 leaves a rank without layers"),
        ("2,2,2", "does not match pp_size=2"),
        ("3,2", "does not match num_hidden_layers=6"),
        ("half", "Invalid partition"),
    ],
)
def test_other_partitions(two_ranks: Any, monkeypatch: pytest.MonkeyPatch, given: str, reason: str) -> None:
    check_stages(two_ranks)
    monkeypatch.setenv(VARIABLE, given)
    with pytest.raises(UsageError, match=reason) as caught:
        check_stages(two_ranks)
    assert caught.value.remedy == f"set {VARIABLE}=4,2"


def test_more_ranks_than_groups(three_groups: Checkpoint) -> None:
    with pytest.raises(UsageError, match="4 does not fit the checkpoint's 3 layer groups"):
        engine_config(three_groups[0], pipeline_parallel_size=4)


def test_a_source_without_pipeline_support(two_ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = two_ranks.model_config.hf_config.text_config
    monkeypatch.setattr(text, "architectures", ["IQuestLoopCoderForCausalLM"])
    with pytest.raises(UnsupportedModelError, match="not supported for IQuestLoopCoderForCausalLM"):
        check_stages(two_ranks)


def test_eager_mode_on_a_cpu(two_ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_ranks.model_config, "enforce_eager", True)
    with pytest.raises(CllaError, match="without compilation"):
        check_stages(two_ranks)


def test_two_ranks(three_groups: Checkpoint, run_engine: Run) -> None:
    folder, model = three_groups
    prompts = [prompt(length, seed) for seed, length in enumerate((40, 300, 21))]
    first, second = prompt(270, 5, shared=256), prompt(290, 6, shared=256)
    found = run_engine(
        {"model": str(folder), "max_model_len": 512, "pipeline_parallel_size": 2, **COMPILED},
        [prompts, [first], [second]],
        own_process=False,
        variables={VARIABLE: "4,2"},
        pages=True,
    )
    assert [answer["tokens"] for answer in found["rounds"][0]] == [greedy(model, ids) for ids in prompts]
    (one,), (other,) = found["rounds"][1:]
    assert one["cached"] == 0 and other["cached"] > 0
    assert one["tokens"] == greedy(model, first) and other["tokens"] == greedy(model, second, cuts=(other["cached"],))

    spec, pages, ranks = model.config.spec, found["pages"], found["pages"]["ranks"]
    rows = [layout_of(group).row_bytes for group in spec.groups]
    latents = pages["groups"][-1]
    assert latents["page"] == latents["block"] * (rows[0] + rows[1])  # both ranks have pages of the larger one
    assert [rank["bytes"] for rank in ranks] == [pages["blocks"] * latents["page"]] * 2
    names = [[name for window in rank["layers"][:-1] for name in window] for rank in ranks]
    assert [sorted(int(name.split(".")[3]) for name in own) for own in names] == [[0, 1, 2, 3], [4, 5]]
    assert [rank["layers"][-1] for rank in ranks] == [["latents.0"], ["latents.1"]]
    sizes = [sum(p.numel() for p in group.parameters()) for group in model.codec.groups]
    assert [rank["codec"] for rank in ranks] == [sizes[0] + sizes[1], sizes[2]]


def test_two_ranks_of_decoupled_keys(tmp_path: Path, run_engine: Run) -> None:
    """Without pages of exact tokens, and with latents that are written before a layer attends."""
    model = saved(tmp_path, FORMS["decoupled"]())
    prompts = [prompt(length, seed) for seed, length in enumerate((40, 133, 300))]
    engine = {"model": str(tmp_path), "max_model_len": 512, "pipeline_parallel_size": 2, **COMPILED}
    found = run_engine(engine, [prompts], own_process=False, variables={VARIABLE: "2,2"})
    assert [answer["tokens"] for answer in found["rounds"][0]] == [greedy(model, ids) for ids in prompts]
