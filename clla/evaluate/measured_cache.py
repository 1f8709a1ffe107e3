"""A cache whose bytes are measured, the base of every baseline's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicCache

from clla.artifacts.plan import Plan
from clla.modeling.cache_clla import kept_tensors
from clla.modeling.hooks_clla import CACHE

GROWING = ("keys", "values")  # attributes of a layer that hold something of every token
FULL_PRECISION = "recurrent_states"  # that models keep in the dtype in which they sum them up


class MeasuredCache(Cache):
    """Some layers are a method's own; the others, with a sliding window or a state, stay as the model has them.

    Args:
        config: the model's text config.
        own: the method's layers by index; those that keep more than transformers' own layers have `nbytes`.
    """

    def __init__(self, config: Any, own: Mapping[int, Any]) -> None:
        layers = enumerate(DynamicCache(config=config).layers)
        super().__init__(layers=[own.get(i, layer) for i, layer in layers])

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept between forward passes."""
        return sum(layer.nbytes if hasattr(layer, "nbytes") else layer_nbytes(layer) for layer in self.layers)


def layer_nbytes(layer: Any) -> int:
    """Bytes of what a layer of transformers' own caches keeps: keys and values, recurrent and convolutional states."""
    return sum(tensor.nbytes for _, tensor in kept_tensors(layer))


@torch.no_grad()
def with_kept_bytes(plan: Plan, model: PreTrainedModel, *, itemsize: int) -> Plan:
    """A plan that knows what its layers left alone keep, found by running one token through the model.

    Args:
        plan: whose `kept_slot_bytes` and `kept_state_bytes` are replaced.
        model: the source.
        itemsize: bytes of a component in the dtype in which the model is served.
    """
    if not plan.kept_layers:
        return plan
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), use_cache=True, **{CACHE: cache})
    growing = fixed = 0
    for name, tensor in (found for layer in plan.kept_layers for found in kept_tensors(cache.layers[layer])):
        served = itemsize if tensor.dtype == model.dtype and name != FULL_PRECISION else tensor.itemsize
        if name in GROWING:
            growing += tensor.numel() * served
        else:
            fixed += tensor.numel() * served
    return replace(plan, kept_slot_bytes=growing, kept_state_bytes=fixed)
