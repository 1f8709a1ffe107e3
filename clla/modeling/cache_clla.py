"""The compressed cache, as transformers expects one: slots, positions and layers over the groups' storage.

Slots count tokens as they came, padding included; a token's position is its slot minus an offset per sequence. The
newest slots are exact. When a layer group's last layer has run and the exact buffer is full, the oldest exact tokens
are encoded and leave it, `flush_block` at a time (`group_clla.py`). Sinks are the first S tokens of each sequence
that are no padding; they stay exact wherever they lie.

With a `capacity` a group keeps at most so many rows: when more have come, those that the newest queries look
at least are dropped (`evict_clla.py`). Rows stay in the order of their slots, padding leaves first, so the
kept rows are masked like the last K slots before the exact ones.

What is kept carries no gradient: a loss reaches the decoder and the tokens of its own forward pass.
"""

from typing import Any, Callable, Optional

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from .decode_clla import Workspace
from .decoupled_clla import DecoupledGroup
from .group_clla import LatentGroup, Step, leaving_slots, reading_tokens
from .observe_clla import Attention
from .rotary_clla import Rope
from .timeline_clla import Timeline


class CllaLayer(CacheLayerMixin):
    """One layer's view of its group, as `transformers` expects it."""

    is_sliding = False
    is_croppable = True  # what was encoded meanwhile stays encoded (see `CllaCache.crop`)

    def __init__(self, group: LatentGroup, layer: int) -> None:
        super().__init__()
        self.group, self.layer, self.seen = group, layer, 0
        self.is_compileable = group.room is not None and group.capacity is None and not group.first

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> "tuple[Tensor, Tensor]":
        self.is_initialized = True
        if not self.group.timeline.incoming:
            raise ValueError(
                "keys reach the cache outside of a forward pass of the converted model: gradient checkpointing, which "
                "computes a layer again when the cache has moved on, cannot be used with it"
            )
        if not self.group.reading:  # else the cache counts, outside of what may be compiled
            self.seen += key_states.shape[-2]
        return self.group.update(key_states, value_states, self.layer)

    def get_mask_sizes(self, query_length: int) -> "tuple[int, int]":
        return self.seen - self.group.evicted + query_length, self.group.evicted

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    # The group's tensors are shared between layers, so the cache moves them itself, once a group.
    def reset(self) -> None:
        self.seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        pass

    def batch_repeat_interleave(self, repeats: int) -> None:
        pass

    def batch_select_indices(self, indices: Tensor) -> None:
        pass

    def crop(self, tokens_to_remove: int) -> None:
        self.seen = max(0, self.seen - abs(tokens_to_remove))


