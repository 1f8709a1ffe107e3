"""A cache whose layers see the queries of the chunk that brings new tokens, and settle after its attention.

Shape legend: B sequences, H_q query heads, H key-value heads, T new tokens, S keys handed out, d head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from clla.errors import UsageError
from clla.evaluate.measured_cache import MeasuredCache, layer_nbytes
from clla.source.families import split_layers


class AttendingLayer(DynamicLayer):
    """One layer: `update` hands out what is held and the new tokens, `attend` reads them and then makes room."""

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = self.attended = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.attended != self.seen:
            raise UsageError(
                "a cache that needs the queries was not shown them",
                expected="attention that goes through the cache",
                remedy="run the model as ObservedModel(model)",
            )
        self.seen += key_states.shape[2]
        return super().update(key_states, value_states)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, plain: Callable[[], Tensor]) -> Tensor:
        """Output [B, T, H_q, d] of queries [B, H_q, T, d] over what `update` handed out [B, H, S, d]."""
        raise NotImplementedError

    def get_seq_length(self) -> int:
        return self.seen

    @property
    def nbytes(self) -> int:
        """Of all that is kept in floats; a layer that holds whole numbers adds them."""
        return layer_nbytes(self)


class AttendingCache(MeasuredCache):
    """A cache whose own layers are `AttendingLayer`s.

    Args:
        config: the model's text config.
        new_layer: makes a layer from its number among the layers that are not sliding.
    """

    def __init__(self, config: Any, new_layer: Callable[[int], AttendingLayer]) -> None:
        super().__init__(config, {i: new_layer(number) for number, i in enumerate(split_layers(config)[0])})

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, plain: Callable[[], Tensor]
    ) -> Tensor:
        layer = self.layers[layer_idx]
        if not isinstance(layer, AttendingLayer):
            return plain()
        layer.attended = layer.seen
        return layer.attend(query, key, value, scaling, plain)
