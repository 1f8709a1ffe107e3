"""Blocks of sinks stay with their request, are shared with prefixes, and a prefix without them is none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.core.single_type_kv_cache_manager import get_manager_for_kv_cache_spec
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from clla.serving.kv_cache_spec import SinkWindowManager, SinkWindowSpec

SIZE, WINDOW = 16, 32
SPEC = SinkWindowSpec(
    block_size=SIZE, num_kv_heads=2, head_size=8, dtype=torch.float32, sliding_window=WINDOW, sinks=4, in_flight=64
)


@pytest.fixture
def manager() -> SinkWindowManager:
    pool = BlockPool(num_gpu_blocks=64, enable_caching=True, hash_block_size=SIZE)
    made = get_manager_for_kv_cache_spec(
        SPEC, 128, 1024, block_pool=pool, enable_caching=True, kv_cache_group_id=0, scheduler_block_size=SIZE
    )
    assert isinstance(made, SinkWindowManager)
    return made


def request(name: str, tokens: int) -> Any:
    """A request whose blocks have hashes of their own."""
    hashes = [BlockHash(bytes([i]) * 32) for i in range(tokens // SIZE)]
    return SimpleNamespace(
        request_id=name, num_tokens=tokens, block_hashes=hashes, shared_prefix_boundary=0, num_prompt_tokens=tokens
    )


def fill(manager: SinkWindowManager, name: str, tokens: int) -> Any:
    """A request that has computed so many tokens."""
    made = request(name, tokens)
    manager.allocate_new_blocks(name, tokens, tokens)
    manager.cache_blocks(made, tokens, replay_boundaries=(tokens - 1,))
    return made


def find(manager: SinkWindowManager, hashes: list[BlockHash], tokens: int) -> tuple[list[Any], int]:
    (blocks,), length = manager.find_longest_cache_hit(
        block_hashes=hashes,
        max_length=tokens,
        kv_cache_group_ids=[0],
        block_pool=manager.block_pool,
        kv_cache_spec=SPEC,
        drop_eagle_block=False,
        alignment_tokens=SIZE,
    )
    return blocks, length


def test_the_built_in_managers_are_still_known() -> None:
    full = FullAttentionSpec(block_size=SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32)
    assert KVCacheSpecRegistry.get_manager_class(full).__name__ == "FullAttentionManager"
    assert KVCacheSpecRegistry.get_manager_class(SPEC) is SinkWindowManager


def test_the_first_block_stays_while_the_window_moves(manager: SinkWindowManager) -> None:
    fill(manager, "a", 160)
    first = manager.req_to_blocks["a"][0]
    manager.remove_skipped_blocks("a", 160)
    held = [i for i, block in enumerate(manager.req_to_blocks["a"]) if not block.is_null]
    assert held == [0, 8, 9]  # tokens 129 to 159 may still be read
    assert manager.req_to_blocks["a"][0] is first and first.ref_cnt == 1
    assert len(held) <= SPEC.max_admission_blocks_per_request(128, 1024)
    manager.free("a")
    assert first.ref_cnt == 0


def test_a_prefix_is_found_with_its_sinks(manager: SinkWindowManager) -> None:
    made = fill(manager, "a", 160)
    first = manager.req_to_blocks["a"][0]
    manager.remove_skipped_blocks("a", 160)
    manager.free("a")
    blocks, length = find(manager, made.block_hashes, 160)
    assert length == 160 and blocks[0] is first and blocks[1].is_null and not blocks[9].is_null
    free = manager.block_pool.get_num_free_blocks()
    needed = manager.get_num_blocks_to_allocate("b", 170, blocks, 160, 160, 170)
    manager.add_local_computed_blocks("b", blocks, 160, 0)
    manager.allocate_new_blocks("b", 170, 170)
    assert free - manager.block_pool.get_num_free_blocks() == needed == 4  # sinks, two of the window, one new
    assert first.ref_cnt == 1


def test_a_prefix_without_its_sinks_is_none(manager: SinkWindowManager) -> None:
    made = fill(manager, "a", 160)
    first = manager.req_to_blocks["a"][0]
    manager.free("a")
    manager.block_pool.evict_blocks({first.block_id})
    assert find(manager, made.block_hashes, 160) == ([], 0)
