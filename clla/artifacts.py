"""Stats, Plan and Codec: the frozen results of the pipeline's stages, saved as safetensors with JSON.

Every file carries the hash of what made it (`made_from`), so that a later run takes it up only if
nothing that it rests on has changed.

Shape legend: L convertible layers, K band (largest group size), n = 2·H_kv·d values a token and layer,
q coordinates in which their moments are kept (n, or fewer for wide models), h hidden size, r rank of a layer group's
latent, H_q query heads, F rotary pairs of a head, p components of a layer group's rotary key.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clla.errors import CorruptArtifactError
from clla.modeling.group_clla import exact_layout, exact_slots, leaving_slots
from clla.modeling.quantize_clla import layout_of, tensor_digest
from clla.storage.places import writing

ARTIFACT_VERSION = 1
NEWER = {"capacity", "rope_bits", "kept_slot_bytes", "kept_state_bytes"}  # fields that older checkpoints lack
Whole = Annotated[int, Field(ge=0, lt=2**31)]  # of what has a size: more would not fit in any memory
Positive = Annotated[int, Field(ge=1, lt=2**31)]
EVICT_BYTES = 6  # a row of a group with a capacity: position (int32) and score (half)


def mistakes_in(error: ValidationError) -> str:
    """Where something is wrong and what, one after the other."""
    return "; ".join(f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors())


def digest(*parts: Any) -> str:
    """Hex digest (16 characters) of JSON-serialisable parts."""
    return json_digest(parts)[:16]


def json_digest(data: Any) -> str:
    """SHA-256 of what is JSON-serialisable; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


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
class Stats:
    """Second moments and Fisher metric of keys (before RoPE) and values, per convertible layer.

    Attributes:
        layers: indices of the L convertible layers in the model.
        kv: what each of them caches.
        tokens: positions that went into the moments.
        mean: [L, n].
        covariance: [L, K, q, q], centred, of layers l and l + j.
        fisher: [L, q, q], E[g gᵀ] with g the gradient of the summed token loss.
        input_mean: [L, h] of the attention's input; with the next two only for the `first` source.
        input_covariance: [L, h, h].
        input_cross: [L, K, h, q], centred, of layer l's input with layer l + j's keys and values.
        reading: [L, q, n]: the coordinates are reading·(y - mean). None where they are y itself.
        writing: [L, n, q]: y is mean + writing·coordinates, but for what the coordinates lack.
        dropped: [L] nats a token that this costs, by second order.
        query_power: [L, H_q, F], E|q|² of rotary pairs; with the next two only for the `decoupled` key.
        frequencies: [L, F], radians that a token further turns a pair by; 0 in layers that do not rotate.
        rotary_channels: [F, 2], channels of a head that make up a pair.
        made_from: hash of source, data and settings.
    """

    layers: tuple[int, ...]
    kv: KVShape
    tokens: int
    mean: Tensor
    covariance: Tensor
    fisher: Tensor
    made_from: str
    input_mean: Tensor | None = None
    input_covariance: Tensor | None = None
    input_cross: Tensor | None = None
    reading: Tensor | None = None
    writing: Tensor | None = None
    dropped: Tensor | None = None
    query_power: Tensor | None = None
    frequencies: Tensor | None = None
    rotary_channels: Tensor | None = None

    @property
    def width(self) -> int:
        """q."""
        return self.fisher.shape[-1]

    @property
    def reduction(self) -> dict[str, float] | None:
        """In how many coordinates the moments are kept, of how many values, and nats a token lost; None if whole."""
        if self.dropped is None:
            return None
        return {"coordinates": self.width, "of": self.kv.values, "kl": float(self.dropped.sum())}

    def save(self, path: Path) -> None:
        meta = {"layers": self.layers, "kv": asdict(self.kv), "tokens": self.tokens, "made_from": self.made_from}
        save_tensors(path, _tensor_fields(self), "stats", meta)

    @classmethod
    def load(cls, path: Path) -> Stats:
        tensors, meta = load_tensors(path, "stats")
        try:
            meta["layers"], meta["kv"] = tuple(meta["layers"]), KVShape(**meta["kv"])
            return cls(**{**meta, **tensors})
        except (KeyError, TypeError) as error:
            raise _damaged(path, f"no valid stats: {error}") from error


