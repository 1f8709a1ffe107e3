"""The source model's own cache as it is served: in its checkpoint's dtype, in fp8, or in int4 per token.

What is claimed is what is stored: tensors of the dtype, packed nibbles with fp16 scale and minimum per token
and head (asymmetric min-max, 4.5 bits per component at head dim 64), or fp8 e4m3 codes with either one scale for
the keys and one for the values of a layer, as engines serve it, or an fp16 scale per token and head.

Shape legend: B sequences, H key-value heads, T tokens, d head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from clla.errors import UsageError
from clla.evaluate import minmax
from clla.evaluate.measured_cache import MeasuredCache
from clla.source.families import split_layers

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
HEADROOM = 4.0  # later tokens may exceed the first chunk; a power of two costs a floating format no precision
SMALLEST_SCALE = torch.finfo(torch.float16).tiny  # fp16 keeps its relative precision down to here


def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """e4m3 codes of x / scale. Clamped first: some versions and devices cast what is larger to NaN."""
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)


class Codec(Protocol):
    """How keys, or values, of one layer are kept: encoded parts [B, H, T, …], and what belongs to no token."""

    @property
    def nbytes(self) -> int:
        """Of what belongs to no token."""

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Parts [B, H, T, …] of [B, H, T, d]."""

    def decode(self, *parts: Tensor) -> Tensor:
        """Inverse of `encode`, fp32."""


class MinMax:
    """A few bits, one scale and minimum per token and head.

    Args:
        bits: per component.
    """

    nbytes = 0

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return minmax.pack(x, self.bits)

    def decode(self, *parts: Tensor) -> Tensor:
        codes, affine = parts
        return minmax.unpack(codes, affine, self.bits)


class Fp8TokenHead:
    """e4m3, one fp16 scale per token and head."""

    nbytes = 0

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        largest = x.float().abs().amax(-1, keepdim=True)
        scale = (largest / FP8_MAX).clamp_min(SMALLEST_SCALE).half()
        return to_fp8(x, scale.float()), scale

    def decode(self, *parts: Tensor) -> Tensor:
        codes, scale = parts
        return codes.float() * scale.float()


class Fp8Tensor:
    """e4m3, one scale fixed by the first chunk's largest magnitude times `HEADROOM`; larger ones later are clamped.

    So the scale depends on what the first chunk is.
    """

    def __init__(self) -> None:
        self.scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.scale is None else self.scale.nbytes

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.scale is None:
            largest = x.float().abs().amax()
            self.scale = torch.where(largest > 0, largest * (HEADROOM / FP8_MAX), 1.0)
        return (to_fp8(x, self.scale),)

    def decode(self, *parts: Tensor) -> Tensor:
        assert self.scale is not None
        return parts[0].float() * self.scale


CODECS: dict[str, Callable[[], Codec]] = {"int4": partial(MinMax, 4), "fp8": Fp8Tensor, "fp8-token-head": Fp8TokenHead}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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


class EncodedLayer(DynamicLayer):
    """Keys (after RoPE) and values kept encoded; hands out the decoded past and the exact present.

    Args:
        keys: their codec.
        values: theirs.
    """

    def __init__(self, keys: Codec, values: Codec) -> None:
        super().__init__()
        self.codecs = (keys, values)
        self.parts: list[tuple[Tensor, ...]] = [(), ()]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        out = []
        for i, (codec, new) in enumerate(zip(self.codecs, (key_states, value_states), strict=True)):
            past, encoded = self.parts[i], codec.encode(new)
            self.parts[i] = tuple(torch.cat(both, 2) for both in zip(past, encoded, strict=True)) if past else encoded
            out.append(torch.cat((codec.decode(*past).to(new.dtype), new), 2) if past else new)
        return out[0], out[1]

    def get_seq_length(self) -> int:
        return self.parts[0][0].shape[2] if self.parts[0] else 0

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for parts in self.parts for t in parts) + sum(codec.nbytes for codec in self.codecs)


class SourceCache(MeasuredCache):
    """A source model's cache as it is served.

    Args:
        config: the model's config.
        storage: a dtype of 16 or 32 bits, `int4`, `fp8` (a scale a tensor) or `fp8-token-head`.

    Raises:
        UsageError: another storage; among them fp8 as a bare dtype, whose cast without a scale saturates.
    """

    def __init__(self, config: Any, storage: torch.dtype | Literal["int4", "fp8", "fp8-token-head"]) -> None:
        if storage not in DTYPES and storage not in CODECS:
            raise UsageError(
                f"the cache's storage is {storage}",
                expected="one of " + ", ".join(map(str, (*DTYPES, *CODECS))),
                remedy="choose one; for fp8 take fp8 or fp8-token-head, which are scaled",
            )
        full, _ = split_layers(config)
        if isinstance(storage, torch.dtype):
            super().__init__(config, {i: StoredLayer(storage) for i in full})
        else:
            super().__init__(config, {i: EncodedLayer(CODECS[storage](), CODECS[storage]()) for i in full})
