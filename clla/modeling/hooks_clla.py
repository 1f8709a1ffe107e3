"""Find a source model's attention and rotary modules by their public marks, and how it names its cache."""

import inspect
import re
from dataclasses import fields
from functools import partial
from typing import Any, Callable, Optional

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .rotary_clla import Rope

# What tables of learned positions are called: wpe, embed_positions, position_embeddings, pos_embed, …
POSITIONS = re.compile(r"(^|_)(wpe|pos|position|positions|positional)(_|$)")
# How models of the installed transformers name their cache, as an argument and in their output: 5.24 renamed it.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Attention modules by layer index: those that carry `layer_idx` and are named …Attention."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        index: Any = getattr(module, "layer_idx", None)
        if isinstance(index, int) and type(module).__name__.endswith("Attention"):
            found[index] = module
    return found


def decoder_of(model: nn.Module) -> nn.Module:
    """The innermost model within a model that holds all of its attention modules: what it runs below its head.

    Raises:
        ValueError: there is none but the model itself.
    """
    attention = set(attention_modules(model).values())
    found = [m for m in model.modules() if isinstance(m, PreTrainedModel) and attention <= set(m.modules())]
    if not found or found[-1] is model:
        raise ValueError(f"{type(model).__name__} has no decoder of its own, apart from its head")
    return found[-1]


def rope_of(
    model: Any, settings: "Optional[dict[str, Any]]", *, dtype: "Optional[torch.dtype]" = None
) -> Optional[Rope]:
    """How the model rotates the keys of its layers with full attention.

    Args:
        model: the source.
        settings: `form` and `plain_layers`, as in the config's `clla` block; None where no key is rotated.
        dtype: of cosines and sines; the model's unless given.
    """
    if settings is None:
        return None
    own = model.get_input_embeddings().weight.dtype  # the weight may be offloaded, or a replica's, that is no parameter
    return rope_with(rotary_module(model), settings, dtype=dtype or own)


def rope_with(rotary: Any, settings: "dict[str, Any]", *, dtype: torch.dtype) -> Rope:
    """Rotations as a rotary module makes them, in a dtype; settings as of `rope_of`."""
    grids = hasattr(rotary, "mrope_section")  # positions in time, height and width, which are one for text
    if "layer_type" in inspect.signature(rotary.forward).parameters:  # local and global rotations in one module
        rotary = partial(rotary, layer_type="full_attention")

    def angles(positions: Tensor) -> "tuple[Tensor, Tensor]":
        like = torch.empty(1, dtype=dtype, device=positions.device)
        found: "tuple[Tensor, Tensor]" = rotary(like, positions.expand(3, -1, -1) if grids else positions)
        return found

    return Rope(angles, settings["form"], tuple(settings["plain_layers"]))


def logits_head(model: Any) -> "Callable[[Tensor], Tensor]":
    """Logits [..., V] of final hidden states [..., h], as the model makes them."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scaling = getattr(config, "logits_scaling", None)  # Granite divides
    factor = getattr(config, "logit_scale", None)  # Cohere multiplies
    cap = getattr(config, "final_logit_softcapping", None)

    def logits(hidden: Tensor) -> Tensor:
        found = head(hidden)
        found = found if scaling is None else found / scaling
        found = found if factor is None else found * factor
        return found if cap is None else (found / cap).tanh() * cap

    return logits


def rotary_module(model: nn.Module) -> nn.Module | None:
    """The module that turns positions into cosines and sines; None where there is none.

    Raises:
        ValueError: there are several.
    """
    found = [m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")]
    if len(found) > 1:
        raise ValueError(f"expected one rotary embedding, found {len(found)}")
    return found[0] if found else None


def skips_padding(model: nn.Module) -> bool:
    """Whether a model that is told no positions counts them from its mask, padding left out."""
    return any(
        POSITIONS.search(name.rpartition(".")[2]) and "attention_mask" in inspect.signature(module.forward).parameters
        for name, module in model.named_modules()
    )


def has_bias_table(model: nn.Module) -> bool:
    """Whether a model adds biases of positions from a table, in which padding takes a position too."""
    return any(hasattr(module, "build_mpt_alibi_tensor") for module in model.modules())


def position_slots(model: nn.Module) -> Optional[int]:
    """Positions that a model holds in a table, learned or of biases; None where it computes them for any length.

    A position beyond the table is an index error in the model's own code, and on a GPU the end of the process.
    """
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and POSITIONS.search(last):
            return module.num_embeddings - getattr(module, "offset", 0)  # OPT leaves out the first two
        if hasattr(module, "build_mpt_alibi_tensor"):
            return int(module.config.max_seq_len)
    return None