@dataclass(frozen=True)
class LayerGroup:
    """Consecutive layers that share one latent.

    Attributes:
        layers: model layer indices.
        tier_bits: bits a component of each coded tier, most important tier first.
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
        capacity: latents a group keeps at most, the least attended leave; None keeps all.
        kept_layers: layers left with the source's own cache (bounded by a sliding window, or a state of fixed size).
        kept_window: that sliding window; 0 where none has one.
        kept_slot_bytes: of one token in the windows of all these layers; None (of older checkpoints): as if they
            cached what the converted layers do.
        kept_state_bytes: of the states of all these layers.
        source: `group` or `first`, where the latent comes from.
        budget_bytes: bytes a token that were asked for, at `at_context`.
        at_context: context length in tokens at which the budget holds; None counts latents only.
        kv_itemsize: bytes of one exact key or value component.
        made_from: hash of the stats and settings.
        rope_bits: bits a component of the rotary keys; None where keys are reconstructed whole.
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
    capacity: Positive | None = None
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
        return layout_of(asdict(group), {"tier_size": self.tier_size, "rope_bits": self.rope_bits}).row_bytes

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
        exact = self.exact_bytes_at(context, row)
        rows = encoded_slots(context, self.window, self.flush_block)
        if self.capacity is None:
            return exact + rows * row
        return exact + min(rows, self.capacity) * (row + EVICT_BYTES * len(self.groups))

    @property
    def break_even(self) -> int | None:
        """First context at which a sequence takes less than the source's cache would; None if none does.

        Shorter sequences take as much: their tokens are all exact.
        """
        source, fixed = self.source_bytes_per_token, self.exact_bytes
        if self.row_bytes >= source:
            return None
        longest = math.ceil(fixed / (source - self.row_bytes)) + self.window + self.flush_block
        return next((c for c in range(1, longest + 1) if self.bytes_at(c) < source * c), None)

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
            ValueError: a key is missing, or its value is of another type or out of range; all are named.
        """
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
        _check_version(path, data.get("version"))
        if data.pop("sha256", None) != json_digest(data):
            raise _damaged(path, "its checksum does not match its contents")
        try:
            return cls.from_json(data)
        except ValueError as error:
            raise _damaged(path, f"no valid plan: {error}") from error


@dataclass(frozen=True)
class GroupCodec:
    """Linear encoder and decoder of one layer group, latents of unit variance, sorted by importance.

    Attributes:
        encoder: [r, n·|G|] from the group's keys and values, or [r, h] from the attention's input.
        offset: [n·|G|] or [h], subtracted before encoding.
        decoder: [|G|, n, r].
        mean: [|G|, n], added after decoding.
        rope_encoder: [p, h], the rotary key from the attention's input; this and the next two only where keys are
            decoupled. The decoder's keys are then the position-free parts.
        rope_mean: [p], added to it.
        rope_query: [|G|, H, p/2, 2], complex factors by which a query's pair answers each pair of the rotary key.
    """

    encoder: Tensor
    offset: Tensor
    decoder: Tensor
    mean: Tensor
    rope_encoder: Tensor | None = None
    rope_mean: Tensor | None = None
    rope_query: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        return _tensor_fields(self)


@dataclass(frozen=True)
class Codec:
    """Encoders and decoders of all layer groups, in the plan's order.

    Attributes:
        groups: of the plan.
        made_from: hash of the stats and settings.
        predicted_kl: nats a token, by second order, if every token were coded.
        outlook: spectra and the loss at other budgets (`clla.plan.frontier`), for reports; empty if not computed.
    """

    groups: tuple[GroupCodec, ...]
    made_from: str
    predicted_kl: float = 0.0
    outlook: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Flat names as in the converted model's state dict: `groups.I.encoder` and so on."""
        return {f"groups.{i}.{k}": v for i, group in enumerate(self.groups) for k, v in group.tensors().items()}

    def save(self, path: Path) -> None:
        meta = {
            "made_from": self.made_from,
            "predicted_kl": self.predicted_kl,
            "outlook": self.outlook,
            "groups": len(self.groups),
        }
        save_tensors(path, self.tensors(), "codec", meta)

    @classmethod
    def load(cls, path: Path) -> Codec:
        tensors, meta = load_tensors(path, "codec")
        try:
            groups = tuple(
                GroupCodec(**{k.split(".", 2)[2]: v for k, v in tensors.items() if k.startswith(f"groups.{i}.")})
                for i in range(meta.pop("groups"))
            )
        except (KeyError, TypeError) as error:
            raise _damaged(path, f"no whole codec: {error}") from error
        return cls(groups=groups, **meta)


