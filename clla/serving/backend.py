"""What vLLM sees of the cache: two kinds of pages, and attention that reads both.

A model's own attention layers keep exact keys and values of a bounded window (`kv_cache_spec.py`). One more layer,
which computes nothing, keeps the packed latents of all layer groups side by side, so that a token costs exactly the
bytes of the plan and the engine shares, evicts and counts them as it does any cache.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout, SlidingWindowSpec, replace_as

from clla.errors import CllaError
from clla.serving.attention import GroupReader
from clla.serving.block_size import EXACT_BLOCK
from clla.serving.kv_cache_spec import SinkWindowSpec
from clla.serving.pages import Batch, Pages, read_exact, write_exact
from clla.serving.sliding import attend_sliding

WRITE_LATENTS = "clla::write_latents"  # operation of the same name below


class BatchBuilder(AttentionMetadataBuilder[Batch]):
    """Makes a step's `Batch` for one kind of pages."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Batch:
        common, count = common_attn_metadata, common_attn_metadata.num_reqs
        starts = common.query_start_loc_cpu[: count + 1].tolist()
        lengths = common.seq_lens[:count].tolist()
        tokens = starts[-1]
        parts = [
            torch.arange(length - (stop - start), length)
            for start, stop, length in zip(starts, starts[1:], lengths, strict=False)
        ]
        positions = torch.cat(parts).to(common.slot_mapping.device)
        return Batch(starts, lengths, common.block_table_tensor, common.slot_mapping[:tokens].long(), positions)


class PackedBackend(AttentionBackend):
    """Pages that lie beside those of other layers in one block, whatever their sizes."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_builder_cls() -> type[BatchBuilder]:
        return BatchBuilder

    @staticmethod
    def get_impl_cls() -> Any:
        return PagedAttention

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.BLHNC,)


class LatentBackend(PackedBackend):
    """Of the pages of latents."""


class WindowBackend(PackedBackend):
    """Of the pages of exact keys and values."""

    sinks: ClassVar[int] = 0
    in_flight: ClassVar[int] = 0

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [EXACT_BLOCK]

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        if type(spec) is SlidingWindowSpec:
            return replace_as(spec, SinkWindowSpec, sinks=cls.sinks, in_flight=cls.in_flight)
        return spec


class LatentStore(nn.Module, AttentionLayerBase):
    """The layer that owns the latents' pages.

    Args:
        name: in the engine's table of layers.
        groups: layer groups of this pipeline rank.
        row_bytes: of a token, all these groups together, or those of a rank that has more.
        block: tokens per page.
        alone: blocks that the longest request may need while it is the only one.
        vllm_config: of the engine.
    """

    def __init__(
        self, name: str, groups: list[GroupReader], row_bytes: int, block: int, alone: int, vllm_config: Any
    ) -> None:
        super().__init__()
        self.name, self.groups, self.row_bytes, self.block, self.alone = name, groups, row_bytes, block, alone
        self.kv_cache = torch.tensor([])
        self.attn_type = AttentionType.DECODER  # layers that share its pages are asked whether theirs is the same
        self.impl = None  # type: ignore[assignment]
        vllm_config.compilation_config.static_forward_context[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return LatentBackend

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take the pages [P, 1, b, bytes].

        Raises:
            CllaError: one long prompt would not fit while it is computed.
        """
        if len(kv_cache) <= self.alone:
            raise CllaError(
                f"the memory for the cache holds {len(kv_cache)} blocks; a single prompt may need {self.alone}",
                expected=f"more than {self.alone} blocks",
                remedy="give the cache more memory, or lower --max-num-batched-tokens or --max-model-len",
            )
        super().bind_kv_cache(kv_cache)

    def get_kv_cache_spec(self, vllm_config: Any) -> FullAttentionSpec:
        return FullAttentionSpec(
            block_size=self.block,
            num_kv_heads=1,
            head_size=self.row_bytes,
            head_size_v=0,
            dtype=torch.uint8,
            state_content_bytes=self.row_bytes,
        )


def window_backend(sinks: int, vllm_config: Any) -> type[WindowBackend]:
    """Backend of layers with exact tokens, the first `sinks` of which stay."""
    chunk = vllm_config.scheduler_config.long_prefill_token_threshold
    more = {"sinks": sinks, "in_flight": chunk * vllm_config.max_concurrent_batches}
    return type("WindowBackend", (WindowBackend,), more)


