"""The compressed cache: sinks and the newest tokens exact, everything older as packed latents.

Shape legend: B sequences, T tokens, H key-value heads, d head dim, n = 2·H·d, G layers of a group,
r rank, N bytes of a packed row, K rows kept, C = window + flush_block - 1 slots of the exact buffer, S sinks.

Slots count tokens as they came, padding included; a token's position is its slot minus an offset per
sequence. The newest slots are exact. When a layer group's last layer has run and the buffer is full,
the oldest exact tokens are encoded and leave it, `flush_block` at a time. Sinks are the first S tokens
of each sequence that are no padding; they stay exact wherever they lie.

With a `capacity` a group keeps at most so many rows: when more have come, those that the newest queries look
at least are dropped (`evict_clla.py`). Rows stay in the order of their slots, padding leaves first, so the
kept rows are masked like the last K slots before the exact ones.

What is kept carries no gradient: a loss reaches the decoder and the tokens of its own forward pass.
"""

from dataclasses import dataclass
from typing import Any, Callable, Optional

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from .evict_clla import best, observed_weight
from .quantize_clla import RowLayout
from .rotary_clla import Rope, Rotation
from .timeline_clla import Timeline


@dataclass
class _Storage:
    """What one layer group keeps between forward passes.

    Attributes:
        rows: [B, K, N] uint8, packed latents; K = encoded slots unless some were evicted.
        exact: [G, B, 2H, C, d], newest keys (after RoPE) and values.
        sink: [G, B, 2H, S, d].
        pending: [B, C, N] rows of the exact tokens (`first` only, else [B, 0, N]).
        positions: [B, K] int32, of the rows (with a capacity only, else [B, 0]).
        score: [B, K + …] half, attention that rows and the next to join them got since rows last joined.
    """

    rows: Tensor
    exact: Tensor
    sink: Tensor
    pending: Tensor
    positions: Tensor
    score: Tensor