class CllaCache(Cache):
    """Cache of a converted model; made by the model, or by hand for several turns.

    Args:
        config: the model's `CllaConfig`.
        codec: its `codec` module (one module a layer group).
        rope: rotations of the model; None without.
        max_length: allocate for so many tokens at once, so that nothing moves as tokens come and a forward pass of
            one token can be compiled or captured; None to grow.
        select: old tokens that a layer reads in full where few queries come; the others are judged by the first
            components of their latents alone. None for all.
    """

    def __init__(
        self,
        config: Any,
        codec: Any,
        rope: Optional[Rope],
        max_length: Optional[int] = None,
        select: Optional[int] = None,
    ) -> None:
        settings = config.clla
        self.codec, self.select, self.max_length = codec, select, max_length
        self.timeline, self._workspace = Timeline(rope), Workspace()
        self.chunks: Any = None  # of a call that is cut into several (see `chunks_clla.py`)
        room = None
        if max_length is not None:
            room = leaving_slots(max_length, settings["window"], settings["flush_block"])
        self.groups = [
            (DecoupledGroup if spec.get("rope_pairs") else LatentGroup)(spec, settings, module, self.timeline, room)
            for spec, module in zip(settings["groups"], codec.groups, strict=True)
        ]
        kept = DynamicCache(config=config.text_config).layers if settings["kept_layers"] else []
        self.kept: dict[int, Any] = {i: kept[i] for i in settings["kept_layers"]}
        layers: dict[int, Any] = dict(self.kept)
        layers.update({i: CllaLayer(group, i) for group in self.groups for i in group.layers})
        self.group_of_layer = {i: group for group in self.groups for i in group.layers}
        self._ordinary: set[int] = set()  # layers whose attention may be replaced by one over latents
        self._query_heads = 0
        self._lent = False  # whether a layer without keys of its own takes those of another
        super().__init__(layers=[layers[i] for i in sorted(layers)])

    @torch.compiler.disable
    def begin(self, position_ids: Tensor, attention_mask: Optional[Tensor]) -> None:
        """Announce the tokens of the next forward pass; arguments and errors as of `Timeline.begin`."""
        for group, module in zip(self.groups, self.codec.groups, strict=True):
            group.abandon()
            group.codec = module() if any(matrix.is_meta for matrix in module.parameters()) else module  # offloaded
        self.timeline.begin(position_ids, attention_mask, left_padded=self.evicts)
        decoupled = [group for group in self.groups if isinstance(group, DecoupledGroup)]
        if decoupled:
            holes = self._has_holes(position_ids.shape[1], attention_mask)
            for group in decoupled:
                group.expect(holes, self._workspace)
        if self._may_read_latents(position_ids.shape[1], attention_mask):
            step = self._step(position_ids.shape[1], position_ids.device)
            for group in self.groups:
                group.begin(step, self.select, self._workspace)

    @property
    def reading(self) -> bool:
        """Whether the attention of this forward pass reads latents, rather than decoded keys and values."""
        return self.groups[0].reading

    def _may_read_latents(self, count: int, attention_mask: Optional[Tensor]) -> bool:
        group = self.groups[0]
        if torch.is_grad_enabled() or self._lent or self._ordinary != self.group_of_layer.keys():
            return False
        most = reading_tokens(group.heads, group.head_dim, self._query_heads)
        if count > most or group.filled + count > group.slots:
            return False
        return not self._has_holes(count, attention_mask)

    def _has_holes(self, count: int, attention_mask: Optional[Tensor]) -> bool:
        """Whether the mask hides more than the padding before each sequence."""
        if attention_mask is None:
            return False
        seen = self.timeline.length + count - self.timeline.padding
        return not torch.equal(attention_mask.sum(-1), seen.to(attention_mask.device))

    def _step(self, count: int, device: torch.device) -> Step:
        group, padding = self.groups[0], self.timeline.padding.to(device)
        if not self.timeline.max_padding:
            padding = padding[:1]
        places, own = torch.arange(group.slots, device=device), torch.arange(count, device=device) + group.filled
        sinks = torch.arange(group.sinks, device=device) + padding[:, None] < group.encoded  # [B or 1, S]
        newest = (places <= own[:, None]) & (places + group.encoded >= padding[:, None])[:, None]
        newest = newest | (places == own[:, None])  # padding sees itself, since something must be seen
        seen = torch.cat((sinks[:, None].expand(-1, count, -1), newest), dim=2)
        hidden = (self.timeline.padding.to(device) + group.sinks).clamp(max=group.encoded)
        used = None if self.max_length is None else torch.full((1,), group.kept, device=device)
        bias = torch.where(seen, 0.0, float("-inf"))[:, None, None]
        return Step(own + group.sinks, bias, hidden, used)

    # Where all layers read latents nobody uses the model's mask, so it is made for the new tokens alone.

    @property
    def maskless(self) -> bool:
        """Whether nothing looks at the model's mask in this forward pass."""
        return self.reading and not self.kept

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> "tuple[int, int]":
        return (query_length, 0) if self.maskless else super().get_mask_sizes(query_length, layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0 if self.maskless else super().get_query_offset(layer_idx)

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, plain: Callable[[], Tensor]
    ) -> Tensor:
        """Attention of one layer (see `observe_clla.py`): the model's own, or its group's over latents."""
        group = self.group_of_layer.get(layer_idx)
        if group is None:
            self._lent = self._lent or layer_idx not in self.kept
            return plain()
        if isinstance(group, DecoupledGroup):
            if not isinstance(plain, Attention) or not group.handed_out(key, value):
                raise ValueError("this model changes its keys behind its cache: convert with plan.key 'reconstruct'")
            most = reading_tokens(group.heads, group.head_dim, query.shape[1])
            return group.attend_decoupled(layer_idx, query, (key, value), plain, scaling, most)
        if group.reading:
            return group.attend(layer_idx, query, scaling)
        if group.capacity is not None:
            group.watch(query, key, scaling)
        elif isinstance(plain, Attention) and plain.ordinary and group.handed_out(key, value):
            self._ordinary.add(layer_idx)
            self._query_heads = query.shape[1]
        return plain()

    @torch.compiler.disable
    def end(self) -> None:
        """After a forward pass: drop what was only needed during it."""
        if self.reading:
            for layer in self.layers:
                if isinstance(layer, CllaLayer):
                    layer.seen += self.timeline.incoming
        for group in self.groups:
            group.settle()
        self._workspace.release()
        self.timeline.end()
        for group in self.groups:
            group.evict()
        for group, module in zip(self.groups, self.codec.groups, strict=True):
            group.codec = module
        for layer in self.kept.values():
            if getattr(layer, "keys", None) is not None:  # a sliding layer keeps a view of the whole chunk
                layer.keys, layer.values = layer.keys.detach().clone(), layer.values.detach().clone()

    @property
    def evicts(self) -> bool:
        """Whether the cache must see the queries."""
        return any(group.capacity is not None for group in self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor that is kept between forward passes, counted by storage."""
        kept = [t for layer in self.kept.values() for t in _tensors_of(layer)]
        held = kept + self.timeline.tensors() + [t for group in self.groups for t in group.tensors()]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())

    def reset(self) -> None:
        super().reset()
        self.timeline.reset()
        for group in self.groups:
            group.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens. Tokens encoded meanwhile stay encoded: the window is shorter for a while."""
        length = self.groups[0].encoded + self.groups[0].filled - abs(tokens_to_remove)
        super().crop(tokens_to_remove)
        self.timeline.crop(max(0, length))
        for group in self.groups:
            group.crop(max(0, length))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._rebatch(lambda t, dim=0: t.index_select(dim, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._rebatch(lambda t, dim=0: t.repeat_interleave(repeats, dim=dim))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        chosen = torch.arange(len(indices), device=indices.device)[indices] if indices.dtype == torch.bool else indices
        self._rebatch(lambda t, dim=0: t.index_select(dim, chosen.to(t.device)))

    def _rebatch(self, select: Callable[..., Tensor]) -> None:
        self.timeline.rebatch(select)
        for group in self.groups:
            group.rebatch(select)


def _tensors_of(layer: Any) -> "list[Tensor]":
    """Keys and values, or states, of a layer of transformers' own caches."""
    values = [v for value in vars(layer).values() for v in (value if isinstance(value, list) else [value])]
    return [value for value in values if isinstance(value, Tensor)]
