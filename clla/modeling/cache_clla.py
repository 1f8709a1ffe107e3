"""The compressed cache, as transformers expects one: slots, positions and layers over the groups' storage.

Slots count tokens as they came, padding included; a token's position is its slot minus an offset per sequence. The
newest slots are exact. When a layer group's last layer has run and the exact buffer is full, the oldest exact tokens
are encoded and leave it, `flush_block` at a time (`group_clla.py`). Sinks are the first S tokens of each sequence
that are no padding; they stay exact wherever they lie.

What is kept carries no gradient: a loss reaches the decoder and the tokens of its own forward pass.
"""

import copy
from contextlib import contextmanager
from typing import Any, Callable, Iterable, Iterator, Optional

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from .attention_clla import bias_of
from .decoupled_clla import DecoupledGroup
from .group_clla import LatentGroup, Step, reading_tokens
from .observe_clla import Attention, FoldedMask
from .positions_clla import Timeline, keeping
from .rotary_clla import Rope, bucket_length
from .rows_clla import Workspace


class CllaLayer(CacheLayerMixin):
    """One layer's view of its group, as `transformers` expects it."""

    is_sliding = False
    is_croppable = True  # what was encoded meanwhile stays encoded (see `CllaCache.crop`)

    def __init__(self, group: LatentGroup, layer: int) -> None:
        super().__init__()
        self.group, self.layer = group, layer
        self.is_compileable = group.max_cache_len is not None and not group.first

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> "tuple[Tensor, Tensor]":
        self.is_initialized = True
        if not self.group.timeline.incoming:
            raise ValueError(
                "keys reach the cache outside of a forward pass of the converted model: gradient checkpointing, which "
                "computes a layer again when the cache has moved on, cannot be used with it"
            )
        return self.group.update(key_states, value_states, self.layer)

    def get_mask_sizes(self, query_length: int) -> "tuple[int, int]":
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.group.timeline.length

    def get_max_length(self) -> int:
        return -1

    # The group's tensors are shared between layers, so the cache changes them itself, once a group.
    def reset(self) -> None:
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        pass

    def batch_repeat_interleave(self, repeats: int) -> None:
        pass

    def batch_select_indices(self, indices: Tensor) -> None:
        pass

    def crop(self, tokens_to_remove: int) -> None:
        _refuse_length(tokens_to_remove)


