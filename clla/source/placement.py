"""Where a model's layers are: all on one device, spread over several, or left on disk and read one at a time."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from clla.errors import UnsupportedModelError, UsageError
from clla.modeling.hooks_clla import attention_modules

ROOM = 0.7  # of the free memory, that weights may take


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of a model's decoder layers, and its name.

    Args:
        model: with or without weights.

    Raises:
        UnsupportedModelError: there is no such list.
    """
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and len(attention_modules(module)) > 0:
            return name, module
    raise UnsupportedModelError(
        f"{type(model).__name__} has no plain list of {count} decoder layers",
        expected="layers that can be run one after another",
        remedy="use a machine that holds the model in memory",
    )


def layers_on_disk(config: Any, device: torch.device) -> dict[str, str]:
    """A `device_map` of accelerate: decoder layers stay on disk, everything else goes to the device."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    name, _ = decoder_layers(empty)
    found: dict[str, str] = {}
    where = "cpu" if device.type == "cpu" else str(device)  # safetensors knows no cpu:0

    def fill(module: nn.Module, path: str) -> None:
        for child_name, child in module.named_children():
            full = f"{path}.{child_name}" if path else child_name
            if full == name:
                found.update({f"{full}.{i}": "disk" for i in range(len(list(child.children())))})
            elif name.startswith(full + "."):
                fill(child, full)
            else:
                found[full] = where

    fill(empty, "")
    return found


def choose_placement(wanted: str, weight_bytes: int, device: torch.device) -> str:
    """`auto` keeps a model on its device if it fits there, spreads it over the GPUs if it fits on all, else streams it.

    Args:
        wanted: `auto`, `device`, `spread` or `stream`.
        weight_bytes: of the weights, in the dtype that they are computed with.
        device: of the run.

    Returns:
        `device`, `spread` or `stream`.

    Raises:
        UsageError: `spread` without several GPUs.
    """
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if wanted == "spread" and count < 2:
        raise UsageError(
            f"--placement spread with {count} GPUs", expected="at least 2", remedy="use --placement auto or stream"
        )
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        free = [torch.cuda.mem_get_info(i)[0] for i in range(count)]
        if weight_bytes <= ROOM * free[device.index or 0]:
            return "device"
        return "spread" if weight_bytes <= ROOM * sum(free) else "stream"
    return "device" if weight_bytes <= ROOM * psutil.virtual_memory().available else "stream"
