"""Which models can be converted, decided from their config before any weight is read.

What attention modules are, how keys are rotated and what a layer caches is read off the model itself
(`modeling/hooks_clla.py`, `calibrate/rope_detection.py`), so that a family needs no code of its own. Those in the table
are tested; others are tried if their config describes ordinary attention.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from clla.artifacts.plan import KVShape
from clla.errors import UnsupportedModelError

# What is special about a family's attention. The test suite goes through all of them (docs/models.md).
FAMILIES: dict[str, str] = {
    "falcon": "multi-query, fused projections; ALiBi or RoPE",
    "gemma2": "soft-capped logits, sliding layers",
    "gemma3_text": "QK-norm, sliding layers with a rotation of their own",
    "gpt2": "learned positions",
    "gpt_neox": "partial rotary, fused projections",
    "granite": "scaled logits",
    "llama": "RoPE, scaled by llama3, yarn or linear",
    "mistral": "RoPE",
    "mixtral": "mixture of experts",
    "olmo2": "norm over all heads",
    "opt": "learned positions",
    "phi3": "fused projections",
    "qwen2": "biases",
    "qwen3": "QK-norm",
    "qwen3_moe": "QK-norm, mixture of experts",
    "smollm3": "layers without RoPE",
}

_LATENT = "it caches a latent already (multi-head latent attention)"
_STATE = "its state does not grow with the context: there is nothing to compress"
_BOTH = "its layers keep attention and a recurrent state in one"
REFUSED: dict[str, str] = {
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bailing_hybrid": _LATENT,
    "clla": "it is converted already: convert its source model instead",
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "deepseek_v4": _LATENT,
    "dots3_note": _LATENT,
    "dots3_note_text": _LATENT,
    "falcon_h1": _BOTH,
    "falcon_mamba": _STATE,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "hy_v4": _LATENT,
    "kimi_linear": _LATENT,
    "longcat_flash": _LATENT,
    "mamba": _STATE,
    "mamba2": _STATE,
    "minimax": "it insists on a cache of its own",
    "minicpm3": _LATENT,
    "recurrent_gemma": _STATE,
    "rwkv": _STATE,
    "sarvam_mla": _LATENT,
    "xlstm": _STATE,
    "youtu": _LATENT,
    "zamba": _BOTH,
    "zamba2": _BOTH,
    "zaya": _BOTH,
}
# Language models within others that have no class of their own: the kind that they are when there is only text, and
# what they do that this kind must be told.
TEXT_ONLY: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen2_vl_text": ("qwen2", {}),
    "qwen3_vl_moe_text": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_vl_text": ("qwen3", {}),
}
ATTENTION, LEFT_ALONE = "full_attention", ("sliding_attention", "chunked_attention", "linear_attention", "conv")
NO_CACHE = ("mlp", "moe")
# What every config says; nothing that anyone has made is near these.
LARGEST_SIZES = {"num_hidden_layers": 10**4, "num_attention_heads": 10**5, "hidden_size": 10**7, "vocab_size": 10**9}


def check_family(config: Any) -> None:
    """Refuse what cannot be converted.

    Raises:
        UnsupportedModelError: no decoder, no causal language model, or attention of another form.
    """
    kind = config.model_type
    supported = "one of " + ", ".join(sorted(FAMILIES)) + ", or a decoder with ordinary attention"
    if kind in REFUSED:
        raise UnsupportedModelError(
            f"model type {kind!r} is not supported: {REFUSED[kind]}", expected=supported, remedy="convert another model"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{kind!r} is an encoder-decoder model", expected=supported, remedy="convert a decoder-only model"
        )
    try:
        text = config.get_text_config()
    except ValueError as error:
        raise UnsupportedModelError(
            f"{kind!r} is made of several models", expected=supported, remedy="convert a decoder-only model"
        ) from error
    if text is not config:
        remedy = "convert another model: transformers has no class for its language model alone"
        if text_only(config) is not None:
            remedy = (
                "save its language model as a checkpoint of its own, in Python: "
                "clla.extract_language_model('MODEL', 'text-model'), and convert that (docs/models.md)"
            )
        raise UnsupportedModelError(
            f"{kind!r} is made of a language model and others, for images or sound", expected=supported, remedy=remedy
        )
    architectures = getattr(config, "architectures", None) or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise UnsupportedModelError(
            f"the config says architectures {architectures!r}",
            expected="a list of names of classes",
            remedy="correct it, or copy the config again",
        )
    causal = [name for name in architectures if "CausalLM" in name or "LMHead" in name]
    if (architectures and not causal) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"the checkpoint holds {', '.join(architectures) or 'a ' + repr(kind) + ' model'}",
            expected="a decoder: a causal language model (…ForCausalLM)",
            remedy="convert the checkpoint that has the language-model head",
        )
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"model type {kind!r} is not supported: {_LATENT}", expected=supported, remedy="convert another model"
        )
    if getattr(config, "new_decoder_architecture", False):
        raise UnsupportedModelError(
            f"this {kind!r} model repeats its keys for every head before it caches them",
            expected="a cache of the key-value heads alone",
            remedy="convert a model without new_decoder_architecture",
        )
    for name, most in LARGEST_SIZES.items():
        value = getattr(text, name, None)
        if isinstance(value, int) and not 1 <= value <= most:
            raise UnsupportedModelError(
                f"the config says {name} {value}",
                expected=f"from 1 to {most}",
                remedy="correct it, or copy the config again",
            )
        if not isinstance(value, int):
            raise UnsupportedModelError(
                f"the config of model type {kind!r} has no {name}",
                expected=supported,
                remedy="open an issue naming the model if its cache is an ordinary key-value cache",
            )
    _check_rope(text)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"the weights of this {kind!r} model are quantized",
            expected="weights in 16 or 32 bits, or a .gguf file, which is unpacked",
            remedy="convert the model that was quantized; the converted one can be quantized afterwards",
        )


def text_only(config: Any) -> tuple[str, dict[str, Any]] | None:
    """Model type, and settings, that compute the language model within one for images or sound; None if none does."""
    text = config.get_text_config()
    found = TEXT_ONLY.get(text.model_type, (text.model_type, {}))
    return found if found[0] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None


def _check_rope(text: Any) -> None:
    """Refuse rotations that change while a sequence grows: keys would be turned back by another angle than forth."""
    rope = getattr(text, "rope_parameters", None) or {}
    by_layer_type = [value for value in rope.values() if isinstance(value, dict)]
    length = getattr(text, "max_position_embeddings", None) or math.inf
    for settings in by_layer_type or [rope]:
        kind = settings.get("rope_type")
        original = settings.get("original_max_position_embeddings") or length
        if kind == "dynamic":
            remedy = "remove the scaling from its config.json if contexts stay within the trained length"
        elif kind == "longrope" and length > original:
            factor = settings.get("attention_factor") or math.sqrt(1 + math.log(length / original) / math.log(original))
            remedy = (
                f'for contexts of up to {original} tokens set "max_position_embeddings": {original} and, beside '
                f'"short_factor", "attention_factor": {factor:.6f} in its config.json'
            )
        else:
            continue
        raise UnsupportedModelError(
            f"this {text.model_type!r} model changes how it rotates its keys when a sequence grows ({kind} RoPE)",
            expected="rotations that depend on the position alone",
            remedy=remedy,
        )


def kv_shape(config: Any) -> KVShape:
    """Key-value heads and head dim of a decoder config."""
    text = _of_full_layers(config.get_text_config())
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    found = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None) or heads
    return KVShape(1 if getattr(text, "multi_query", False) else found, head_dim)


def _of_full_layers(text: Any) -> Any:
    """The config as layers with full attention see it, where layers differ in their heads."""
    by_layer, kinds = getattr(text, "per_layer_config", None), getattr(text, "layer_types", None)
    return by_layer[kinds.index(ATTENTION)] if by_layer and kinds and ATTENTION in kinds else text


def split_layers(config: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Indices of convertible layers, and of those left alone, whose cache does not grow (sliding window, state).

    Raises:
        UnsupportedModelError: no layer has a cache that grows with the context, or one is of an unknown kind.
    """
    text = config.get_text_config()
    count = text.num_hidden_layers
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if getattr(text, "sliding_window", None) else ATTENTION] * count
    strange = sorted({kind for kind in kinds if kind not in (ATTENTION, *LEFT_ALONE, *NO_CACHE)})
    if strange:
        raise UnsupportedModelError(
            f"this {config.model_type!r} model has layers of kind {', '.join(strange)}",
            expected=", ".join((ATTENTION, *LEFT_ALONE)),
            remedy="open an issue naming the model if its cache is an ordinary key-value cache",
        )
    own = count - (getattr(text, "num_kv_shared_layers", None) or 0)  # the last ones read what others cached
    full = tuple(i for i, kind in enumerate(kinds[:own]) if kind == ATTENTION)
    kept = tuple(i for i, kind in enumerate(kinds[:own]) if kind != ATTENTION)
    if not full:
        raise UnsupportedModelError(
            f"every layer of this {config.model_type!r} model has a bounded cache ({kinds[0]})",
            expected="layers with full attention",
            remedy="nothing grows with the context here, so there is nothing to compress",
        )
    return full, kept