class PagedAttention(AttentionImpl):  # type: ignore[type-arg]
    """Takes the place of the attention that the engine made for a layer.

    Args:
        own: the attention made for it.
    """

    def __init__(self, own: Any) -> None:
        self.num_heads, self.head_size, self.scale = own.num_heads, own.head_size, own.scale
        self.num_kv_heads = own.num_kv_heads

    def forward(  # type: ignore[override]
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Batch | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """As the engine's own: queries [T, H_q, d], keys and values [T, H, d] into `output` [T, H_q, d]."""
        if attn_metadata is None:  # a trial run for the engine's memory
            return output.zero_()
        self._attend(query, key, value, (attn_metadata, kv_cache), output)
        return output

    @abstractmethod
    def _attend(self, query: Tensor, key: Tensor, value: Tensor, own: Pages, output: Tensor) -> None:
        """As `forward`, with the layer's batch and pages."""


class PackedAttention(PagedAttention):
    """Of a layer on latents that reads nothing exactly; its pages are those of the latents.

    Args:
        own: the attention that the engine made for it.
        layer: its number in the model.
        group: its group.
    """

    def __init__(self, own: Any, layer: int, group: GroupReader) -> None:
        super().__init__(own)
        self.layer, self.group = layer, group

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, own: Pages, output: Tensor) -> None:
        self.group.attend(self.layer, query, None, own, self.scale, output)


class WindowAttention(PackedAttention):
    """The same where the layer has pages of its own for exact tokens.

    Args:
        own, layer, group: as of `PackedAttention`.
        names: the engine's names of the group's layers in order.
        store: and of the layer that owns the latents' pages.
    """

    def __init__(self, own: Any, layer: int, group: GroupReader, names: list[str], store: str) -> None:
        super().__init__(own, layer, group)
        self.names, self.store = names, store

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, own: Pages, output: Tensor) -> None:
        context, (batch, pages) = get_forward_context(), own
        layers = context.no_compile_layers
        latents = context.attn_metadata[self.store], layers[self.store].kv_cache
        tokens = batch.starts[-1]
        write_exact(pages, batch.slots, key[:tokens], value[:tokens])
        self.group.attend(self.layer, query, own, latents, self.scale, output)
        if self.layer == self.group.layers[-1] and not self.group.from_input:
            both = {
                number: _all_heads(read_exact(layers[name].kv_cache, context.attn_metadata[name].slots), self.group)
                for number, name in zip(self.group.layers, self.names, strict=True)
            }
            self.group.write(both, latents)


class SlidingAttention(PagedAttention):
    """Of a layer with a sliding window of its own, which is on no latents.

    Args:
        own: the attention that the engine made for it.
        window: tokens that a token sees, itself among them.
    """

    def __init__(self, own: Any, window: int) -> None:
        super().__init__(own)
        self.window = window

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, own: Pages, output: Tensor) -> None:
        tokens = own[0].starts[-1]
        write_exact(own[1], own[0].slots, key[:tokens], value[:tokens])
        attend_sliding(query, own, self.window, self.scale, output)


@torch.library.custom_op(WRITE_LATENTS, mutates_args=())
def write_latents(hidden: Tensor, store: str, group: int) -> Tensor:
    """Write the latents of attention inputs [T, h] of a group's first layer, and hand the inputs on.

    Opaque to the engine's compiler, as its own attention is. What it returns is used, so it cannot be left out.

    Args:
        hidden: [T, h].
        store: the engine's name of the layer that owns the pages.
        group: number of the layer group.
    """
    context = get_forward_context()
    if context.attn_metadata is not None:  # else a trial run for the engine's memory
        batch, layer = context.attn_metadata[store], context.no_compile_layers[store]
        layer.groups[group].write_inputs(hidden[: batch.starts[-1]], (batch, layer.kv_cache))
    return hidden.clone()


@write_latents.register_fake
def _(hidden: Tensor, store: str, group: int) -> Tensor:
    return torch.empty_like(hidden)


def watch_inputs(projection: nn.Module, store: LatentStore, group: int) -> None:
    """Have a group's latents written from what its first layer's attention gets, before that layer attends.

    Args:
        projection: of the layer's queries, keys and values.
        store: owns the pages.
        group: number of the layer group.
    """

    def hand_on(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return write_latents(inputs[0], store.name, group), *inputs[1:]

    projection.register_forward_pre_hook(hand_on)


def _all_heads(both: Tensor, group: GroupReader) -> Tensor:
    """Keys and values [2H, T, d] of all the model's heads, from those of this rank."""
    ranks = get_tensor_model_parallel_world_size()
    if ranks == 1:
        return both
    heads = tensor_model_parallel_all_gather(both.unflatten(0, (2, -1)).contiguous(), dim=1)  # [2, ranks·H, T, d]
    copies = heads.shape[1] // group.kv_heads  # ranks with the same heads, where there are more ranks than heads
    return heads[:, ::copies].flatten(0, 1)
