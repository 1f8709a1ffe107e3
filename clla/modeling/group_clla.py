"""What one layer group keeps of its tokens: sinks and the newest exact, everything older as packed latents.

Two ways to read it. `update` alone hands all keys and values to the model's own attention, decoded: right for every
architecture, and what prompts take. With `attend` few queries read the latents themselves (`attention_clla.py`), where
the model's attention is an ordinary one; new tokens are then written to the exact buffer at once.

Exact slots are allocated as tokens come, so that a short text takes no more than in the source's cache
(`exact_layout`). What a forward pass leaves behind is stored when it has ended (`settle`). Until then tensors that are
kept are only replaced, or written to where no token is, so that `restore` takes back a pass that failed.

Shape legend: B sequences, T tokens, H key-value heads, d head dim, n = 2·H·d, G layers of a group, r rank,
N bytes of a packed row, R rows there is room for, K rows kept, S slots for sinks, C slots for the newest tokens.
"""

from dataclasses import dataclass, replace
from typing import Any, Callable, NamedTuple, Optional

import torch
from torch import Tensor, nn

from .attention_clla import Buckets, LatentRows, judging_rank, rows_in_full
from .codec_clla import before_rope, decode, encode
from .pack_triton_clla import packed
from .positions_clla import Timeline, keeping
from .quantize_clla import layout_of
from .rotary_clla import Rotation
from .rows_clla import Workspace, reading_mode
from .sizes_clla import exact_layout, exact_slots, leaving_slots
from .spec_clla import CacheSpec, GroupSpec
from .triton_clla import on_gpu
from .unpack_triton_clla import make_tables


@dataclass
class _Storage:
    """What one layer group keeps between forward passes.

    Attributes:
        rows: [B, R, N] uint8, packed latents; the first K of them are in use.
        exact: [G, B, 2H, S + C, d], keys (after RoPE) and values: first the sinks, then the newest tokens.
        pending: [B, C, N] rows of the newest tokens (`first` only, else [B, 0, N]).
    """

    rows: Tensor
    exact: Tensor
    pending: Tensor


class Step(NamedTuple):
    """A forward pass of few tokens that reads latents.

    Attributes:
        slots: [T] int64, where in `exact` the new tokens go.
        bias: [B or 1, T, S + C] fp32, -inf at what of `exact` each of them may not look at, else 0.
        hidden: [B] int32, rows that nobody may look at.
        used: [1] int32, rows that hold a token; None where all do.
    """

    slots: Tensor
    bias: Tensor
    hidden: Tensor
    used: "Optional[Tensor]"


