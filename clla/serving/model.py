"""A converted checkpoint in vLLM: the engine's own class for the source's architecture, on the compressed cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import extract_layer_index, init_vllm_registered_model, maybe_prefix

from clla.errors import UnsupportedModelError
from clla.modeling.hooks_clla import rope_with, rotary_module
from clla.modeling.modeling_clla import CodecModule
from clla.modeling.quantize_clla import layout_of
from clla.modeling.rotary_clla import Rope
from clla.modeling.rows_clla import HELD_BYTES
from clla.modeling.spec_clla import CacheSpec
from clla.serving.attention import DecoupledReader, GroupReader
from clla.serving.backend import (
    WRITE_LATENTS,
    LatentBackend,
    LatentStore,
    PackedAttention,
    SlidingAttention,
    WindowAttention,
    watch_inputs,
    window_backend,
)
from clla.serving.block_size import EXACT_BLOCK, Window, blocks_alone, latent_block
from clla.serving.pipeline_parallel import Stage
from clla.serving.startup_check import check_one_layer

CODEC, SOURCE = "codec.", "source."
GPU_ROWS = 1 << 20  # rows that are read at once on a GPU, where they are not unpacked


class CllaForCausalLM(nn.Module, SupportsPP):
    """The source model as vLLM builds it, its attention layers on latents; of a pipeline rank, its layers and groups.

    Args:
        vllm_config: of the engine.
        prefix: of the engine's names of layers.

    Raises:
        UnsupportedModelError: vLLM's class for the source computes its attention otherwise.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        pipeline = get_pp_group()
        stage = Stage.of(vllm_config.model_config.hf_config, pipeline.rank_in_group, pipeline.world_size)
        config = stage.config
        spec = config.spec
        self.config, self.stage = config, stage
        self.source = init_vllm_registered_model(
            vllm_config, prefix=maybe_prefix(prefix, "source"), hf_config=config.text_config
        )
        self.codec = CodecModule(config).requires_grad_(False)
        layers = {extract_layer_index(m.layer_name): m for m in self.source.modules() if isinstance(m, Attention)}
        _check_layers(layers, spec, config.text_config)
        kept = [layers.pop(i) for i in spec.kept_layers]
        first, name = layers[min(layers)], maybe_prefix(prefix, f"latents.{stage.rank}")  # the engine wants a number
        rope = rope_of_config(config.text_config, spec.rope, vllm_config.model_config.dtype)
        heads = own_heads(spec.heads, first.num_kv_heads)
        self.groups = readers(spec, self.codec, rope, heads, first.num_heads)
        self._rotary = _rotary(self.source, first)
        windows = _windows(spec, first, stage.layers, kept) if self.groups[0].reads_exact else []
        block, shares = latent_block(stage.row_bytes, windows)
        in_flight, longest = vllm_config.max_in_flight_tokens, vllm_config.model_config.max_model_len
        alone = blocks_alone(windows, shares, block, longest, in_flight)
        self.latents = LatentStore(name, self.groups, stage.row_bytes, block, alone, vllm_config)
        backend = window_backend(spec.sinks, vllm_config)
        for group in self.groups:
            names = [layers[i].layer_name for i in group.layers]
            for i in group.layers:
                layer = layers[i]
                if windows:
                    layer.impl = WindowAttention(layer.impl, i, group, names, name)
                    layer.attn_backend, layer.sliding_window = backend, windows[0].tokens
                else:
                    layer.impl = PackedAttention(layer.impl, i, group)
                    layer.attn_backend, layer.kv_sharing_target_layer_name = LatentBackend, name
        backend = window_backend(0, vllm_config)
        for layer in kept:
            layer.impl, layer.attn_backend = SlidingAttention(layer.impl, layer.sliding_window), backend
        if self.groups[0].from_input:
            splits = vllm_config.compilation_config.splitting_ops
            if splits and WRITE_LATENTS not in splits:  # graphs are recorded between these operations
                splits.append(WRITE_LATENTS)
            for number, group in enumerate(self.groups):
                projection = _projection(self.source, layers[group.layers[0]], config.text_config)
                watch_inputs(projection, self.latents, number)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """[T, h] of token ids [T]."""
        return self.source.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states [T, h] of the flat batch; what the next pipeline rank needs where this is not the last."""
        return self.source(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    def make_empty_intermediate_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Buffers for what comes from the pipeline rank before."""
        return self.source.make_empty_intermediate_tensors(*args, **kwargs)

    def compute_logits(self, hidden_states: Tensor) -> Any:
        """Logits [T, V]."""
        return self.source.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Hand the source's weights to the engine's class and keep the codec's; names of all that were loaded."""
        codec: dict[str, Tensor] = {}

        def of_source() -> Iterable[tuple[str, Tensor]]:
            for name, weight in weights:
                if name.startswith(CODEC):
                    if own := self.stage.own_weight(name.removeprefix(CODEC)):
                        codec[own] = weight
                else:
                    yield name.removeprefix(SOURCE), weight

        loaded = {SOURCE + name for name in self.source.load_weights(of_source())}
        self.codec.load_state_dict(codec)
        spec = self.config.spec
        check_one_layer(self.groups[0], spec.groups[0], spec, self._rotary, EXACT_BLOCK)
        return loaded | {CODEC + name for name in codec}


