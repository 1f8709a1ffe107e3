"""Models of known shapes with random weights, plans and codecs: speed and memory without a download.

What a model computes does not matter for how fast it is, but its sizes do, and the widths of its latents. Plans
have the mix of widths of real ones at a sixteenth of the cache (`MIX`). Everything is drawn where it is used, in the
model's dtype: an 8B model is never held twice, nor in fp32.

Shape legend: L layers, G layers of a group, n = 2·H_kv·d values per token and layer, r rank of a group's latent.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from clla.artifacts.codec import Codec, GroupCodec
from clla.artifacts.plan import LayerGroup, Plan
from clla.bench.largest_batch import largest
from clla.errors import UsageError
from clla.modeling.quantize_clla import RowLayout
from clla.plan.budget import derive_group_size
from clla.recipe import PlanConfig, parse_budget
from clla.source.families import kv_shape, split_layers

STORED = torch.bfloat16  # dtype of a checkpoint of these shapes, and of its cache
WINDOW, SINKS = 128, 4
ROPE = {"form": "halves", "plain_layers": []}  # of all families below
_LLAMA3_SCALING = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 1024,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    },
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    },
    "llama-3.2-1b": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rope_parameters": _LLAMA3_SCALING, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "bos_token_id": 128000, "eos_token_id": 128001,
    },
    "llama-3-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001,
    },
    "qwen3-8b": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "bos_token_id": 151643, "eos_token_id": 151645,
    },
}  # fmt: skip
# Share of a latent's components by bits, as in the plan of SmolLM2-135M at 6.25 %.
MIX = {6: 0.03, 5: 0.05, 4: 0.11, 3: 0.21, 2: 0.30, 1: 0.30}
WIDEST = 8  # bits of a component; the recipes' plans have 1 to 6 and these
LEAST_SPENT = 0.99  # of a budget


def shape_config(name: str) -> Any:
    """The config of a shape.

    Raises:
        UsageError: no such shape.
    """
    if name not in SHAPES:
        raise UsageError(f"--shape {name}", expected="one of " + ", ".join(SHAPES), remedy="correct the name")
    return AutoConfig.for_model(**SHAPES[name], dtype=STORED)


def random_model(config: Any, *, dtype: torch.dtype, device: torch.device, seed: int = 0) -> PreTrainedModel:
    """A model with the random weights that its family begins training with (std 0.02), frozen.

    Args:
        config: of a shape.
        dtype: of the weights, from the start.
        device: where they are drawn.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def random_plan(config: Any, *, kv_budget: str, max_layers_per_group: int | None = None) -> Plan:
    """Layer groups of neighbours whose packed latents take the budget.

    Args:
        config: of a shape.
        kv_budget: share or bytes, as in a recipe; it counts latents only.
        max_layers_per_group: layers of a group; the last one may have fewer. By default as a recipe chooses.

    Raises:
        UsageError: the budget is not readable, or too small or too large for latents.
    """
    layers, kept = split_layers(config)
    kv, defaults = kv_shape(config), PlanConfig()
    source_bytes = len(layers) * kv.values * STORED.itemsize
    budget, spent, groups = parse_budget(kv_budget, source_bytes=source_bytes), 0, []
    size = max_layers_per_group or derive_group_size(budget / source_bytes, kv.values)
    for start in range(0, len(layers), size):
        own = layers[start : start + size]
        room = round(budget * (start + len(own)) / len(layers)) - spent  # of whole bytes, what is left over goes on
        tiers = mixed_tiers(room, len(own) * kv.values // defaults.tier_size, defaults.tier_size)
        spent += RowLayout(tiers, defaults.tier_size).row_bytes
        groups.append(LayerGroup(own, tiers))
    return Plan(
        groups=tuple(groups),
        kv=kv,
        kv_itemsize=STORED.itemsize,
        tier_size=defaults.tier_size,
        window=WINDOW,
        sinks=SINKS,
        flush_block=defaults.flush_block,
        source=defaults.source,
        budget_bytes=budget,
        at_context=None,
        made_from="shape",
        kept_layers=kept,
    )


def mixed_tiers(row_bytes: int, most: int, tier_size: int) -> tuple[int, ...]:
    """Bits of the tiers of a latent that takes a number of bytes, scales included, in the mix of real plans.

    A budget that would want more components than there are raises all widths instead.

    Args:
        row_bytes: of a token.
        most: tiers that a latent of full rank has.
        tier_size: components of a tier.

    Raises:
        UsageError: not even one tier fits, or all do with bytes to spare.
    """
    for raised in range(WIDEST):
        widths = [(bits + raised if bits + raised <= 6 else WIDEST, share) for bits, share in MIX.items()]
        count = largest(partial(_fits, row_bytes, widths, tier_size), most)
        narrow = widths[-1][0] < WIDEST
        if count == most and narrow:
            continue  # there is room for wider components
        if not count:
            break
        tiers = _spend(_fill(count, widths), row_bytes, tier_size)
        if count < most or narrow or RowLayout(tiers, tier_size).row_bytes >= LEAST_SPENT * row_bytes:
            return tiers
        raise UsageError(
            f"{row_bytes} bytes per token are more than a latent of full rank takes",
            expected=f"at most {RowLayout(tiers, tier_size).row_bytes}, {WIDEST} bits per component",
            remedy="lower --kv-budget",
        )
    raise UsageError(
        f"{row_bytes} bytes per token do not hold a latent of {tier_size} components",
        expected=f"at least {1 + tier_size // 8} bytes for each layer group",
        remedy="raise --kv-budget or --max-layers-per-group",
    )


def random_codec(plan: Plan, *, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Codec:
    """Encoders and decoders that neither grow nor shrink what they are given.

    Args:
        plan: groups and ranks.
        dtype: of the matrices, from the start.
        device: where they are drawn.
        seed: of the matrices.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        found = torch.randn(*shape, generator=generator, dtype=dtype, device=device)
        return found.div_(shape[-1] ** 0.5)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    groups = []
    for group in plan.groups:
        size, n, rank = len(group.layers), plan.kv.values, RowLayout(group.tier_bits, plan.tier_size).rank
        groups.append(GroupCodec(draw(rank, n * size), zeros(n * size), draw(size, n, rank), zeros(size, n)))
    return Codec(tuple(groups), made_from="shape")


def _fits(row_bytes: int, widths: list[tuple[int, float]], tier_size: int, count: int) -> bool:
    return RowLayout(_fill(count, widths), tier_size).row_bytes <= row_bytes


def _fill(count: int, widths: list[tuple[int, float]]) -> tuple[int, ...]:
    """Widths of `count` tiers, in shares, most bits first."""
    ends, total = [], 0.0
    for _, share in widths:
        total += share
        ends.append(round(count * total))
    return tuple(next(bits for (bits, _), end in zip(widths, ends, strict=True) if i < end) for i in range(count))


def _spend(tiers: tuple[int, ...], row_bytes: int, tier_size: int) -> tuple[int, ...]:
    """Widen first tiers of a width by a bit as long as that fits."""
    found = list(tiers)
    while True:
        firsts = [i for i in range(1, len(found)) if found[i] < found[i - 1]]
        for i in reversed(firsts):
            wider = [*found[:i], found[i] + 1, *found[i + 1 :]]
            if RowLayout(tuple(wider), tier_size).row_bytes <= row_bytes:
                found = wider
                break
        else:
            return tuple(found)
