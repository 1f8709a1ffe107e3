"""A no-op cache that records the keys and values of one full-sequence forward pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache


class RecordingCache(DynamicCache):
    """Keeps no keys and values between forward passes; notes those of some layers.

    Args:
        config: the model's.
        layers: whose keys and values are wanted.

    Attributes:
        kv: keys after RoPE and values, [B, H, T, d] each, by layer.
    """

    def __init__(self, config: Any, layers: set[int]) -> None:
        super().__init__(config=config)
        self.wanted = layers
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx in self.wanted:
            self.kv[layer_idx] = (key_states, value_states)
        return key_states, value_states
