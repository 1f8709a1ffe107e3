"""The config's `clla` block as typed objects: what a cache is made of. Nothing heavy is imported."""

from dataclasses import dataclass
from typing import Any, Optional

from .sizes_clla import exact_slots


@dataclass(frozen=True)
class GroupSpec:
    """One layer group.

    Attributes:
        layers: indices of its layers in the model.
        tier_bits: bit width of each tier of the latent.
        tier_size: components of a tier.
        rope_pairs: pairs of channels of the rotary key, where keys are decoupled; else empty.
        rope_bits: bit width of the rotary key.
    """

    layers: "tuple[int, ...]"
    tier_bits: "tuple[int, ...]"
    tier_size: int
    rope_pairs: "tuple[int, ...]" = ()
    rope_bits: Optional[int] = None

    @property
    def rank(self) -> int:
        """Components of the latent, r."""
        return len(self.tier_bits) * self.tier_size

    @property
    def rotary_width(self) -> int:
        """Components of the rotary key, p."""
        return 2 * len(self.rope_pairs)


@dataclass(frozen=True)
class CacheSpec:
    """What the cache of a converted model is made of.

    Attributes:
        groups: the layer groups.
        kept_layers: layers that keep the source's own cache.
        heads: key-value heads, H.
        head_dim: d.
        window: exact newest tokens, W; 0 for none at all.
        sinks: exact first tokens, S.
        flush_block: tokens that leave the window at once.
        from_first: whether latents are made from the attention input of a group's first layer.
        kv_dtype: name of the dtype in which exact keys and values are stored.
        prefill_chunk: most tokens of one forward pass of the source.
        rope: settings of `rope_of`; None without rotation.
        codec_sha256: digest of the codec's weights.
        healed: what was trained after the conversion; None if nothing was.
    """

    groups: "tuple[GroupSpec, ...]"
    kept_layers: "tuple[int, ...]"
    heads: int
    head_dim: int
    window: int
    sinks: int
    flush_block: int
    from_first: bool
    kv_dtype: str
    prefill_chunk: int
    rope: "Optional[dict[str, Any]]"
    codec_sha256: Optional[str]
    healed: Optional[str]

    @classmethod
    def of(cls, block: "dict[str, Any]") -> "CacheSpec":
        """The config's `clla` block, read.

        Raises:
            KeyError: something is missing in it.
            ValueError: as of `check_capacity`.
        """
        check_capacity(block)
        rope_bits = block.get("rope_bits")
        groups = tuple(
            GroupSpec(
                layers=tuple(group["layers"]),
                tier_bits=tuple(group["tier_bits"]),
                tier_size=block["tier_size"],
                rope_pairs=tuple(group.get("rope_pairs") or ()),
                rope_bits=rope_bits,
            )
            for group in block["groups"]
        )
        return cls(
            groups=groups,
            kept_layers=tuple(block["kept_layers"]),
            heads=block["kv"]["num_key_value_heads"],
            head_dim=block["kv"]["head_dim"],
            window=block["window"],
            sinks=block["sinks"],
            flush_block=block["flush_block"],
            from_first=block["source"] == "first",
            kv_dtype=block["kv_dtype"],
            prefill_chunk=block["prefill_chunk"],
            rope=block["rope"],
            codec_sha256=block.get("codec_sha256"),
            healed=block.get("healed"),
        )

    @property
    def decoupled(self) -> bool:
        """Whether keys are kept in two parts, a rotary one beside the latent."""
        return any(group.rope_pairs for group in self.groups)

    @property
    def exact_slots(self) -> int:
        """Slots of the exact buffer of a group, sinks not counted."""
        return exact_slots(self.window, self.flush_block)


def check_capacity(plan: "dict[str, Any]") -> None:
    """Refuse a plan that bounds the rows of a group.

    Raises:
        ValueError: it does.
    """
    if plan.get("capacity") is not None:
        raise ValueError("made with eviction, which this version no longer has; convert again")
