"""Attention as a converted model has it, for a whole sequence at once.

While the cache is in use, a token sees the newest tokens and the first few exactly, and everything between from
latents. Which tokens those are depends on when blocks leave the exact window, so on how many tokens come in a
forward pass. Here every query attends to exact and decoded keys side by side, each under its mask, in one softmax.

Shape legend: B sequences, H_q query heads, H key-value heads, T tokens, d head dim.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from clla.modeling.sizes_clla import leaving_slots
from clla.modeling.spec_clla import CacheSpec

BLOCK = 256  # queries at a time where no kernel skips the keys that they do not see


@dataclass(frozen=True)
class View:
    """What each of T tokens sees exactly, and what from latents.

    Attributes:
        starts: for each token how many tokens have left the exact window when it is computed.
        sinks: S, first tokens that stay exact wherever they are.
    """

    starts: tuple[int, ...]
    sinks: int


def view_of(length: int, *, window: int, flush_block: int, sinks: int, chunk: int) -> View:
    """The view of T tokens that come `chunk` at a time.

    Args:
        length: T.
        window: W; 0 with decoupled keys, where even a token itself is read from its latent.
        flush_block: tokens that leave together.
        sinks: S.
        chunk: tokens per forward pass.
    """
    if window == 0:
        return View(tuple(range(1, length + 1)), sinks)
    return View(tuple(leaving_slots(t // chunk * chunk, window, flush_block) for t in range(length)), sinks)


def drawn_view(spec: CacheSpec, length: int, *, seed: int, step: int) -> View:
    """As when text is read a window at a time, or as when it is written token by token; seed and step decide.

    Args:
        spec: of the cache.
        length: T.
        seed: of the run.
        step: of training.
    """
    window, block = spec.window, spec.flush_block
    chunk = random.Random(f"{seed}:{step}").choice((1, max(window, block)))
    return view_of(length, window=window, flush_block=block, sinks=spec.sinks, chunk=chunk)


@lru_cache(maxsize=8)
def masks(view: View, device: torch.device) -> tuple[Tensor, Tensor]:
    """[T, T] each, true where a query (rows) sees a key exactly, or decoded from its latent."""
    tokens = torch.arange(len(view.starts), device=device)
    causal = tokens <= tokens[:, None]
    left = (tokens < torch.tensor(view.starts, device=device)[:, None]) & (tokens >= view.sinks)
    return causal & ~left, causal & left


def mixed_attention(
    query: Tensor, exact: tuple[Tensor, Tensor], decoded: tuple[Tensor, Tensor], view: View, scaling: float
) -> Tensor:
    """Attention [B, T, H_q, d] over exact and decoded keys in one softmax.

    Args:
        query: [B, H_q, T, d], after RoPE.
        exact: keys after RoPE and values, [B, H, T, d] each.
        decoded: the same from latents.
        view: which of them each query sees.
        scaling: of the logits.
    """
    options: dict[str, Any] = {"scale": scaling, "enable_gqa": exact[0].shape[1] != query.shape[1]}
    if query.is_cuda:
        keys, values = (torch.cat(pair, dim=2).to(query.dtype) for pair in zip(exact, decoded, strict=True))
        out = _flex()(query, keys, values, block_mask=_block_mask(view, query.device), **options)
        return out.transpose(1, 2)
    blocks = []
    for first in range(0, query.shape[2], BLOCK):
        stop = min(first + BLOCK, query.shape[2])
        parts, mask = _seen(view, first, stop, query.device)
        keys, values = (
            torch.cat([pair[i][:, :, low:high] for i, low, high in parts], dim=2).to(query.dtype)
            for pair in zip(exact, decoded, strict=True)
        )
        rows = query[:, :, first:stop]
        blocks.append(nn.functional.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, **options))
    return torch.cat(blocks, dim=2).transpose(1, 2)


@lru_cache(maxsize=256)
def _seen(view: View, first: int, stop: int, device: torch.device) -> tuple[list[tuple[int, int, int]], Tensor]:
    """Ranges of keys (0 exact or 1 decoded, from, to) that queries [first, stop) see any of, and their mask."""
    low, high = min(view.starts[first:stop]), max(view.starts[first:stop])
    sinks = min(view.sinks, stop)
    parts = [(0, 0, sinks), (1, sinks, min(high, stop)), (0, max(low, sinks), stop)]
    parts = [part for part in parts if part[1] < part[2]]
    both = masks(view, device)
    return parts, torch.cat([both[i][first:stop, start:end] for i, start, end in parts], dim=1)


@lru_cache(maxsize=1)
def _flex() -> Callable[..., Any]:
    """Flex attention skips blocks that no query sees; it has to be compiled, or it would write all logits."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=8)
def _block_mask(view: View, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    length = len(view.starts)
    return create_block_mask(visible(view, device), None, None, length, 2 * length, device)


def visible(view: View, device: torch.device) -> Callable[..., Tensor]:
    """Both `masks` side by side as flex attention asks for them, by the indices of a query and one of 2T keys."""
    length, starts = len(view.starts), torch.tensor(view.starts, device=device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        token = key % length
        left = (token < starts[query]) & (token >= view.sinks)
        return (token <= query) & torch.where(key < length, ~left, left)

    return sees
