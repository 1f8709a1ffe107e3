"""What differs between model families, as far as the conversion must know it.

Everything else is read off the model: attention modules are those with a `layer_idx`, keys and values
are taken where the model hands them to its cache, and rotations where it hands them to its attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clla.artifacts import KVShape
from clla.errors import UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """One architecture of `transformers`.

    Attributes:
        interleaved_rope: rotary pairs are neighbouring channels, not the two halves of a head.
    """

    interleaved_rope: bool = False


FAMILIES: dict[str, Family] = {
    "granite": Family(),
    "gpt_neox": Family(),
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(),
    "olmo2": Family(),
    "phi3": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "qwen3_moe": Family(),
}


def family_of(config: Any) -> Family:
    """The family of a `transformers` config, before any weight is read.

    Raises:
        UnsupportedModelError: the architecture is not in the table, or is no decoder.
    """
    kind = config.model_type
    supported = "one of " + ", ".join(sorted(FAMILIES))
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{kind!r} is an encoder-decoder model", expected=supported, remedy="convert a decoder-only model"
        )
    architectures = getattr(config, "architectures", None) or []
    if kind not in FAMILIES:
        remedy = "open an issue naming the model if its cache is an ordinary key-value cache"
        if kind == "clla":
            remedy = "it is converted already: convert its source model instead"
        elif architectures and not any("CausalLM" in name or "LMHead" in name for name in architectures):
            remedy = "it is no causal language model and keeps no key-value cache: convert a decoder"
        raise UnsupportedModelError(f"model type {kind!r} is not supported", expected=supported, remedy=remedy)
    if architectures and not any(name.endswith("ForCausalLM") for name in architectures):
        raise UnsupportedModelError(
            f"the checkpoint holds {', '.join(architectures)}",
            expected="a causal language model (…ForCausalLM)",
            remedy="convert the checkpoint that has the language-model head",
        )
    return FAMILIES[kind]


def kv_shape(config: Any) -> KVShape:
    """Key-value heads and head dim of a decoder config."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return KVShape(getattr(config, "num_key_value_heads", None) or heads, head_dim)


def split_layers(config: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Indices of convertible layers, and of layers whose cache is bounded already (sliding window).

    Raises:
        UnsupportedModelError: no layer has a cache that grows with the context.
    """
    count = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kind = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
        kinds = [kind] * count
    full = tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")
    kept = tuple(i for i, kind in enumerate(kinds) if kind != "full_attention")
    if not full:
        raise UnsupportedModelError(
            f"every layer of this {config.model_type!r} model has a bounded cache ({kinds[0]})",
            expected="layers with full attention",
            remedy="nothing grows with the context here, so there is nothing to compress",
        )
    return full, kept
