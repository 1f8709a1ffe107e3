"""What cannot be served is refused with its reason, before any weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from clla.errors import CllaError, UnsupportedModelError
from clla.modeling.hooks_clla import rope_of
from clla.serving import EngineConfig, register
from clla.serving.model import readers
from clla.serving.startup_check import check_one_layer
from clla.serving.validation import check_engine, check_model

from .conftest import FORMS, Checkpoint


def engine(**changed: Any) -> Any:
    """Settings of an engine that can serve, some of them changed."""
    found = {
        "cache_config": SimpleNamespace(cache_dtype="auto"),
        "parallel_config": SimpleNamespace(decode_context_parallel_size=1, pipeline_parallel_size=1),
        "scheduler_config": SimpleNamespace(disable_hybrid_kv_cache_manager=False, long_prefill_token_threshold=0),
        "speculative_config": None,
        "kv_transfer_config": None,
        "lora_config": None,
    }
    return SimpleNamespace(**{**found, **changed})


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0", "0.320"])
def test_other_versions_of_vllm(version: str) -> None:
    with pytest.raises(CllaError, match="were not tested"):
        check_engine(version, engine())


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu"])
def test_supported_versions(version: str) -> None:
    check_engine(version, engine())


@pytest.mark.parametrize(
    ("option", "changed"),
    [
        ("--kv-cache-dtype", {"cache_config": SimpleNamespace(cache_dtype="fp8")}),
        ("--speculative-config", {"speculative_config": object()}),
        ("--enable-lora", {"lora_config": object()}),
        ("--decode-context-parallel-size", {"parallel_config": SimpleNamespace(decode_context_parallel_size=2)}),
    ],
)
def test_options_that_do_not_fit(option: str, changed: dict[str, Any]) -> None:
    with pytest.raises(CllaError, match=option):
        check_engine("0.32.0", engine(**changed))


def test_sliding_layers_beside_layers_that_keep_nothing_exact(coarse: Checkpoint) -> None:
    config = AutoConfig.from_pretrained(coarse[0])
    check_model(config)
    config.clla.update(kept_layers=[1], window=0, sinks=0)
    with pytest.raises(UnsupportedModelError, match="window of their own"):
        check_model(config)


def test_a_codec_without_its_model(coarse: Checkpoint) -> None:
    config = AutoConfig.from_pretrained(coarse[0])
    config.base_model = {"path": "somewhere"}
    with pytest.raises(UnsupportedModelError, match="codec-only"):
        check_model(config)


def test_the_plugin_registers_twice(coarse: Checkpoint) -> None:
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    register()
    register()
    assert "CllaForCausalLM" in ModelRegistry.get_supported_archs()
    assert MODELS_CONFIG_MAP["CllaForCausalLM"] is EngineConfig
    config = engine(model_config=SimpleNamespace(hf_config=AutoConfig.from_pretrained(coarse[0]), max_model_len=512))
    EngineConfig.verify_and_update_config(config)
    assert config.scheduler_config.long_prefill_token_threshold == 512  # prompts are cut at 1000, or at the end


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors have it, as while the engine makes a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_rotation_is_noticed(form: str, dtype: torch.dtype) -> None:
    model = FORMS[form]().to(dtype)
    spec = model.config.spec
    rope = rope_of(model.source, spec.rope)
    assert rope is not None

    def rotary(positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, step: int = 1) -> Any:
        keys = key.unflatten(1, (2, -1)).transpose(0, 1)[None]
        return query, rope((positions * step)[None]).rotate(keys)[0].transpose(0, 1).flatten(1)

    heads = model.config.text_config.num_attention_heads
    (group, *_) = readers(spec, model.codec, rope, [0, 1], heads)
    with default_dtype(dtype):
        check_one_layer(group, spec.groups[0], spec, rotary, 16)
        with pytest.raises(CllaError, match="differs from the reference"):
            check_one_layer(group, spec.groups[0], spec, lambda p, q, k: rotary(p, q, k, step=2), 16)
