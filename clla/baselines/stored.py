"""The source model's own cache as it is served: in its checkpoint's dtype, or in int4 a token.

What is claimed is what is stored: half-precision tensors, or packed nibbles with fp16 scale and minimum
per token and head (asymmetric min-max, 4.5 bits a component at head dim 64).

Shape legend: B sequences, H key-value heads, T tokens, d head dim.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicCache, DynamicLayer

TINY = 1e-6  # a constant vector has no range; its codes are all zero


class StoredLayer(DynamicLayer):
    """Keys and values kept in a storage dtype, handed out in the model's.

    Args:
        dtype: of storage.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.storage_dtype = dtype

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states.to(self.storage_dtype), value_states.to(self.storage_dtype))
        return keys.to(key_states.dtype), values.to(value_states.dtype)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.keys, self.values) if t is not None)


class Int4Layer(DynamicLayer):
    """Keys (after RoPE) and values in 4 bits, one scale and minimum per token and head."""

    def __init__(self) -> None:
        super().__init__()
        self.packed: list[tuple[Tensor, Tensor] | None] = [None, None]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        out = []
        for i, new in enumerate((key_states, value_states)):
            codes, affine = pack_int4(new)
            held = self.packed[i]
            if held is not None:
                codes, affine = torch.cat((held[0], codes), 2), torch.cat((held[1], affine), 2)
            self.packed[i] = (codes, affine)
            past = codes.shape[2] - new.shape[2]
            out.append(torch.cat((unpack_int4(codes[:, :, :past], affine[:, :, :past]).to(new.dtype), new), 2))
        return out[0], out[1]

    def get_seq_length(self) -> int:
        return 0 if self.packed[0] is None else self.packed[0][0].shape[2]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for pair in self.packed if pair is not None for t in pair)


def pack_int4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [B, H, T, d/2] uint8 and fp16 (scale, minimum) [B, H, T, 2] of [B, H, T, d]."""
    x = x.float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    affine = torch.cat((((high - low) / 15).clamp_min(TINY), low), -1).half()
    codes = ((x - affine[..., 1:].float()) / affine[..., :1].float()).round().clamp(0, 15).to(torch.uint8)
    return codes[..., ::2] | (codes[..., 1::2] << 4), affine


def unpack_int4(codes: Tensor, affine: Tensor) -> Tensor:
    """Inverse of `pack_int4`, fp32."""
    values = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).float()
    return values * affine[..., :1].float() + affine[..., 1:].float()


class SourceCache(Cache):
    """A source model's cache whose bytes are measured. Sliding-window layers stay bounded, as the model has them.

    Args:
        config: the model's config.
        storage: a dtype, or `int4`.
    """

    def __init__(self, config: Any, storage: torch.dtype | Literal["int4"]) -> None:
        layers: list[Any] = []
        for own in DynamicCache(config=config).layers:
            if type(own) is not DynamicLayer:
                layers.append(own)
            else:
                layers.append(StoredLayer(storage) if isinstance(storage, torch.dtype) else Int4Layer())
        self._stored = layers
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(layer) for layer in self._stored)


def _nbytes(layer: Any) -> int:
    own = getattr(layer, "nbytes", None)
    return own if own is not None else sum(t.nbytes for t in (layer.keys, layer.values) if t is not None)