class LatentGroup:
    """Storage of one layer group.

    Args:
        spec: `layers` and `tier_bits` of the group.
        settings: the config's `clla` block (window, sinks, flush_block, tier_size, source, kv, …).
        codec: module with `encoder`, `offset`, `decoder`, `mean` (see `clla.artifacts.GroupCodec`).
        timeline: shared slots and positions.
    """

    def __init__(self, spec: "dict[str, Any]", settings: "dict[str, Any]", codec: Any, timeline: Timeline) -> None:
        self.layers = list(spec["layers"])
        self.layout = RowLayout(tuple(spec["tier_bits"]), settings["tier_size"])
        self.window, self.sinks, self.block = settings["window"], settings["sinks"], settings["flush_block"]
        self.first = settings["source"] == "first"
        self.capacity: Optional[int] = settings.get("capacity")
        self.heads, self.head_dim = settings["kv"]["num_key_value_heads"], settings["kv"]["head_dim"]
        self.storage_dtype = getattr(torch, settings["kv_dtype"])
        self.codec, self.timeline = codec, timeline
        self.reset()

    def reset(self) -> None:
        self.held: Optional[_Storage] = None
        self.encoded = 0  # slots that left the exact buffer
        self.evicted = 0  # how many of them are no longer kept
        self._judged = 0  # `encoded` when rows were last judged
        self.filled = 0  # slots in `exact`
        self._incoming: dict[int, Tensor] = {}  # layer -> [B, 2H, T, d] of this forward pass
        self._incoming_rows: Optional[Tensor] = None  # [B, T, N] of this forward pass (`first` only)
        self._latents: Optional[Tensor] = None  # unpacked, for the layers of one forward pass
        self._turns: Optional[Rotation] = None  # rotation of the rows, likewise

    @property
    def strict(self) -> bool:
        """No exact window at all: even the current tokens are read from their latents."""
        return self.window == 0

    @torch.no_grad()
    def observe(self, hidden: Tensor) -> None:
        """Take the first layer's attention input [B, T, h] (`first` source) and encode it."""
        held = self._storage(hidden)
        rows = self.layout.pack(encode(hidden.to(held.rows.device), self.codec))
        if self.strict:
            self.encoded += rows.shape[1]
            held.rows = torch.cat((held.rows, rows), dim=1)
        else:
            self._incoming_rows = rows

    def update(self, keys: Tensor, values: Tensor, layer: int) -> "tuple[Tensor, Tensor]":
        """Store one layer's new keys (after RoPE) and values [B, H, T, d]; return all it may attend to."""
        held = self._storage(keys)
        index = self.layers.index(layer)
        new = torch.cat((keys, values), dim=1).to(held.rows.device)  # [B, 2H, T, d]
        if self.strict:
            self._capture_sinks(held, index, new, self.timeline.length, new.shape[2])
            both = self._decode(held, index, keys.dtype)
        else:
            self._incoming[layer] = new
            parts = [self._decode(held, index, keys.dtype)] if held.rows.shape[1] else []
            both = torch.cat([*parts, held.exact[index, :, :, : self.filled].to(keys.dtype), new], dim=2)
        if layer == self.layers[-1]:
            self._latents = self._turns = None
            if not self.strict:
                self._settle(held)
        both = both.to(keys.device)
        return both[:, : self.heads], both[:, self.heads :]

    def _decode(self, held: _Storage, index: int, dtype: torch.dtype) -> Tensor:
        """Keys after RoPE and values of all rows, [B, 2H, K, d]; sinks put in their places."""
        if self._latents is None:
            self._latents = self.layout.unpack(held.rows, self.codec.decoder.dtype)
            if self.capacity is None:
                self._turns = self.timeline.rotation(0, self.encoded)
            else:
                self._turns = self.timeline.rotation_at(held.positions)
        both = decode(self._latents, self.codec, index, self._turns, self.heads, dtype, layer=self.layers[index])
        reach = min(both.shape[2], self.timeline.max_padding + self.sinks)
        if reach and self.sinks:
            order = torch.arange(reach, device=both.device) - self._padding_kept[:, None]  # [B, reach]
            sink = held.sink[index].to(dtype).gather(2, self._spread(order, self.sinks))
            is_sink = ((order >= 0) & (order < self.sinks))[:, None, :, None]
            both = torch.cat((torch.where(is_sink, sink, both[:, :, :reach]), both[:, :, reach:]), dim=2)
        return both

    @torch.no_grad()
    def _settle(self, held: _Storage) -> None:
        """After the group's last layer: encode what leaves the window, keep the rest exact."""
        total = self.filled + self._incoming[self.layers[-1]].shape[2]
        leaving = leaving_slots(total, self.window, self.block)
        if leaving:
            self._flush(held, leaving, total)
        else:
            for index, layer in enumerate(self.layers):
                held.exact[index, :, :, self.filled : total] = self._incoming[layer].to(self.storage_dtype)
            if self._incoming_rows is not None:
                held.pending[:, self.filled : total] = self._incoming_rows
        self.filled = total - leaving
        self._incoming, self._incoming_rows = {}, None

    def _flush(self, held: _Storage, leaving: int, total: int) -> None:
        gone: dict[int, Tensor] = {}
        for index, layer in enumerate(self.layers):
            recent = held.exact[index, :, :, : self.filled]
            recent = torch.cat((recent, self._incoming[layer].to(self.storage_dtype)), dim=2)
            self._capture_sinks(held, index, recent, self.encoded, leaving)
            held.exact[index, :, :, : total - leaving] = recent[:, :, leaving:]
            gone[layer] = recent[:, :, :leaving]
        if self._incoming_rows is None:
            rotation = self.timeline.rotation(self.encoded, self.encoded + leaving)
            inputs = before_rope(gone, rotation, self.heads)
            rows = self.layout.pack(encode(inputs, self.codec))
        else:
            recent_rows = torch.cat((held.pending[:, : self.filled], self._incoming_rows), dim=1)
            held.pending[:, : total - leaving] = recent_rows[:, leaving:]
            rows = recent_rows[:, :leaving]
        held.rows = torch.cat((held.rows, rows), dim=1)
        if self.capacity is not None:
            positions = self.timeline.positions(self.encoded, self.encoded + leaving).to(rows.device, torch.int32)
            held.positions = torch.cat((held.positions, positions.expand(len(rows), -1)), dim=1)
        self.encoded += leaving

    @property
    def _padding_kept(self) -> Tensor:
        """[B] padded slots that still have a row; they are the first rows."""
        return (self._padding - self.evicted).clamp(min=0)

    @property
    def _padding(self) -> Tensor:
        """[B] padded slots before each sequence's first token, where the group is."""
        return self.timeline.padding.to(self.codec.encoder.device)

    @torch.no_grad()
    def watch(self, query: Tensor, key: Tensor, scaling: float) -> None:
        """Note how much the newest queries [B, H_q, T, d] of one layer look at each row [B, H, S, d]."""
        assert self.held is not None and self.capacity is not None
        reach = self.encoded - self.evicted + self.block  # no more than these can be rows when one is dropped
        weight = observed_weight(query, key, scaling, self.block, self._padding_kept)[:, :reach].to(
            self.held.score.dtype
        )
        score = self.held.score
        grown = weight.shape[1] - score.shape[1]
        self.held.score = nn.functional.pad(score, (0, max(0, grown))) + nn.functional.pad(weight, (0, max(0, -grown)))

    def evict(self) -> None:
        """After a forward pass: drop the rows beyond the capacity that were looked at least."""
        held = self.held
        if held is None or self.capacity is None:
            return
        if self.encoded == self._judged:
            return  # no row has joined
        excess = held.rows.shape[1] - self.capacity
        if excess > 0:
            if held.score.shape[1] == 0:
                raise ValueError("this model computes its attention where it cannot be observed: convert without evict")
            score = held.score[:, : held.rows.shape[1]].float()
            stay = best(score, self.capacity, self._padding_kept, self.sinks)
            held.rows = held.rows.gather(1, stay[:, :, None].expand(-1, -1, held.rows.shape[2]))
            held.positions = held.positions.gather(1, stay)
            self.evicted += excess
        # Zeros rather than nothing, so that the cache has the same size between evictions.
        held.score, self._judged = held.score.new_zeros(held.rows.shape[:2]), self.encoded

    @torch.no_grad()
    def _capture_sinks(self, held: _Storage, index: int, recent: Tensor, start: int, count: int) -> None:
        """Keep those of the slots [start, start + count) exact that are a sequence's first tokens."""
        if start >= self.timeline.max_padding + self.sinks:
            return
        order = torch.arange(self.sinks, device=recent.device) + self._padding[:, None] - start  # [B, S]
        inside = ((order >= 0) & (order < count))[:, None, :, None]
        found = recent.gather(2, self._spread(order, count)).to(self.storage_dtype)
        held.sink[index] = torch.where(inside, found, held.sink[index])

    def _spread(self, order: Tensor, count: int) -> Tensor:
        """Indices [B, T], clamped to `count`, for gathering along the tokens of [B, 2H, count, d]."""
        return order.clamp(0, count - 1)[:, None, :, None].expand(-1, 2 * self.heads, -1, self.head_dim)

    def _storage(self, like: Tensor) -> _Storage:
        """The tensors kept, allocated at the first token beside the codec (layers may lie on several devices)."""
        if self.held is None:
            batch, slots, row = like.shape[0], exact_slots(self.window, self.block), self.layout.row_bytes
            home = self.codec.encoder.device

            def zeros(slots: int) -> Tensor:
                shape = (len(self.layers), batch, 2 * self.heads, slots, self.head_dim)
                return torch.zeros(*shape, dtype=self.storage_dtype, device=home)

            self.held = _Storage(
                rows=torch.empty(batch, 0, row, dtype=torch.uint8, device=home),
                exact=zeros(slots),
                sink=zeros(self.sinks),
                pending=torch.zeros(batch, slots if self.first else 0, row, dtype=torch.uint8, device=home),
                positions=torch.zeros(batch, 0, dtype=torch.int32, device=home),
                score=torch.zeros(batch, 0, dtype=torch.float16, device=home),
            )
        return self.held

    def crop(self, length: int) -> None:
        self.filled = max(0, min(self.filled, length - self.encoded))
        if self.held is not None and length < self.encoded:
            if self.evicted:
                raise ValueError("tokens were evicted meanwhile: the cache can only go back within its exact window")
            self.encoded = length
            self.held.rows = self.held.rows[:, :length].clone()
            self.held.positions = self.held.positions[:, :length].clone()
            self.held.score = self.held.score[:, :length].clone()

    def rebatch(self, select: Callable[..., Tensor]) -> None:
        held = self.held
        if held is not None:
            self.held = _Storage(
                rows=select(held.rows),
                exact=select(held.exact, 1),
                sink=select(held.sink, 1),
                pending=select(held.pending),
                positions=select(held.positions),
                score=select(held.score),
            )

    def tensors(self) -> "list[Tensor]":
        return list(vars(self.held).values()) if self.held is not None else []


