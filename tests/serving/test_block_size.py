"""The engine makes of blocks, groups and ranks what `clla.serving.block_size` expects of it."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import KVCacheLayout, KVCacheSpec

from clla.serving.backend import LatentStore
from clla.serving.block_size import EXACT_BLOCK, Window, latent_block
from clla.serving.kv_cache_spec import SinkWindowSpec

MEMORY = 1 << 26


def stages(seed: int) -> tuple[list[int], int, int, int]:
    """Layers of each rank, bytes of a row, heads, tokens of a window, drawn at random."""
    draw = random.Random(seed)
    layers = [draw.randint(1, 24) for _ in range(draw.randint(1, 4))]
    return layers, draw.randint(9, 700), draw.randint(1, 8), draw.randint(2, 160)


@pytest.mark.parametrize("seed", range(60))
def test_blocks_over_ranks(seed: int) -> None:
    layers, row, heads, tokens = stages(seed)
    window = SinkWindowSpec(
        block_size=EXACT_BLOCK, num_kv_heads=heads, head_size=64, dtype=torch.float16, sliding_window=tokens, sinks=4
    )
    block, (shares,) = latent_block(row, [Window(window.page_size_bytes, layers, tokens, 4)])
    context = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))
    workers: list[dict[str, KVCacheSpec]] = []
    for rank, count in enumerate(layers):
        store = LatentStore(f"latents.{rank}", [], row, block, 0, context)
        own: dict[str, KVCacheSpec] = {f"layers.{sum(layers[:rank]) + i}.attn": window for i in range(count)}
        workers.append({**own, f"latents.{rank}": store.get_kv_cache_spec(context)})
    config = SimpleNamespace(
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: KVCacheLayout.BLHNC,
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=None,
        ),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False, max_num_batched_tokens=512),
        model_config=SimpleNamespace(max_model_len=1024, original_max_model_len=1024),
        attention_config=SimpleNamespace(hisparse_config=None),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, decode_context_parallel_size=1),
        speculative_config=None,
        num_prefill_lookahead_tokens=0,
        max_in_flight_tokens=512,
    )
    made = kv_cache_utils.get_kv_cache_configs(config, workers, [MEMORY] * len(layers))
    for count, found in zip(layers, made, strict=True):
        *windows, latents = found.kv_cache_groups
        assert len(windows) == shares and len(latents.layer_names) == 1
        assert sum(len(group.layer_names) for group in windows) == count
        assert all(group.layer_names for group in windows)
        assert found.num_blocks == MEMORY // (block * row)  # a block has the bytes of its rows, and no more
