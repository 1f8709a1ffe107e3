"""What baselines share that store several layers together: exact newest tokens, and blocks that leave them.

A block is compressed when the last layer of its group has run, so the forward pass that brings a token still
attends to it exactly. Blocks begin at fixed slots: the same keys and values give the same state however they
were cut into chunks. What a chunk attends to does depend on the cut, as its own tokens are exact.

Shape legend: G layers of a group, B sequences, H key-value heads, T new tokens, M compressed tokens,
N exact tokens, S all tokens, d head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from clla.evaluate.measured_cache import MeasuredCache
from clla.modeling.rotary_clla import Rope, Rotation


def rotation_from(rope: Rope | None, start: int, count: int, device: torch.device) -> Rotation | None:
    """The rotation to `count` positions from `start` on, in fp32; None for models without."""
    if rope is None:
        return None
    rotation = rope(torch.arange(start, start + count, device=device)[None])
    return rotation._replace(cos=rotation.cos.float(), sin=rotation.sin.float())


def before_rope(keys: Tensor, layers: Sequence[int], rotation: Rotation | None) -> Tensor:
    """Keys [G, B, H, T, d] of layers, turned back from their positions."""
    if rotation is None:
        return keys
    return torch.stack([rotation.unrotate(own, layer) for own, layer in zip(keys, layers, strict=True)])


class GroupStore(ABC):
    """Storage of neighbouring layers that are compressed together, block by block.

    Args:
        layers: indices in the order in which the model runs them.
        block: tokens compressed at a time.
        sinks: first tokens, handed to `compress` along with the first block.
        window: newest tokens that are never compressed.
    """

    def __init__(self, layers: Sequence[int], *, block: int, sinks: int = 0, window: int = 0) -> None:
        self.layers = list(layers)
        self.block, self.due, self.window = block, block + sinks, window
        self.exact: Tensor | None = None  # [G, B, 2H, N, d], keys after RoPE and values
        self._incoming: list[Tensor] = []  # [B, 2H, T, d] a layer, during one forward pass

    @abstractmethod
    def compress(self, block: Tensor) -> None:
        """Take over the oldest exact tokens [G, B, 2H, block, d]; the first time the sinks stand before them."""

    @abstractmethod
    def past(self, index: int) -> list[Tensor]:
        """Parts [B, 2H, …, d] that make up all that was compressed of the group's layer number `index`."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """What `compress` has stored, no storage twice."""

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.tensors(), *([] if self.exact is None else [self.exact])))

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Take one layer's new keys and values [B, H, T, d]; return all of them [B, H, S, d]."""
        index, new = self.layers.index(layer), torch.cat((keys, values), dim=1)
        exact = [] if self.exact is None else [self.exact[index]]
        both = torch.cat([*(part.to(new.dtype) for part in self.past(index)), *exact, new], dim=2)
        self._incoming.append(new)
        if layer == self.layers[-1]:
            self._settle()
        return both.split((keys.shape[1], values.shape[1]), dim=1)

    def _settle(self) -> None:
        new = torch.stack(self._incoming)
        self._incoming = []
        exact = new if self.exact is None else torch.cat((self.exact, new), dim=3)
        while exact.shape[3] - self.window >= self.due:
            self.compress(exact[:, :, :, : self.due])
            exact = exact[:, :, :, self.due :]
            self.due = self.block
        self.exact = exact.clone()  # a view would keep the block that has left


class GroupLayer(CacheLayerMixin):
    """One layer's view of its group, as `transformers` expects it."""

    is_sliding = False

    def __init__(self, store: GroupStore, layer: int) -> None:
        super().__init__()
        self.store, self.layer, self.seen = store, layer, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.is_initialized = True
        self.seen += key_states.shape[-2]
        return self.store.update(key_states, value_states, self.layer)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    @property
    def nbytes(self) -> int:
        """Of the whole group, in its first layer; the others share it."""
        return self.store.nbytes if self.layer == self.store.layers[0] else 0


class GroupedCache(MeasuredCache):
    """A cache some of whose layers are stored in groups; the others stay as the model has them.

    Args:
        config: the model's text config.
        stores: one a group.
    """

    def __init__(self, config: Any, stores: Sequence[GroupStore]) -> None:
        super().__init__(config, {layer: GroupLayer(store, layer) for store in stores for layer in store.layers})
