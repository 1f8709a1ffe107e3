"""The engine's pages of exact keys and values: the newest tokens, and a sequence's first block with the sinks.

The engine frees the pages that have left a sliding window. Here the first block stays, because the sinks in it are
read exactly for the life of a request. All else follows from that: a cached prefix counts only while its first block
is cached as well, and one block more is counted for each request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class SinkWindowSpec(SlidingWindowSpec):
    """Pages of one layer.

    Attributes:
        sinks: first tokens of a sequence that stay.
        in_flight: most tokens of one request that are being computed while it is not the only one.
    """

    sinks: int = 0
    in_flight: int = 0

    @property
    def sink_blocks(self) -> int:
        """First blocks of a sequence that stay."""
        return -(-self.sinks // self.block_size)

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Most blocks that one request holds beside others, for the engine to admit it."""
        tokens = min(max_in_flight_tokens, self.in_flight)
        return self.sink_blocks + super().max_admission_blocks_per_request(tokens, max_model_len)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Bytes that one request keeps between steps, for the engine's statement of what it can hold.

        What a prompt takes while it is computed comes once, not for each request; that it fits is seen when the pages
        are allocated (`backend.py`).
        """
        held = self.max_admission_blocks_per_request(1, vllm_config.model_config.max_model_len)
        return held * self.page_size_bytes


class SinkWindowManager(SlidingWindowManager):
    """Which blocks of a request are kept, shared and found again."""

    def __init__(self, kv_cache_spec: SinkWindowSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.sink_blocks = kv_cache_spec.sink_blocks

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        skipped = self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size
        self._remove_blocks_in_range(request_id, self.sink_blocks, skipped)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        count = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
        )
        if request_id in self.num_cached_block:
            return count
        # Blocks of sinks that nobody holds at the moment leave the free blocks as well; the base class leaves out
        # what lies before the window.
        skipped = self.get_num_skipped_tokens(total_computed_tokens) // self.block_size
        return count + self._get_num_evictable_blocks(new_computed_blocks[: min(self.sink_blocks, skipped)])

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *args: Any, **kwargs: Any
    ) -> None:
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args, **kwargs)
        blocks = self.req_to_blocks[request_id]
        sinks = [
            (i, block)
            for i, block in enumerate(new_computed_blocks[: self.sink_blocks])
            if blocks[i] is self._null_block and block is not self._null_block
        ]
        if self.enable_caching:
            self.block_pool.touch([block for _, block in sinks])
        for i, block in sinks:
            blocks[i] = block

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        assert isinstance(kv_cache_spec, SinkWindowSpec)
        found, length = super().find_longest_cache_hit(
            block_hashes=block_hashes,
            max_length=max_length,
            kv_cache_group_ids=kv_cache_group_ids,
            block_pool=block_pool,
            kv_cache_spec=kv_cache_spec,
            drop_eagle_block=drop_eagle_block,
            alignment_tokens=alignment_tokens,
            **kwargs,
        )
        hashes = resolve_block_hashes(
            block_hashes, block_pool.hash_block_size, kv_cache_spec.block_size, alignment_tokens=alignment_tokens
        )
        for i in range(min(kv_cache_spec.sink_blocks, len(found[0]))):
            cached = block_pool.get_cached_block(hashes[i], kv_cache_group_ids)
            if not cached:
                return tuple([] for _ in kv_cache_group_ids), 0
            for blocks, block in zip(found, cached, strict=True):
                blocks[i] = block
        return found, length

    @classmethod
    def reachable_block_mask(
        cls, start_block: int, end_block: int, alignment_tokens: int | None, kv_cache_spec: KVCacheSpec, **kwargs: Any
    ) -> list[bool] | None:
        assert isinstance(kv_cache_spec, SinkWindowSpec)
        mask = super().reachable_block_mask(start_block, end_block, alignment_tokens, kv_cache_spec, **kwargs)
        if mask is not None:
            for i in range(start_block, min(end_block, kv_cache_spec.sink_blocks)):
                mask[i - start_block] = True
        return mask


def register_window_spec() -> None:
    """Tell the engine which manager these pages have; safe to call twice."""
    # Asking for a built-in one first has the built-in ones registered: the engine does so only while there are none.
    KVCacheSpecRegistry.get_manager_class(KVCacheSpec(block_size=1))
    KVCacheSpecRegistry.register(SinkWindowSpec, SinkWindowManager, uniform_type_base_spec=SlidingWindowSpec)


register_window_spec()  # where the class arrives in another process, so does its manager