def readers(
    spec: CacheSpec, codec: CodecModule, rope: Rope | None, heads: list[int], query_heads: int
) -> list[GroupReader]:
    """Readers of all layer groups, their rows side by side; arguments as of `GroupReader`."""
    weight = next(codec.parameters())
    rank = max(layout_of(group).rank for group in spec.groups)
    most_rows = GPU_ROWS if weight.is_cuda else HELD_BYTES // (rank * weight.itemsize)
    found: list[GroupReader] = []
    for group, module in zip(spec.groups, codec.groups, strict=True):
        kind = DecoupledReader if group.rope_pairs else GroupReader
        start = found[-1].stop if found else 0
        found.append(kind(group, spec, start, module, rope, heads, query_heads, most_rows))
    return found


def _windows(spec: CacheSpec, first: Attention, count: list[int], kept: list[Attention]) -> list[Window]:
    """Windows of exact tokens: of the layers on latents, then of those that are left alone.

    Args:
        spec: of the cache.
        first: any layer on latents.
        count: how many of them each pipeline rank has.
        kept: layers that are left alone.
    """
    # What waits for its block to leave the window is exact, too. For sinks alone the window is the least with which the
    # engine finds prefixes again.
    tokens = spec.exact_slots or 2
    found = [Window.of(first, count, tokens, spec.sinks)]
    for size in sorted({layer.sliding_window for layer in kept}):
        alike = [layer for layer in kept if layer.sliding_window == size]
        found.append(Window.of(alike[0], [len(alike)], size))
    return found


def _beside(source: nn.Module, attention: Attention, kind: type[nn.Module]) -> list[nn.Module]:
    """Modules of some kind that belong to the same module as an attention layer."""
    parents = [m for m in source.modules() if any(child is attention for child in m.children())]
    return [child for m in parents for child in m.children() if isinstance(child, kind)]


def _rotary(source: nn.Module, attention: Attention) -> Any:
    """The engine's module that rotates queries and keys of an attention layer; None where there is none of its own."""
    found = _beside(source, attention, RotaryEmbeddingBase)
    found = found or [m for m in source.modules() if isinstance(m, RotaryEmbeddingBase)]
    return found[0] if found else None


def _projection(source: nn.Module, attention: Attention, text: Any) -> nn.Module:
    """The projection to queries, keys and values of an attention layer: what it gets is the attention's input.

    Raises:
        UnsupportedModelError: there is not just one.
    """
    found = _beside(source, attention, QKVParallelLinear)
    if len(found) != 1:
        raise UnsupportedModelError(
            f"vLLM computes queries, keys and values of {text.model_type!r} models by {len(found)} projections",
            expected="one, whose input is what latents are made of (plan.latent_input: first_layer)",
            remedy="convert with --latent-input all_layers, or run it with transformers: clla generate",
        )
    return found[0]


def own_heads(kv_heads: int, per_rank: int) -> list[int]:
    """Which of the model's key-value heads this tensor-parallel rank has."""
    ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    if ranks <= kv_heads:
        return list(range(rank * per_rank, (rank + 1) * per_rank))
    return [rank * kv_heads // ranks]


def rope_of_config(text: Any, settings: dict[str, Any] | None, dtype: torch.dtype) -> Rope | None:
    """Rotations of a model of which there is only the config, as transformers makes them.

    Args:
        text: the source's config.
        settings: `rope` of the config's `clla` block.
        dtype: in which the model computes.
    """
    if settings is None:
        return None
    with torch.device("meta"):  # a skeleton without weights tells which module it is
        skeleton = rotary_module(AutoModelForCausalLM.from_config(text))
    assert skeleton is not None, "keys are rotated"
    return rope_with(type(skeleton)(config=text), settings, dtype=dtype)


def _check_layers(layers: dict[int, Attention], spec: CacheSpec, text: Any) -> None:
    """Refuse attention that is more than a softmax over keys."""
    kind, every = text.model_type, layers.values()
    wanted = {i for group in spec.groups for i in group.layers}
    on_latents = [layers[i] for i in wanted & layers.keys()]
    per_rank = max(1, spec.heads // get_tensor_model_parallel_world_size())
    kept = [layers[i] for i in layers.keys() - wanted]
    reasons = {
        "some of its layers keep a state": bool(set(spec.kept_layers) - layers.keys()),
        "its layers are not those of the checkpoint": layers.keys() - wanted != set(spec.kept_layers),
        "its logits are soft-capped": any(getattr(m.impl, "logits_soft_cap", None) for m in every),
        "its attention has position biases (ALiBi)": any(
            getattr(m.impl, "alibi_slopes", None) is not None for m in every
        ),
        "its softmax has sinks of its own": any(m.has_sink for m in every),
        "its layers have sliding windows": any(m.sliding_window is not None for m in on_latents),
        "layers that are left alone have no sliding window": any(m.sliding_window is None for m in kept),
        "its keys and values have different sizes": any(m.head_size != m.head_size_v for m in every),
        "its heads are not those of the checkpoint": any(
            (m.head_size, m.num_kv_heads) != (spec.head_dim, per_rank) for m in on_latents
        ),
    }
    for reason in (reason for reason, found in reasons.items() if found):
        raise UnsupportedModelError(
            f"vLLM cannot serve this {kind!r} model on a compressed cache: {reason}",
            expected="ordinary attention in all layers",
            remedy="run it with transformers: clla generate",
        )