class CllaLayer(CacheLayerMixin):
    """One layer's view of its group, as `transformers` expects it."""

    is_sliding = False
    is_croppable = True  # what was encoded meanwhile stays encoded (see `CllaCache.crop`)

    def __init__(self, group: LatentGroup, layer: int) -> None:
        super().__init__()
        self.group, self.layer, self.seen = group, layer, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> "tuple[Tensor, Tensor]":
        self.is_initialized = True
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
    """

    def __init__(self, config: Any, codec: Any, rope: Optional[Rope]) -> None:
        settings = config.clla
        self.codec = codec
        self.timeline = Timeline(rope)
        self.groups = [
            LatentGroup(spec, settings, module, self.timeline)
            for spec, module in zip(settings["groups"], codec.groups, strict=True)
        ]
        kept = DynamicCache(config=config.text_config).layers if settings["kept_layers"] else []
        self.kept: dict[int, Any] = {i: kept[i] for i in settings["kept_layers"]}
        layers: dict[int, Any] = dict(self.kept)
        layers.update({i: CllaLayer(group, i) for group in self.groups for i in group.layers})
        self.group_of_layer = {i: group for group in self.groups for i in group.layers}
        super().__init__(layers=[layers[i] for i in sorted(layers)])

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, plain: Callable[[], Tensor]
    ) -> Tensor:
        """Let the layer's group see the queries; the attention itself is the model's (see `observe_clla.py`)."""
        if layer_idx in self.group_of_layer:
            self.group_of_layer[layer_idx].watch(query, key, scaling)
        return plain()

    def end(self) -> None:
        """After a forward pass: drop what was only needed during it."""
        self.timeline.end()
        for group in self.groups:
            group.evict()
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


def exact_slots(window: int, block: int) -> int:
    """Slots of the exact buffer: the window, and what may gather until a whole block leaves it."""
    return window + block - 1 if window else 0


def leaving_slots(total: int, window: int, block: int) -> int:
    """How many of `total` exact slots are encoded: whole blocks, once window and one block are full."""
    return (total - window) // block * block if total >= window + block else 0


def encode(x: Tensor, codec: Any) -> Tensor:
    """Latents (x - offset) Eᵀ, [..., r], of a group's inputs. The difference is taken in fp32."""
    return nn.functional.linear((x.float() - codec.offset.float()).to(codec.encoder.dtype), codec.encoder)