class LatentGroup:
    """Storage of one layer group.

    Args:
        group: its layers and the widths of its latent.
        spec: of the whole cache.
        codec: module with `encoder`, `offset`, `decoder`, `mean` (see `clla.artifacts.GroupCodec`).
        timeline: shared slots and positions.
        max_cache_len: tokens that are allocated for at once, and never more; None to grow as they come.
    """

    def __init__(
        self,
        group: GroupSpec,
        spec: CacheSpec,
        codec: Any,
        timeline: Timeline,
        max_cache_len: "Optional[int]",
    ) -> None:
        self.layers = list(group.layers)
        self.layout: Any = layout_of(group)
        self.window, self.sinks, self.block = spec.window, spec.sinks, spec.flush_block
        self.first, self.heads, self.head_dim = spec.from_first, spec.heads, spec.head_dim
        self.storage_dtype = getattr(torch, spec.kv_dtype)
        self.codec, self.timeline, self.max_cache_len = codec, timeline, max_cache_len
        self.reset()

    def reset(self) -> None:
        self.held: Optional[_Storage] = None
        self.encoded = 0  # slots that left the exact buffer: rows in use
        self.filled = 0  # exact slots in use, sinks not counted
        self.sink_slots = 0  # exact slots for sinks
        self.forget()

    def forget(self) -> None:
        """Drop what only one forward pass needs."""
        self._handed: Any = None  # where the tensors lie that `update` gave last
        self._step: Optional[Step] = None  # of this forward pass, if it reads latents
        self._top_k: Optional[int] = None
        self._incoming: dict[int, Tensor] = {}  # layer -> [B, 2H, T, d] of this forward pass
        self._incoming_rows: Optional[Tensor] = None  # [B, T, N] of this forward pass (`first` only)
        self._rows: Optional[LatentRows] = None  # for the layers of one forward pass
        self._rotation: Optional[Rotation] = None  # likewise
        self._moved: Optional[Tensor] = None  # exact tokens [G, B, 2H, S + C, d] that `write_back` writes

    @property
    def windowless(self) -> bool:
        """No exact window at all: even the current tokens are read from their latents."""
        return self.window == 0

    @property
    def room(self) -> int:
        """Rows that are allocated at once."""
        if self.max_cache_len is None:
            return 0
        return self.max_cache_len if self.windowless else leaving_slots(self.max_cache_len, self.window, self.block)

    @property
    def slots(self) -> int:
        """Most exact slots, sinks not counted."""
        most = exact_slots(self.window, self.block)
        return most if self.max_cache_len is None else min(most, self.max_cache_len)

    @property
    def newest_slots(self) -> int:
        """Exact slots that there are, sinks not counted."""
        return 0 if self.held is None else self.held.exact.shape[3] - self.sink_slots

    @property
    def reading(self) -> bool:
        """Whether the attention of this forward pass reads latents."""
        return self._step is not None

    def _layout(self, encoded: int, filled: int) -> "tuple[int, int]":
        """Exact slots for sinks and for the newest tokens, for given numbers of encoded and exact tokens."""
        if self.max_cache_len is not None:
            return min(self.sinks, self.room), self.slots
        return exact_layout(encoded, filled, self.window, self.sinks, self.block)

    def _hand_out(self, keys: Tensor, values: Tensor) -> "tuple[Tensor, Tensor]":
        self._handed = (_place(keys), _place(values))
        return keys, values

    def handed_out(self, keys: Tensor, values: Tensor) -> bool:
        """Whether these are the tensors that `update` gave last, untouched."""
        return self._handed == (_place(keys), _place(values))

    def state(self) -> Any:
        """What `restore` takes."""
        held = None if self.held is None else replace(self.held)
        return held, self.encoded, self.filled, self.sink_slots

    def restore(self, state: Any) -> None:
        """Be as when `state` was called."""
        step, held = self._step, self.held
        if step is not None and held is not None:  # what comes next may not meet numbers that are none
            held.exact[..., step.slots.to(held.exact.device), :] = 0
        self.forget()
        self.held, self.encoded, self.filled, self.sink_slots = state

    # One forward pass: `begin` (where latents are read), `update` and `attend` of every layer, `settle`.

    @keeping
    def observe(self, hidden: Tensor) -> None:
        """Take the first layer's attention input [B, T, h] (`first` source) and encode it."""
        held = self._storage(hidden)
        rows = self._packed(self._encode(hidden.to(held.rows.device)))
        if self.windowless:
            self._append(held, rows)
            self._resize(held, *self._layout(self.encoded, 0))
        else:
            self._incoming_rows = rows

    def _encode(self, hidden: Tensor) -> Tensor:
        """What a row holds, of attention inputs [B, T, h]."""
        return encode(hidden, self.codec)

    @keeping
    def make_room(self, count: int) -> None:
        """Before a forward pass of `count` tokens that reads latents, and writes them to the exact buffer."""
        assert self.held is not None
        self._resize(self.held, *self._layout(self.encoded, self.filled + count))

    def begin(self, step: Step, top_k: "Optional[int]", bucket: int, workspace: Workspace) -> None:
        """The next forward pass reads latents.

        Args:
            step: of the pass.
            top_k: rows that each layer reads in full: 0 for all, None for the default.
            bucket: neighbouring rows that are met with one rotation.
            workspace: of the cache.
        """
        held = self.held
        assert held is not None and not self.windowless
        rows = held.rows[:, : self.encoded] if self.max_cache_len is None else held.rows
        if self.max_cache_len is not None:  # tables made while a graph is recorded would lie in that graph's memory
            if on_gpu(rows):
                make_tables(self.layout, (self.layout.rank, judging_rank(self.layout)), rows.device)
            else:
                self.layout.unpack(rows[:, :0], self.codec.decoder.dtype)
        reach = self.timeline.max_padding + self.sinks
        turns, means = self.timeline.turns(rows.shape[1], bucket)
        buckets = Buckets(bucket, means, self.timeline.fronts) if bucket > 1 else None
        self._rows = LatentRows(
            rows, self.layout, self.codec, step.hidden, reach, turns, step.used, workspace=workspace, buckets=buckets
        )
        self._step = step
        self._top_k = rows_in_full(rows.shape[1], top_k)

    def update(self, keys: Tensor, values: Tensor, layer: int) -> "tuple[Tensor, Tensor]":
        """Take one layer's new keys (after RoPE) and values [B, H, T, d]; return all it may attend to."""
        index = self.layers.index(layer)
        if self._step is not None:  # `attend` knows where the rest is
            assert self.held is not None
            for both, new in zip(self.held.exact[index].chunk(2, dim=1), (keys, values), strict=True):
                both.index_copy_(2, self._step.slots.to(both.device), new.to(both.device, self.storage_dtype))
            return keys, values
        held = self._storage(keys)
        new = torch.cat((keys, values), dim=1).to(held.rows.device)  # [B, 2H, T, d]
        if self.windowless:
            self._capture_sinks(held.exact[index, :, :, : self.sink_slots], new, self.timeline.length)
            both = self._decode(held, index, new[:, :, :0])
        else:
            self._incoming[layer] = new
            newest = held.exact[index, :, :, self.sink_slots : self.sink_slots + self.filled].to(keys.dtype)
            both = self._decode(held, index, torch.cat((newest, new), dim=2))
        if layer == self.layers[-1]:
            self._rows = self._rotation = None
        both = both.to(keys.device)
        return self._hand_out(both[:, : self.heads], both[:, self.heads :])

    def attend(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        """Attention [B, T, H_q, d] of few queries [B, H_q, T, d] to latents and exact tokens, in one softmax."""
        with reading_mode():
            return self._attend(layer, query, scaling)

    def _attend(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        held, rows, step, index = self.held, self._rows, self._step, self.layers.index(layer)
        assert held is not None and rows is not None and step is not None
        home, dtype, tokens = query.device, query.dtype, query.shape[2]
        turned = rows.turns is not None and layer not in self.timeline.plain_layers
        query = query.to(rows.data.device).unflatten(1, (self.heads, -1)).flatten(2, 3)  # [B, H, M, d]
        bias = step.bias.to(query.device)
        out = rows.attended(query, held.exact[index], bias, index, scaling=scaling, turned=turned, most=self._top_k)
        return out.unflatten(2, (-1, tokens)).flatten(1, 2).transpose(1, 2).to(home, dtype)

    @keeping
    def settle(self) -> None:
        """After a forward pass: encode what leaves the window, keep the rest exact."""
        held, written, count = self.held, self._step is not None, self.timeline.incoming
        incoming, rows = self._incoming, self._incoming_rows
        self.forget()
        if held is None or self.windowless:
            return
        total = self.filled + count
        leaving = leaving_slots(total, self.window, self.block)
        if leaving:
            self._move(held, {} if written else incoming, rows, total, leaving)
        else:
            self._resize(held, *self._layout(self.encoded, total))
            start, stop = self.sink_slots + self.filled, self.sink_slots + total
            for index, layer in enumerate(self.layers if not written else ()):
                held.exact[index, :, :, start:stop] = incoming[layer]
            if rows is not None:
                held.pending[:, self.filled : total] = rows
        self.filled = total - leaving

    def _move(
        self, held: _Storage, incoming: "dict[int, Tensor]", incoming_rows: "Optional[Tensor]", total: int, leaving: int
    ) -> None:
        """Encode the first `leaving` of the `total` newest tokens, and put the others into their places.

        Args:
            held: the storage.
            incoming: tokens by layer that are not in the exact buffer yet.
            incoming_rows: likewise, their rows (`first` only).
            total: newest tokens.
            leaving: those of them that are encoded.
        """
        sinks, slots = self._layout(self.encoded + leaving, total - leaving)
        exact = held.exact.new_zeros(*held.exact.shape[:3], sinks + slots, self.head_dim)
        exact[:, :, :, : self.sink_slots] = held.exact[:, :, :, : self.sink_slots]
        gone: dict[int, Tensor] = {}
        for index, layer in enumerate(self.layers):
            recent = held.exact[index, :, :, self.sink_slots :][:, :, : total if not incoming else self.filled]
            if incoming:
                recent = torch.cat((recent, incoming[layer].to(self.storage_dtype)), dim=2)
            gone[layer], stay = recent[:, :, :leaving], recent[:, :, leaving:]
            self._capture_sinks(exact[index, :, :, :sinks], gone[layer], self.encoded)
            exact[index, :, :, sinks : sinks + total - leaving] = stay
        if incoming_rows is not None:
            recent_rows = torch.cat((held.pending[:, : self.filled], incoming_rows), dim=1)
            held.pending = _sized(recent_rows[:, leaving:], slots)
            rows = recent_rows[:, :leaving]
        else:
            rotation = self.timeline.rotation(self.encoded, self.encoded + leaving)
            rows = self._packed(encode(before_rope(gone, rotation, self.heads), self.codec))
        self._append(held, rows)
        self.sink_slots = sinks
        if self.max_cache_len is None:
            held.exact = exact
        else:
            self._moved = exact

    @keeping
    def write_back(self) -> None:
        """Write the exact tokens of a buffer whose place is fixed; from here on the pass cannot be taken back."""
        if self._moved is not None:
            assert self.held is not None
            self.held.exact.copy_(self._moved)
            self._moved = None

    def _resize(self, held: _Storage, sinks: int, slots: int) -> None:
        """Resize the exact buffer's slots for sinks and for the newest tokens."""
        before, newest = self.sink_slots, self.newest_slots
        if (sinks, slots) == (before, newest):
            return
        if sinks == before:
            held.exact = _sized(held.exact, sinks + slots)
        else:
            parts = _sized(held.exact[..., :before, :], sinks), _sized(held.exact[..., before:, :], slots)
            held.exact = torch.cat(parts, dim=-2)
        self.sink_slots = sinks
        if self.first:
            held.pending = _sized(held.pending, slots)

    def _decode(self, held: _Storage, index: int, newest: Tensor) -> Tensor:
        """Keys after RoPE and values [B, 2H, K + T, d]: of all rows, sinks put in their places, then the newest."""
        if not self.encoded:
            return newest
        if self._rows is None:
            data = held.rows[:, : self.encoded]
            self._rows = LatentRows(data, self.layout, self.codec, self._padding, 0)
            self._rotation = self.timeline.rotation(0, self.encoded)
        both = newest.new_empty(*newest.shape[:2], self.encoded + newest.shape[2], newest.shape[3])
        both[:, :, self.encoded :] = newest
        for start, latents in self._rows.blocks():
            stop = start + latents.shape[1]
            turn = None if self._rotation is None else self._rotation.part(start, stop)
            decoded = decode(latents, self.codec, index, turn, self.heads, newest.dtype, layer=self.layers[index])
            both[:, :, start:stop] = self._with_sinks(held, index, decoded, start)
        return both

    def _with_sinks(self, held: _Storage, index: int, both: Tensor, start: int) -> Tensor:
        """Keys and values [B, 2H, t, d] of the rows from `start` on, those of sinks exact."""
        reach = min(both.shape[2], self.timeline.max_padding + self.sink_slots - start)
        if reach <= 0 or not self.sink_slots:
            return both
        order = torch.arange(start, start + reach, device=both.device) - self._padding[:, None]  # [B, reach]
        sinks = held.exact[index, :, :, : self.sink_slots].to(both.dtype)
        sink = sinks.gather(2, self._spread(order, self.sink_slots))
        is_sink = ((order >= 0) & (order < self.sink_slots))[:, None, :, None]
        return torch.cat((torch.where(is_sink, sink, both[:, :, :reach]), both[:, :, reach:]), dim=2)

    def _packed(self, latents: Tensor) -> Tensor:
        """Rows [B, T, N] of latents [B, T, r]."""
        return packed(latents, self.layout)

    def _append(self, held: _Storage, rows: Tensor) -> None:
        """Rows [B, T, N] of the next slots join the others."""
        if self.max_cache_len is None:
            held.rows = torch.cat((held.rows, rows), dim=1)
        else:
            held.rows[:, self.encoded : self.encoded + rows.shape[1]] = rows
        self.encoded += rows.shape[1]

    @property
    def _padding(self) -> Tensor:
        """[B] padded slots before each sequence's first token, where the group is."""
        return self.timeline.padding.to(self.codec.encoder.device)

    @torch.no_grad()
    def _capture_sinks(self, sinks: Tensor, recent: Tensor, start: int) -> None:
        """Write to `sinks` [B, 2H, S, d] those of the tokens `recent` [B, 2H, T, d] that are a sequence's first.

        The tokens stand in the slots from `start` on.
        """
        slots, count = sinks.shape[2], recent.shape[2]
        if start >= self.timeline.max_padding + slots:
            return
        order = torch.arange(slots, device=recent.device) + self._padding[:, None] - start  # [B, S]
        inside = ((order >= 0) & (order < count))[:, None, :, None]
        found = recent.gather(2, self._spread(order, count)).to(self.storage_dtype)
        sinks.copy_(torch.where(inside, found, sinks))

    def _spread(self, order: Tensor, count: int) -> Tensor:
        """Indices [B, T], clamped to `count`, for gathering along the tokens of [B, 2H, count, d]."""
        return order.clamp(0, count - 1)[:, None, :, None].expand(-1, 2 * self.heads, -1, self.head_dim)

    def _storage(self, like: Tensor) -> _Storage:
        """The tensors kept, allocated at the first token beside the codec (layers may lie on several devices)."""
        if self.held is None:
            self.held = self._allocated(len(like))
        return self.held

    @keeping
    def _allocated(self, batch: int) -> _Storage:
        home, row = self.codec.encoder.device, self.layout.row_bytes
        self.sink_slots, slots = self._layout(0, 0)
        shape = (len(self.layers), batch, 2 * self.heads, self.sink_slots + slots, self.head_dim)
        held = _Storage(
            # Zeros: what is not written yet must not be NaN, even though nobody looks at it.
            rows=torch.zeros(batch, self.room, row, dtype=torch.uint8, device=home),
            exact=torch.zeros(*shape, dtype=self.storage_dtype, device=home),
            pending=torch.zeros(batch, slots if self.first else 0, row, dtype=torch.uint8, device=home),
        )
        if self.max_cache_len is not None:  # recorded graphs may read and write these where they are
            torch._dynamo.mark_static_address(held.rows)
            torch._dynamo.mark_static_address(held.exact)
        return held

    @keeping
    def crop(self, length: int) -> None:
        """Keep the first `length` tokens."""
        held = self.held
        self.filled = max(0, min(self.filled, length - self.encoded))
        if held is None:
            return
        if length < self.encoded:
            self.encoded = length
            if self.max_cache_len is None:
                held.rows = held.rows[:, :length].clone()
        self._resize(held, *self._layout(self.encoded, self.filled))

    @keeping
    def rebatch(self, select: Callable[..., Tensor]) -> None:
        """Take other sequences, as `select` does with a tensor and the number of the dimension that they are."""
        held = self.held
        if held is not None:
            self.held = _Storage(select(held.rows), select(held.exact, 1), select(held.pending))

    def tensors(self) -> "list[Tensor]":
        return list(vars(self.held).values()) if self.held is not None else []


def _place(x: Tensor) -> "tuple[int, torch.Size]":
    return x.data_ptr(), x.shape


def _sized(x: Tensor, count: int) -> Tensor:
    """The first `count` tokens of [..., T, d], copied, zeros behind them where there are fewer."""
    return nn.functional.pad(x, (0, 0, 0, count - x.shape[-2])) if count > x.shape[-2] else x[..., :count, :].clone()


def reading_tokens(heads: int, head_dim: int, query_heads: int) -> int:
    """Most tokens of one call that read latents: of more, what each query adds costs more than decoding once."""
    return heads * head_dim // query_heads
