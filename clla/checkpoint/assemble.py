"""Put the source model, the plan and the codec together, in memory or as a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from clla.artifacts.codec import Codec
from clla.artifacts.plan import Plan
from clla.modeling.configuration_clla import CLLA_SCHEMA_VERSION, CllaConfig
from clla.modeling.modeling_clla import CllaForCausalLM, for_compressed_cache
from clla.native.reading import read_by_native_code


def clla_block(plan: Plan, *, rope: dict[str, Any] | None, kv_dtype: torch.dtype, prefill_chunk: int) -> dict[str, Any]:
    """The config's `clla` block: all that the shipped code needs to run the plan.

    Args:
        plan: layer groups, tiers, window.
        rope: from `clla.calibrate.rope_detection.rope_settings`.
        kv_dtype: in which sinks and window are stored.
        prefill_chunk: tokens per forward pass of the source takes at most.
    """
    return {
        "schema_version": CLLA_SCHEMA_VERSION,
        **plan.to_json(),
        "rope": rope,
        "kv_dtype": str(kv_dtype).removeprefix("torch."),
        "prefill_chunk": prefill_chunk,
    }


def attach(model: PreTrainedModel, codec: Codec, block: dict[str, Any]) -> CllaForCausalLM:
    """Wrap a loaded source model; its weights are shared, not copied.

    Args:
        model: the source.
        codec: of all layer groups.
        block: from `clla_block`.
    """
    read_by_native_code()
    config = CllaConfig(text_config=model.config, clla=block, dtype=model.dtype)
    with torch.device("meta"):
        converted = CllaForCausalLM(config)
    converted.source = model
    for module, group in zip(converted.codec.groups, codec.groups, strict=True):
        for name, tensor in group.tensors().items():
            stored = tensor.to(getattr(torch, block["kv_dtype"]))  # as the checkpoint will hold it
            value = stored.to(device=model.device, dtype=model.dtype)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    converted.watch_source()
    if hasattr(model, "hf_device_map"):  # so that saving fetches what lies on disk
        converted.hf_device_map = model.hf_device_map
    converted.generation_config = for_compressed_cache(model.generation_config)
    return converted.eval()