def encoded_slots(context: int, window: int, flush_block: int) -> int:
    """Tokens of a context that are latents."""
    return leaving_slots(context, window, flush_block) if window else context


def exact_bytes_of(
    source_bytes: int, row_bytes: float, window: int, sinks: int, flush_block: int, source: str
) -> float:
    """Bytes of the exact buffers, given those of one exact and of one packed token."""
    slots = exact_slots(window, flush_block)
    return (slots + sinks) * source_bytes + (slots * row_bytes if source == "first" else 0)


def _tensor_fields(artifact: Any) -> dict[str, Tensor]:
    return {k: v.contiguous() for k, v in vars(artifact).items() if isinstance(v, Tensor)}


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that a reader never sees half of it.

    Raises:
        CllaError: the system refused to write.
    """
    with _replacing(path, len(text)) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def _replacing(path: Path, size: int) -> Iterator[Path]:
    """A file of a name of its own beside `path`, about `size` bytes, which takes its place if the block ends well."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with writing(path, needed=size):
            yield partial
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CorruptArtifactError: the file is missing or not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(data, dict):
        raise _damaged(path, f"it holds a {type(data).__name__}, not an object")
    return data


def save_verified(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any] | None = None) -> None:
    """Write tensors with a checksum over them and `meta`, beside their place, and rename the file.

    Raises:
        CllaError: the system refused to write.
    """
    header = dict(meta or {})
    header["sha256"] = _checksum(header, tensors)
    with _replacing(path, sum(tensor.nbytes for tensor in tensors.values())) as partial:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"clla": json.dumps(header)})
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())


def load_verified(path: Path) -> dict[str, Tensor]:
    """Tensors that `save_verified` wrote.

    Raises:
        CorruptArtifactError: the file is missing, damaged or something else.
    """
    header, tensors = _read(path)
    _verify(path, header, tensors)
    return tensors


def save_tensors(path: Path, tensors: dict[str, Tensor], kind: str, meta: dict[str, Any]) -> None:
    """Write tensors of some kind with their version and a checksum."""
    save_verified(path, tensors, {"kind": kind, "version": ARTIFACT_VERSION, **meta})


def load_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote: tensors and `meta`.

    Raises:
        CorruptArtifactError: the file is missing, damaged, of another kind, or newer.
    """
    header, tensors = _read(path)
    meta = _meta(path, header, kind)
    _verify(path, header, tensors)
    return tensors, meta


def read_header(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """`meta` and the shapes of the tensors, which are not read.

    Raises:
        CorruptArtifactError: the file is missing, of another kind, or newer.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("clla", "{}"))
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    return _meta(path, header, kind), shapes


def _meta(path: Path, header: dict[str, Any], kind: str) -> dict[str, Any]:
    _check_version(path, header.get("version"))
    if header.get("kind") != kind:
        raise _damaged(path, f"it is no {kind} file")
    return {k: v for k, v in header.items() if k not in ("kind", "version", "sha256")}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("clla", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no object")
    return header, tensors


def _verify(path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    own = {k: v for k, v in header.items() if k != "sha256"}
    if header.get("sha256") != _checksum(own, tensors):
        raise _damaged(path, "its checksum does not match its contents")


def _checksum(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    text = json.dumps(header, sort_keys=True) + tensor_digest(tensors)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_version(path: Path, version: Any) -> None:
    if not isinstance(version, int):
        raise _damaged(path, "it names no version")
    if version > ARTIFACT_VERSION:
        raise CorruptArtifactError(
            f"{path} was written by a newer clla (version {version})",
            expected=f"version {ARTIFACT_VERSION} or older",
            remedy="upgrade with: pip install -U clla",
        )


def _damaged(path: Path, why: str) -> CorruptArtifactError:
    return CorruptArtifactError(
        f"{path} cannot be read: {why}",
        expected="a file written by clla",
        remedy="delete it and run the conversion again, or copy it anew from where it came",
    )
