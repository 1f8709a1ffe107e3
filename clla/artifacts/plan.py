"""A plan: which layers share a latent, of how many components, in how many bits."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from clla.modeling.quantize_clla import layout_of
from clla.modeling.sizes_clla import exact_layout, exact_slots, leaving_slots
from clla.modeling.spec_clla import GroupSpec, check_capacity
from clla.storage.files import ARTIFACT_VERSION, check_version, damaged, json_digest, mistakes_in, read_json, write_text

NEWER = {"rope_bits", "kept_slot_bytes", "kept_state_bytes"}  # fields that older checkpoints lack
Whole = Annotated[int, Field(ge=0, lt=2**31)]  # of what has a size: more would not fit in any memory
Positive = Annotated[int, Field(ge=1, lt=2**31)]


@dataclass(frozen=True)
class KVShape:
    """What one layer caches for one token."""

    num_key_value_heads: Positive
    head_dim: Positive

    @property
    def values(self) -> int:
        """n = 2·H_kv·d, keys then values."""
        return 2 * self.num_key_value_heads * self.head_dim


@dataclass(frozen=True)
class LayerGroup:
    """Consecutive layers that share one latent.

    Attributes:
        layers: model layer indices.
        tier_bits: bits per component of each coded tier, most important tier first.
        predicted_loss: what the group adds to the plan's loss, in the units of its metric.
        rope_pairs: which rotary pair of a head each pair of the rotary key turns like; empty unless it is decoupled.
    """

    layers: tuple[Whole, ...]
    tier_bits: tuple[Positive, ...]
    predicted_loss: float = 0.0
    rope_pairs: tuple[Whole, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Which layers share a latent, how long it is and how many bits each tier gets.

    Attributes:
        groups: in layer order, covering every convertible layer.
        kv: what a layer caches for a token.
        tier_size: neighbouring components that share a bit width.
        window: newest tokens kept exact (the buffer holds up to `flush_block` more).
        sinks: first tokens kept exact.
        flush_block: tokens that leave the window at once.
        kept_layers: layers left with the source's own cache (bounded by a sliding window, or a state of fixed size).
        kept_window: that sliding window; 0 where none has one.
        kept_slot_bytes: of one token in the windows of all these layers; None (of older checkpoints): as if they
            cached what the converted layers do.
        kept_state_bytes: of the states of all these layers.
        source: `group` or `first`, where the latent comes from.
        budget_bytes: bytes per token that were asked for, at `at_context`.
        at_context: context length in tokens at which the budget holds; None counts latents only.
        kv_itemsize: bytes of one exact key or value component.
        made_from: hash of the stats and settings.
        rope_bits: bits per component of the rotary keys; None where keys are reconstructed whole.
    """

    groups: tuple[LayerGroup, ...]
    kv: KVShape
    kv_itemsize: Positive
    tier_size: Positive
    window: Whole
    sinks: Whole
    flush_block: Positive
    source: Literal["group", "first"]
    budget_bytes: float
    at_context: Whole | None
    made_from: str
    kept_layers: tuple[Whole, ...] = ()
    kept_window: Whole = 0
    kept_slot_bytes: Whole | None = None
    kept_state_bytes: Whole = 0
    rope_bits: Positive | None = None

    @property
    def decoupled(self) -> bool:
        """Whether keys are a position-free part from the latent and a rotary key beside it."""
        return self.rope_bits is not None

    @property
    def predicted_loss(self) -> float:
        return sum(group.predicted_loss for group in self.groups)

    @property
    def num_layers(self) -> int:
        return sum(len(group.layers) for group in self.groups)

    @property
    def source_bytes_per_token(self) -> int:
        """What the source caches for a token in the convertible layers."""
        return self.num_layers * self.kv.values * self.kv_itemsize

    @property
    def row_bytes(self) -> int:
        """Packed latents of one token and its rotary keys, scales included, over all groups."""
        return sum(self.row_bytes_of(group) for group in self.groups)

    def row_bytes_of(self, group: LayerGroup) -> int:
        """The same of one of its groups."""
        spec = GroupSpec(group.layers, group.tier_bits, self.tier_size, group.rope_pairs, self.rope_bits)
        return layout_of(spec).row_bytes

    @property
    def exact_bytes(self) -> float:
        """Exact window and sinks (and the window's latents for `first`) of a long sequence."""
        return exact_bytes_of(
            self.source_bytes_per_token, self.row_bytes, self.window, self.sinks, self.flush_block, self.source
        )

    def exact_bytes_at(self, context: int, row_bytes: float | None = None) -> float:
        """The same of a sequence of `context` tokens: slots are allocated as tokens come."""
        row = self.row_bytes if row_bytes is None else row_bytes
        encoded = encoded_slots(context, self.window, self.flush_block)
        sinks, newest = exact_layout(encoded, context - encoded, self.window, self.sinks, self.flush_block)
        return (sinks + newest) * self.source_bytes_per_token + (newest * row if self.source == "first" else 0)

    def bytes_at(self, context: int, row_bytes: float | None = None) -> float:
        """Cache bytes of one sequence of `context` tokens, layers left alone not included.

        Args:
            context: in tokens.
            row_bytes: of one token's latents, were they not the plan's own.
        """
        row = self.row_bytes if row_bytes is None else row_bytes
        return self.exact_bytes_at(context, row) + encoded_slots(context, self.window, self.flush_block) * row

    @property
    def components_read(self) -> float:
        """Components of a latent that a layer reads, on average over the converted layers."""
        return sum(len(g.layers) * len(g.tier_bits) for g in self.groups) * self.tier_size / self.num_layers

    @property
    def codec_bytes(self) -> int | None:
        """Bytes of encoders, decoders and means beside the model's weights; None where latents come from `first`."""
        if self.source == "first":
            return None  # encoders are as wide as the model, which a plan does not know
        values = 0
        for group in self.groups:
            width = len(group.layers) * self.kv.values
            values += 2 * width * (len(group.tier_bits) * self.tier_size + 1)
        return values * self.kv_itemsize

    @property
    def break_even(self) -> int | None:
        """First context at which a sequence takes less than the source's cache would; None if none does.

        Shorter sequences take as much: their tokens are all exact.
        """
        return self.break_even_beside(0)

    def break_even_beside(self, fixed: int) -> int | None:
        """First context at which a sequence, and `fixed` bytes beside it, take less than the source's cache would.

        Args:
            fixed: of `codec_bytes`, say; several sequences share them.
        """
        source, fixed_in_all = self.source_bytes_per_token, self.exact_bytes + fixed
        if self.row_bytes >= source:
            return None
        longest = math.ceil(fixed_in_all / (source - self.row_bytes)) + self.window + self.flush_block
        return next((c for c in range(1, longest + 1) if self.bytes_at(c) + fixed < source * c), None)

    def kept_bytes_at(self, context: int) -> int:
        """Cache bytes of the layers left alone: their states, and one token less than the width of their windows."""
        slots, slot_bytes = min(context, max(0, self.kept_window - 1)), self.kept_slot_bytes
        if slot_bytes is None:
            slot_bytes = len(self.kept_layers) * self.kv.values * self.kv_itemsize
        return slots * slot_bytes + self.kept_state_bytes

    @property
    def bound(self) -> str:
        """In words, what bounds the cache of the layers left alone, and whether it is counted."""
        window = [f"a window of {self.kept_window:,} tokens"] if self.kept_window else []
        state = [f"a state of {self.kept_state_bytes:,} bytes"] if self.kept_state_bytes else []
        return " or ".join(window + state) or "a state of fixed size, which is not counted"  # in an older checkpoint

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """A plan from its JSON, or from a converted config's `clla` block, which holds it among other keys.

        Raises:
            ValueError: a key is missing, or its value is of another type or out of range; all are named. Also as of
                `check_capacity`.
        """
        check_capacity(data)
        if lacking := {f.name for f in fields(cls)} - data.keys() - NEWER:
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
        try:
            return TypeAdapter(cls).validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            raise ValueError(mistakes_in(error)) from error

    def save(self, path: Path) -> None:
        data = {"version": ARTIFACT_VERSION, **self.to_json()}
        write_text(path, json.dumps({**data, "sha256": json_digest(data)}, indent=1))

    @classmethod
    def load(cls, path: Path) -> Plan:
        data = read_json(path)
        check_version(path, data.get("version"))
        if data.pop("sha256", None) != json_digest(data):
            raise damaged(path, "its checksum does not match its contents")
        try:
            return cls.from_json(data)
        except ValueError as error:
            raise damaged(path, f"no valid plan: {error}") from error


def encoded_slots(context: int, window: int, flush_block: int) -> int:
    """Tokens of a context that are latents."""
    return leaving_slots(context, window, flush_block) if window else context


def exact_bytes_of(
    source_bytes: int, row_bytes: float, window: int, sinks: int, flush_block: int, source: str
) -> float:
    """Bytes of the exact buffers, given those of one exact and of one packed token."""
    slots = exact_slots(window, flush_block)
    return (slots + sinks) * source_bytes + (slots * row_bytes if source == "first" else 0)
