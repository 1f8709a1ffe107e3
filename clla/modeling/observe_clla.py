"""Let a cache see the attention that reads it, and replace it: few queries read latents themselves.

An attention function that does so is registered with `transformers` for every implementation asked for,
and does nothing else while no cache listens.
"""

from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Optional

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from .attention_clla import bias_of
from .triton_clla import NAMESPACE

PREFIX = f"{NAMESPACE}_observed_"  # functions are registered by name, and those of each copy know its caches alone
LISTENER = "clla_listener"  # keyword of a model's forward pass that names the cache, where the context is out of reach
SPECIAL = ("softcap", "sliding_window", "s_aux")  # where they are given, attention is not ordinary
BLOCK_TOKENS = 512  # of a prompt, on a CPU, that see the same keys but for a mask
HARMLESS = {"position_ids", "cache_position", "attention_mask"}  # tensors that attention functions take and ignore
_listener: "ContextVar[Optional[Any]]" = ContextVar("clla_listener", default=None)


@contextmanager
def listening(cache: "Optional[Any]") -> "Iterator[None]":
    """Within it, attention of a model with an observed implementation goes through `cache.attend`.

    `cache.attend(layer_idx, query, key, value, scaling, plain)` gets the queries [B, H_q, T, d] after RoPE, what
    `cache.update` returned [B, H, S, d], the scale of the logits, and `plain()`, which computes the attention as
    the model would. It returns the output [B, T, H_q, d].
    """
    token = _listener.set(cache)
    try:
        yield
    finally:
        _listener.reset(token)


def listen(modules: "Iterable[Any]", cache: "Optional[Any]") -> None:
    """Have a cache, or with None no cache, listen to these attention modules whenever they run from now on."""
    for module in modules:
        module.clla_listener = cache


def is_observed(implementation: str) -> bool:
    """Whether an attention implementation is an observed one."""
    return implementation.startswith(PREFIX)


def observed(implementation: str) -> str:
    """Name of the observed twin of an attention implementation, registered if it is not yet.

    Args:
        implementation: a name that `AttentionInterface` knows, e.g. `sdpa`.

    Raises:
        ValueError: the implementation is the model's own (`eager`).
    """
    name = PREFIX + implementation
    if name not in AttentionInterface():
        if implementation not in AttentionInterface():
            raise ValueError(
                f"attn_implementation={implementation!r} cannot be observed, as decoupled keys need: load with 'sdpa'"
            )
        own = AttentionInterface()[implementation]
        AttentionInterface.register(name, _observing(own, implementation))
        AttentionMaskInterface.register(name, AttentionMaskInterface()[implementation])
    return name


class FoldedMask(NamedTuple):
    """A mask as `Attention.folded` takes it.

    Attributes:
        added: [B or 1, 1, T, S], numbers that are added to logits.
        blocks: first and last token of each, the last one not included, and how many keys it sees.
    """

    added: Tensor
    blocks: "list[tuple[int, int, int]]"

    @classmethod
    def of(cls, mask: Tensor, dtype: torch.dtype) -> "FoldedMask":
        """From a mask [B or 1, 1, T, S] of truth values."""
        blocks, (count, keys) = [], mask.shape[2:]
        for start in range(0, count, BLOCK_TOKENS):
            stop = min(start + BLOCK_TOKENS, count)
            seen = mask[:, 0, start:stop].flatten(0, 1).any(0).nonzero()
            blocks.append((start, stop, int(seen[-1]) + 1 if len(seen) else keys))
        return cls(bias_of(mask, dtype), blocks)


class Attention:
    """The attention of one call as the model itself computes it; calling it gives the output [B, T, H_q, d].

    Attributes:
        ordinary: it is softmax(scaling·q·kᵀ)·v over all earlier tokens that are no padding, and nothing else.
    """

    def __init__(
        self,
        own: "Callable[..., Any]",
        name: str,
        module: Any,
        tensors: "tuple[Tensor, ...]",
        mask: Any,
        kwargs: "dict[str, Any]",
    ) -> None:
        self.name = name  # of the implementation
        self._call = (own, module, tensors, mask, kwargs)

    def __call__(self) -> Tensor:
        own, module, tensors, mask, kwargs = self._call
        return own(module, *tensors, mask, **kwargs)[0]

    def over(
        self, key: Tensor, value: Tensor, *, query: "Optional[Tensor]" = None, scaling: "Optional[float]" = None
    ) -> Tensor:
        """The same attention over other keys and values; of another width with a query and the scale of its logits."""
        own, module, (first, *_), mask, kwargs = self._call
        kwargs = kwargs if scaling is None else {**kwargs, "scaling": scaling}
        return own(module, first if query is None else query, key, value, mask, **kwargs)[0]

    @property
    def mask(self) -> Any:
        """What the model masks; None where it leaves that to the attention function."""
        return self._call[3]

    def folded(self, mask: FoldedMask, scaling: float) -> Tensor:
        """Ordinary attention [B, T, H_q, d] of prompts on a CPU, to the same keys and values.

        Query heads of a key-value head follow one another as if they were tokens, so that nothing is copied for each
        of them, and PyTorch's kernel takes larger blocks of more rows. Keys that a block of tokens cannot see are left
        out: of the tokens of one pass that is nearly half.

        Args:
            mask: of the model.
            scaling: of the logits.
        """
        query, key, value = self._call[2]
        query = query.unflatten(1, (key.shape[1], -1))  # [B, H, M, T, d]
        share, parts = query.shape[2], []
        for start, stop, seen in mask.blocks:
            rows, own = query[..., start:stop, :].flatten(2, 3), (key[:, :, :seen], value[:, :, :seen])
            added = mask.added[:, :, start:stop, :seen].repeat(1, 1, share, 1)
            out = nn.functional.scaled_dot_product_attention(rows, *own, attn_mask=added, scale=scaling)
            parts.append(out.unflatten(2, (share, -1)))
        return torch.cat(parts, dim=3).flatten(1, 2).transpose(1, 2)

    @property
    def ordinary(self) -> bool:
        _, _, _, mask, kwargs = self._call
        # A mask of numbers may hold biases of positions; every tensor that is not known may change the logits.
        if mask is not None and getattr(mask, "dtype", None) != torch.bool:
            return False
        more = {name for name, value in kwargs.items() if isinstance(value, Tensor)} - HARMLESS
        if more or kwargs.get("dropout") or kwargs.get("is_causal") is False:
            return False
        return all(kwargs.get(name) is None for name in SPECIAL)


def _observing(own: "Callable[..., Any]", name: str) -> "Callable[..., Any]":
    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> "tuple[Tensor, Any]":
        cache = kwargs.pop(LISTENER, None)
        if cache is None:
            cache = _listener.get()
        if cache is None:
            cache = getattr(module, "clla_listener", None)
        if cache is None:
            return own(module, query, key, value, attention_mask, **kwargs)
        scaling = kwargs.get("scaling")
        if scaling is None:
            scaling = query.shape[-1] ** -0.5
        plain = Attention(own, name, module, (query, key, value), attention_mask, kwargs)
        return cache.attend(module.layer_idx, query, key, value, scaling, plain), None

    return attention
