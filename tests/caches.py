"""What tests of caches share: vectors, streaming with and without a model, and the bytes really held."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from clla.baselines.attending import AttendingCache
from clla.modeling.hooks_clla import CACHE

B, H_Q, H, D = 2, 6, 3, 16
SCALING = D**-0.5


def config_of(layers: int) -> LlamaConfig:
    """Only the number of layers matters."""
    return LlamaConfig(num_hidden_layers=layers)


def vectors(heads: int, tokens: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, heads, tokens, D]."""
    return torch.randn(B, heads, tokens, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(tokens: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one layer; the queries are long, so that attention is not uniform."""
    heads = (H_Q, H, H)
    query, key, value = (vectors(heads[i], tokens, seed=3 * seed + i, dtype=dtype) for i in range(3))
    return 3 * query, key, value


def cuts(length: int, chunk: int) -> list[int]:
    """Sizes of the chunks of a text."""
    return [min(chunk, length - start) for start in range(0, length, chunk)]


def full_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention [B, T, H_q, D] by loops over heads and tokens, fp32."""
    out = torch.zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
    group = query.shape[1] // key.shape[1]
    for b, head, t in ((b, h, t) for b in range(B) for h in range(query.shape[1]) for t in range(query.shape[2])):
        end = key.shape[2] - query.shape[2] + t + 1
        logits = key[b, head // group, :end].float() @ query[b, head, t].float() * SCALING
        out[b, t, head] = logits.softmax(0) @ value[b, head // group, :end].float()
    return out


def stream(
    cache: AttendingCache, tensors: tuple[Tensor, Tensor, Tensor], sizes: Iterable[int], layer: int = 0
) -> Tensor:
    """Outputs [B, T, H_q, D] of one layer, fed in chunks as a model would."""
    outputs, start = [], 0
    for size in sizes:
        query, key, value = (x[:, :, start : start + size] for x in tensors)
        keys, values = cache.update(key, value, layer)

        def plain(query: Tensor = query, keys: Tensor = keys, values: Tensor = values) -> Tensor:
            mask = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - query.shape[2])
            return nn.functional.scaled_dot_product_attention(
                query, keys, values, attn_mask=mask, scale=SCALING, enable_gqa=True
            ).transpose(1, 2)

        outputs.append(cache.attend(layer, query, keys, values, SCALING, plain))
        start += size
    return torch.cat(outputs, 1)


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor, cache: Any, sizes: Iterable[int]) -> Tensor:
    """Logits [B, T, V] of a model that is fed in chunks."""
    out, start = [], 0
    for size in sizes:
        positions = torch.arange(start, start + size)[None].expand(len(ids), -1)
        part = ids[:, start : start + size]
        out.append(model(input_ids=part, position_ids=positions, use_cache=True, **{CACHE: cache}).logits)
        start += size
    return torch.cat(out, 1)


@torch.no_grad()
def reference_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of a model that sees the text at once, without a cache."""
    return model(input_ids=ids, use_cache=False).logits
