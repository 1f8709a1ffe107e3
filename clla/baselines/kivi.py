"""KIVI: keys quantized per channel, values per token, and the newest tokens exact (Liu et al., 2024).

https://arxiv.org/abs/2402.02750

Asymmetric min-max: keys (after RoPE) in groups of neighbouring tokens of one channel, values in groups of
neighbouring channels of one token. Keys leave the exact residual a whole block at a time, values one by one.

Against the paper: the past is decoded for each forward pass instead of read by fused kernels, and a prompt in
several chunks attends to decoded earlier chunks. The exact first tokens (`sinks`) are an addition.

Shape legend: B sequences, H key-value heads, T tokens, d head dim, g tokens or channels a group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from clla.baselines.settings import check_at_least, check_multiple, check_one_of
from clla.errors import UsageError
from clla.evaluate import minmax
from clla.evaluate.measured_cache import MeasuredCache
from clla.source.families import kv_shape, split_layers

WIDTHS = (2, 3, 4)


class Store(ABC):
    """Keys, or values, of one layer: exact sinks, then the quantized past, then the exact residual.

    What is quantized depends on the number of tokens only, not on the chunks they came in.

    Args:
        bits: bits per component.
        residual: newest tokens kept exact.
        group_size: g.
        sinks: first tokens kept exact.
    """

    def __init__(self, *, bits: int, residual: int, group_size: int, sinks: int) -> None:
        self.bits, self.residual, self.group_size, self.sinks = bits, residual, group_size, sinks
        self.quantized = 0  # tokens
        self.packed: tuple[Tensor, Tensor] | None = None  # codes and affine of `minmax.pack`
        self.first: Tensor | None = None  # [B, H, <= sinks, d]
        self.newest: Tensor | None = None  # [B, H, T, d]

    @abstractmethod
    def due(self, exact: int) -> int:
        """How many of the oldest exact tokens after the sinks are to be quantized."""

    @abstractmethod
    def group(self, x: Tensor) -> Tensor:
        """[B, H, T, d] with its groups along the last dim, whatever is older first along dim 2."""

    @abstractmethod
    def ungroup(self, groups: Tensor) -> Tensor:
        """Inverse of `group`."""

    def update(self, new: Tensor) -> Tensor:
        """The past as it is kept and `new` [B, H, T, d] as it is; what is due is quantized afterwards."""
        parts = [self.first, self._decode(new.dtype), self.newest, new]
        whole = torch.cat([part for part in parts if part is not None], 2)
        exact = whole[:, :, self.sinks + self.quantized :]
        due = self.due(exact.shape[2])
        if due:
            codes, affine = minmax.pack(self.group(exact[:, :, :due]), self.bits)
            if self.packed is not None:
                codes, affine = torch.cat((self.packed[0], codes), 2), torch.cat((self.packed[1], affine), 2)
            self.packed = codes, affine
            self.quantized += due
        # Copies, since a view would keep all of `whole`.
        self.first, self.newest = whole[:, :, : self.sinks].clone(), exact[:, :, due:].clone()
        return whole

    def _decode(self, dtype: torch.dtype) -> Tensor | None:
        if self.packed is None:
            return None
        return self.ungroup(minmax.unpack(*self.packed, self.bits).to(dtype))

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*(self.packed or ()), self.first, self.newest) if t is not None)


class KeyStore(Store):
    """Groups of g tokens of one channel, quantized whenever the residual is full."""

    def due(self, exact: int) -> int:
        return exact // self.residual * self.residual

    def group(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.group_size)).transpose(-1, -2)  # [B, H, T / g, d, g]

    def ungroup(self, groups: Tensor) -> Tensor:
        return groups.transpose(-1, -2).flatten(2, 3)


class ValueStore(Store):
    """Groups of g channels of one token, quantized as soon as the token is older than the residual."""

    def due(self, exact: int) -> int:
        return max(0, exact - self.residual)

    def group(self, x: Tensor) -> Tensor:
        return x.unflatten(3, (-1, min(self.group_size, x.shape[3])))  # [B, H, T, d / g, g]

    def ungroup(self, groups: Tensor) -> Tensor:
        return groups.flatten(3)


class KiviLayer(DynamicLayer):
    """Args: settings: those of `Store`."""

    def __init__(self, **settings: int) -> None:
        super().__init__()
        self.stores = (KeyStore(**settings), ValueStore(**settings))
        self.tokens = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.tokens += key_states.shape[2]
        keys, values = self.stores
        return keys.update(key_states), values.update(value_states)

    def get_seq_length(self) -> int:
        return self.tokens

    @property
    def nbytes(self) -> int:
        return sum(store.nbytes for store in self.stores)


class KiviCache(MeasuredCache):
    """A model's cache quantized as KIVI does, (bits + 32 / g) / 16 of bf16 beyond sinks and residual.

    Args:
        config: the model's config.
        bits: 2, 3 or 4 per component.
        residual: newest tokens kept exact, a multiple of `group_size`.
        group_size: tokens per group of keys and channels a group of values; heads that are smaller are one group.
        sinks: first tokens kept exact.

    Raises:
        UsageError: settings or a head dim that cannot be grouped and packed.
    """

    def __init__(self, config: Any, *, bits: int, residual: int = 128, group_size: int = 32, sinks: int = 0) -> None:
        head_dim = kv_shape(config).head_dim
        check_one_of(tuple(WIDTHS), bits=bits)
        check_multiple(8, group_size=group_size)
        check_multiple(group_size, residual=residual)
        check_at_least(0, sinks=sinks)
        if head_dim % min(group_size, head_dim) or head_dim % 8:
            raise UsageError(
                f"head_dim is {head_dim}",
                expected=f"a multiple of group_size {group_size}, or a smaller multiple of 8",
                remedy="choose another group_size",
            )
        settings = {"bits": bits, "residual": residual, "group_size": group_size, "sinks": sinks}
        super().__init__(config, {i: KiviLayer(**settings) for i in split_layers(config)[0]})