class CllaCache(Cache):
    """Cache of a converted model; made by the model, or by hand for several turns.

    A forward pass that fails leaves it as it was before. Layers that the source keeps and whose states change in
    place (of hybrid models) cannot go back: then every further use says so until `reset`.

    Args:
        config: the model's `CllaConfig`.
        codec: its `codec` module (one module per layer group).
        rope: rotations of the model; None without.
        max_cache_len: allocate for this number of tokens at once, so that nothing moves as tokens come and a forward
            pass of one token can be compiled or captured; None to grow.
        attend_top_k: old tokens that a layer reads in full where few queries come; the others are judged by the first
            components of their latents alone. 0 for all; None for the default, which is all on a GPU (see
            `rows_in_full`).
        rotation_bucket: neighbouring old tokens that few queries meet with one rotation, 1 for each its own; None for
            what the model's rotation allows (see `bucket_length`).
    """

    def __init__(
        self,
        config: Any,
        codec: Any,
        rope: Optional[Rope],
        max_cache_len: Optional[int] = None,
        attend_top_k: Optional[int] = None,
        rotation_bucket: Optional[int] = None,
    ) -> None:
        spec = config.spec
        self.config, self.codec, self.attend_top_k, self.most_tokens = config, codec, attend_top_k, max_cache_len
        self._bucket = rotation_bucket
        self.timeline, self._workspace = Timeline(rope), Workspace()
        self.chunks: Any = None  # of a call that is cut into several (see `chunks_clla.py`)
        self.groups = [
            (DecoupledGroup if group.rope_pairs else LatentGroup)(group, spec, module, self.timeline, max_cache_len)
            for group, module in zip(spec.groups, codec.groups, strict=True)
        ]
        self.kept = self._new_layers(spec.kept_layers)
        layers: dict[int, Any] = dict(self.kept)
        layers.update({i: CllaLayer(group, i) for group in self.groups for i in group.layers})
        self.group_of_layer = {i: group for group in self.groups for i in group.layers}
        self._ordinary: set[int] = set()  # layers whose attention may be replaced by one over latents
        self._query_heads = 0
        self._lent = False  # whether a layer without keys of its own takes those of another
        self._before: Any = None  # what was kept before the forward pass that runs
        self._mask: "Optional[tuple[Tensor, FoldedMask]]" = None  # of this forward pass, as it came and as it is taken
        self._torn = False  # whether a forward pass failed that cannot be taken back
        super().__init__(layers=[layers[i] for i in sorted(layers)])

    @keeping
    def __deepcopy__(self, memo: "dict[int, Any]") -> "CllaCache":
        """A cache that goes on by itself, of the same model: config and codec are shared."""
        memo.update({id(part): part for part in (self.config, *self.codec.modules())})
        memo[id(self)] = twin = copy.copy(self)
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def check(self, batch: int, count: int, position_ids: Optional[Tensor], attention_mask: Optional[Tensor]) -> None:
        """Whether `count` more tokens of `batch` sequences can come, with these positions and this mask.

        Raises:
            ValueError: they cannot; the cache has not changed.
        """
        self.check_whole()
        past, held = self.get_seq_length(), self.timeline.batch
        if count == 0:
            raise ValueError("the input holds no tokens; at least one is expected")
        if held is not None and held != batch:
            raise ValueError(
                f"the cache holds {held} sequences of {past} tokens, the input has {batch} sequences: pass as many, "
                "or a new cache (batch_repeat_interleave and batch_select_indices change the sequences of this one)"
            )
        if self.most_tokens is not None and past + count > self.most_tokens:
            raise ValueError(
                f"the cache was made for {self.most_tokens} tokens and holds {past}, {count} more do not fit: make "
                "it with a larger max_cache_len"
            )
        if position_ids is not None and tuple(position_ids.shape) not in ((batch, count), (1, count)):
            raise ValueError(
                f"position_ids are {list(position_ids.shape)}; [{batch}, {count}] is expected, one for each new token"
            )
        if attention_mask is not None and tuple(attention_mask.shape) != (batch, past + count):
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)}; [{batch}, {past + count}] is expected: one number "
                f"for each of the {past} tokens in the cache and the {count} new ones"
            )

    def check_whole(self) -> None:
        """Whether the cache can be used.

        Raises:
            ValueError: a forward pass failed and could not be taken back.
        """
        if self._torn:
            raise ValueError(
                "a forward pass failed that could not be taken back, so this cache holds a part of its tokens: call "
                "reset() and give it all tokens, or make a new cache"
            )

    @torch.compiler.disable
    def unsee(self) -> None:
        """Say that no attention of the next forward pass can be observed, so that it cannot read latents."""
        self._ordinary.clear()

    @torch.compiler.disable
    def begin(self, position_ids: Tensor, attention_mask: Optional[Tensor]) -> None:
        """Announce the tokens of the next forward pass.

        Args:
            position_ids: [B, T].
            attention_mask: [B, length + T] of zeros and ones, or None for no padding.

        Raises:
            ValueError: as of `check` and `Timeline.begin`; the cache has not changed.
        """
        batch, count = position_ids.shape
        self.check(batch, count, position_ids, attention_mask)
        if self._before is not None:
            self.abandon()
        self._before = self._state()
        try:
            for group, module in zip(self.groups, self.codec.groups, strict=True):
                group.codec = module() if any(matrix.is_meta for matrix in module.parameters()) else module  # offloaded
            self.timeline.begin(position_ids, attention_mask)
            for group in self.groups:
                if isinstance(group, DecoupledGroup):
                    group.expect(self.timeline.holes, self._workspace)
            if self._may_read_latents(count):
                for group in self.groups:
                    group.make_room(count)
                step, bucket = self._step(count, position_ids.device), self._rotation_bucket()
                for group in self.groups:
                    group.begin(step, self.attend_top_k, bucket, self._workspace)
        except BaseException:
            self._restore()
            raise

    @contextmanager
    def forward_pass(self) -> "Iterator[None]":
        """Within it the tokens that `begin` announced run through the model.

        If that fails the cache is as before. A text that comes in several passes keeps those that have ended.
        """
        try:
            yield
            self.end()
        except BaseException:
            self.abandon()
            raise

    @torch.compiler.disable
    def abandon(self) -> None:
        """Take back the forward pass that runs: be as before `begin`."""
        if self._before is None:
            return
        self._restore()
        if self.timeline.length and any(hasattr(layer, "conv_states") for layer in self.kept.values()):
            self._torn = True  # these and recurrent ones are changed where they are

    def _state(self) -> Any:
        kept = {i: {name: _copied(value) for name, value in vars(layer).items()} for i, layer in self.kept.items()}
        return self.timeline.state(), [group.state() for group in self.groups], kept

    def _restore(self) -> None:
        (timeline, groups, kept), self._before = self._before, None
        self._mask = None
        self.timeline.restore(timeline)
        self._workspace.release()
        for group, module, state in zip(self.groups, self.codec.groups, groups, strict=True):
            group.codec = module
            group.restore(state)
        self._set_kept(kept)

    def _new_layers(self, indices: "Iterable[int]") -> "dict[int, Any]":
        """The source's own cache layers of some of its layers, empty."""
        indices = list(indices)
        layers = DynamicCache(config=self.config.text_config).layers if indices else []
        return {i: layers[i] for i in indices}

    def _set_kept(self, states: "dict[int, dict[str, Any]]") -> None:
        for i, state in states.items():
            vars(self.kept[i]).clear()
            vars(self.kept[i]).update(state)

    @property
    def reading(self) -> bool:
        """Whether the attention of this forward pass reads latents, rather than decoded keys and values."""
        return self.groups[0].reading

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of each sequence that have come, padding included."""
        return self.timeline.length

    def _may_read_latents(self, count: int) -> bool:
        group = self.groups[0]
        if torch.is_grad_enabled() or self._lent or self._ordinary != self.group_of_layer.keys():
            return False
        most = reading_tokens(group.heads, group.head_dim, self._query_heads)
        if count > most or group.filled + count > group.slots:
            return False
        return not self.timeline.holes

    def _rotation_bucket(self) -> int:
        if self._bucket is None:
            self._bucket = bucket_length(self.timeline.rope, self.groups[0].head_dim)
        return self._bucket

    def _step(self, count: int, device: torch.device) -> Step:
        group, padding = self.groups[0], self.timeline.padding.to(device)
        if not self.timeline.max_padding:
            padding = padding[:1]
        places, own = torch.arange(group.newest_slots, device=device), torch.arange(count, device=device) + group.filled
        sinks = torch.arange(group.sink_slots, device=device) + padding[:, None] < group.encoded  # [B or 1, S]
        newest = (places <= own[:, None]) & (places + group.encoded >= padding[:, None])[:, None]
        newest = newest | (places == own[:, None])  # padding sees itself, since something must be seen
        seen = torch.cat((sinks[:, None].expand(-1, count, -1), newest), dim=2)
        hidden = (self.timeline.padding.to(device) + group.sinks).clamp(max=group.encoded)
        used = None if self.most_tokens is None else torch.full((1,), group.encoded, device=device)
        bias = bias_of(seen)
        return Step(own + group.sink_slots, bias, hidden, used)

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
        if isinstance(plain, Attention) and plain.ordinary and group.handed_out(key, value):
            self._ordinary.add(layer_idx)
            self._query_heads = query.shape[1]
            masked = self._masked(plain, query)
            if masked is not None:
                return plain.folded(masked, scaling)
        return plain()

    def _masked(self, plain: Attention, query: Tensor) -> "Optional[FoldedMask]":
        """The mask of an ordinary attention as `Attention.folded` takes it; None where that is of no use.

        Made once for all layers: of a mask of truth values PyTorch makes as many numbers in every layer.
        """
        mask = plain.mask
        if query.device.type != "cpu" or not isinstance(mask, Tensor) or plain.name != "sdpa":
            return None
        if torch.is_grad_enabled() or mask.shape[1] != 1:
            return None
        if self._mask is None or self._mask[0] is not mask:
            self._mask = mask, FoldedMask.of(mask, query.dtype)
        return self._mask[1]

    @torch.compiler.disable
    @keeping
    def end(self) -> None:
        """After a forward pass: store its tokens, and drop what was only needed during it."""
        for group in self.groups:
            group.settle()
        self._workspace.release()
        self._mask = None
        self.timeline.end()
        for group, module in zip(self.groups, self.codec.groups, strict=True):
            group.codec = module
        for layer in self.kept.values():
            _own_tensors(layer)
        self._torn = True  # until buffers that stay where they are have been written whole
        for group in self.groups:
            group.write_back()
        self._before, self._torn = None, False

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor that is kept between forward passes, counted by storage."""
        kept = [t for layer in self.kept.values() for _, t in kept_tensors(layer)]
        held = kept + self.timeline.tensors() + [t for group in self.groups for t in group.tensors()]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())

    def reset(self) -> None:
        super().reset()
        # Buffers that are only zeroed would stay, and be of as many sequences as before.
        self._set_kept({i: vars(layer) for i, layer in self._new_layers(self.kept).items()})
        self.timeline.reset()
        for group in self.groups:
            group.reset()
        self._before, self._torn = None, False

    @keeping
    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens.

        Tokens encoded meanwhile stay encoded: the exact window is shorter for a while. Where no token is left, the
        cache is as after `reset`.

        Args:
            tokens_to_remove: how many, as a negative number; 0 for none, and all if there are fewer.

        Raises:
            ValueError: the number is positive.
            RuntimeError: a layer that the source keeps cannot go back so far.
        """
        _refuse_length(tokens_to_remove)
        length = self.get_seq_length()
        left = max(0, length + tokens_to_remove)
        if not left:
            self.reset()
            return
        self.check_whole()
        with self._all_or_nothing():
            super().crop(left - length)
            self.timeline.crop(left)
            for group in self.groups:
                group.crop(left)

    @keeping
    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        with self._all_or_nothing():
            super().reorder_cache(beam_idx)
            self._rebatch(lambda t, dim=0: t.index_select(dim, beam_idx.to(t.device)))

    @keeping
    def batch_repeat_interleave(self, repeats: int) -> None:
        with self._all_or_nothing():
            super().batch_repeat_interleave(repeats)
            self._rebatch(lambda t, dim=0: t.repeat_interleave(repeats, dim=dim))

    @keeping
    def batch_select_indices(self, indices: Tensor) -> None:
        chosen = torch.arange(len(indices), device=indices.device)[indices] if indices.dtype == torch.bool else indices
        with self._all_or_nothing():
            super().batch_select_indices(indices)
            self._rebatch(lambda t, dim=0: t.index_select(dim, chosen.to(t.device)))

    def _rebatch(self, select: Callable[..., Tensor]) -> None:
        self.timeline.rebatch(select)
        for group in self.groups:
            group.rebatch(select)

    @contextmanager
    def _all_or_nothing(self) -> "Iterator[None]":
        """Where something fails within it (other sequences may need more memory), the cache is as before."""
        self._before = self._state()
        try:
            yield
        except BaseException:
            self._restore()
            raise
        self._before = None


def _refuse_length(tokens_to_remove: int) -> None:
    if tokens_to_remove > 0:
        raise ValueError(
            f"crop({tokens_to_remove}) does not say what is to be dropped: pass a negative number of tokens to remove "
            "(older versions of transformers took a positive number for the length that is kept)"
        )


# Layers of transformers' own caches hold keys and values, or states in lists or dicts.


def kept_tensors(layer: Any) -> "list[tuple[str, Tensor]]":
    """What a layer of transformers' own caches keeps, by attribute: keys and values, states of any number and form."""
    found: "list[tuple[str, Tensor]]" = []
    for name, value in vars(layer).items():
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        found += [(name, part) for part in parts if isinstance(part, Tensor) and part.is_floating_point()]
    return found


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list)) else value


def _own_tensors(layer: Any) -> None:
    """Let a layer of transformers' own caches keep tensors that can be written to later, and no more than it needs.

    A sliding layer keeps a view of the whole chunk; what inference mode made could only be written to in that mode.
    """

    def own(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: own(part) for key, part in value.items()}
        if isinstance(value, list):
            return [own(part) for part in value]
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        return value.clone() if value.is_inference() or value.untyped_storage().nbytes() > value.nbytes else value

    for name, value in vars(layer).items():
        setattr(layer, name, own(value))
