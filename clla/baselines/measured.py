"""A cache whose bytes are measured, the base of every baseline's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Cache
from transformers.cache_utils import DynamicCache


class MeasuredCache(Cache):
    """Some layers are a method's own; the others, among them sliding-window layers, stay as the model has them.

    Args:
        config: the model's text config.
        own: the method's layers by index; those that keep more than `keys` and `values` have `nbytes`.
    """

    def __init__(self, config: Any, own: Mapping[int, Any]) -> None:
        layers = enumerate(DynamicCache(config=config).layers)
        super().__init__(layers=[own.get(i, layer) for i, layer in layers])

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept between forward passes."""
        return sum(layer.nbytes if hasattr(layer, "nbytes") else plain_nbytes(layer) for layer in self.layers)


def plain_nbytes(layer: Any) -> int:
    """Bytes of a layer's `keys` and `values`."""
    return sum(t.nbytes for t in (layer.keys, layer.values) if t is not None)