def decode(
    latents: Tensor,
    codec: Any,
    index: int,
    rotation: Optional[Rotation],
    heads: int,
    dtype: torch.dtype,
    *,
    layer: int,
) -> Tensor:
    """Keys after RoPE and values [B, 2H, T, d] of the model's `layer`, number `index` of its group, from [B, T, r]."""
    flat = nn.functional.linear(latents, codec.decoder[index], codec.mean[index])  # [B, T, n]
    both = flat.to(dtype).unflatten(-1, (2 * heads, -1)).transpose(1, 2)
    if rotation is None:
        return both
    keys = rotation.rotate(both[:, :heads], layer)
    return torch.cat((keys.to(dtype), both[:, heads:]), dim=1)


def before_rope(layers: "dict[int, Tensor]", rotation: Optional[Rotation], heads: int) -> Tensor:
    """Keys before RoPE and values of a group's layers, [B, T, n·G] in fp32, from [B, 2H, T, d] each after RoPE."""
    parts = []
    for layer, both in layers.items():
        keys, values = both[:, :heads].float(), both[:, heads:].float()
        if rotation is not None:
            keys = rotation.unrotate(keys, layer)
        parts.append(torch.cat((keys, values), dim=1).transpose(1, 2).flatten(2))
    return torch.cat(parts, dim=-1)
