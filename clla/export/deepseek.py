"""A checkpoint with decoupled keys and groups of one layer as DeepseekV3, whose kernels many engines have.

Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) is the decoupled key with a latent for each layer. What it
lacks is folded into the weights:

- Softmax scale: DeepseekV3 divides by the root of its own head dim; queries carry the rest.
- The norm on the latent: of a latent made s times smaller, with s² far below ε, x·w/√(x² + ε) is x·w/√ε; with
  w = √ε/s it gives the latent back, but for s²z²/2ε of it.
- ε itself, one for all norms in some engines and fixed for the latent's in others: scaling the whole residual stream
  by √(ε'/ε) makes every norm with ε' what it was with ε.
- Widths that kernels want: zeros behind latents, position-free heads and values.

Shape legend: L layers, H_q query heads, H key-value heads, d head dim, r rank, h hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel

from clla.artifacts.plan import Plan
from clla.errors import CllaError
from clla.modeling.absorbed_clla import split_query
from clla.modeling.hooks_clla import attention_modules, rope_of
from clla.modeling.modeling_clla import CllaForCausalLM

EPS = 1e-6  # of every norm
LATENT_SCALE = 1e-9  # so small that latents of thousands of deviations do not count; far from the least float
LATENT, ROPE = 512, 64  # widths that kernels are made for
HEADS = ((64, 128), (128, 128), (192, 256))  # of the position-free key and the value
FAMILIES = ("llama", "mistral")


def check_expressible(model: CllaForCausalLM, plan: Plan) -> None:
    """Refuse what DeepseekV3 has no place for.

    Args:
        model: the converted model.
        plan: that it runs on.

    Raises:
        CllaError: with every reason, and what helps.
    """
    found = [*_plan_obstacles(model, plan), *_model_obstacles(model)]
    if found:
        raise CllaError(
            "this checkpoint cannot be written as DeepseekV3: " + "; ".join(reason for reason, _ in found),
            expected="a conversion of a plain Llama with decoupled keys and one layer per group",
            remedy="; ".join(dict.fromkeys(remedy for _, remedy in found)),
        )


def _plan_obstacles(model: CllaForCausalLM, plan: Plan) -> list[tuple[str, str]]:
    recipe = "convert the source with --recipe deepseek"
    if not plan.decoupled:
        return [("its keys are decoded whole and rotated afterwards", recipe)]
    found = []
    if any(len(group.layers) > 1 for group in plan.groups):
        found.append(("layers share latents", recipe))
    if plan.kept_layers:
        found.append((f"layers {list(plan.kept_layers)} keep a sliding window or a state", "export another model"))
    ranks = [len(group.tier_bits) * plan.tier_size for group in plan.groups]
    if max(ranks) > LATENT:
        found.append((f"a latent has {max(ranks)} components, kernels take {LATENT}", f"{recipe} and less --kv-budget"))
    if any(len(group.rope_pairs) != ROPE // 2 for group in plan.groups):
        found.append((f"a rotary key has not {ROPE} components", recipe))
    elif not all(_standard(group.rope_pairs, plan.kv.head_dim // 2) for group in plan.groups):
        found.append(("its rotary key turns with other frequencies than the standard ones, each once", recipe))
    names = ("offset", "mean", "rope_mean")
    constants = [getattr(group, name) for group in model.codec.groups for name in names]
    if any(bool(tensor.any()) for tensor in constants):
        found.append(("latents have an offset, for which DeepseekV3 has no bias", recipe))
    return found


def _standard(pairs: tuple[int, ...], count: int) -> bool:
    """Whether pairs of a head of `count` pairs turn like those of a head of as many pairs as there are, in order."""
    return count % len(pairs) == 0 and pairs == tuple(range(0, count, count // len(pairs)))


def _model_obstacles(model: CllaForCausalLM) -> list[tuple[str, str]]:
    config, other = model.config.text_config, "export another model"
    if config.model_type not in FAMILIES:
        return [(f"a {config.model_type!r} model has another form (biases, norms of queries and keys, soft caps, …)",
                 f"models of type {' and '.join(FAMILIES)} can be exported")]  # fmt: skip
    found = []
    biases = [name for name, _ in model.source.named_parameters() if name.endswith(".bias")]
    if biases:
        found.append((f"it has biases ({biases[0]}), DeepseekV3 has none", other))
    if getattr(config, "sliding_window", None):
        found.append(("it has a sliding window", other))
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        kind = rope.get("rope_type", "partial")
        found.append((f"its rotations are scaled ({kind}), DeepseekV3 has them plain", other))
    if _head_dims(model) is None:
        found.append((f"heads of {model.config.spec.head_dim}, at most {HEADS[-1][0]} fit", other))
    return found


def _head_dims(model: CllaForCausalLM) -> tuple[int, int] | None:
    width = model.config.spec.head_dim
    return next(((nope, value) for nope, value in HEADS if width <= min(nope, value)), None)


def deepseek_config(model: CllaForCausalLM) -> DeepseekV3Config:
    """Config of the exported model."""
    config, dims = model.config.text_config, _head_dims(model)
    assert dims is not None, "check_expressible comes first"
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
            "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    fields: dict[str, Any] = {
        **{name: getattr(config, name, None) for name in same},
        "num_key_value_heads": config.num_attention_heads,
        "kv_lora_rank": LATENT,
        "q_lora_rank": None,
        "qk_rope_head_dim": ROPE,
        "qk_nope_head_dim": dims[0],
        "v_head_dim": dims[1],
        "first_k_dense_replace": config.num_hidden_layers,
        "num_nextn_predict_layers": 0,
        "rms_norm_eps": EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]},
        "rope_interleave": True,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "architectures": ["DeepseekV3ForCausalLM"],
    }
    return DeepseekV3Config(**fields)


@torch.no_grad()
def as_deepseek(model: CllaForCausalLM, dtype: torch.dtype) -> PreTrainedModel:
    """The model as DeepseekV3, its latents not quantized, in memory of its own.

    Args:
        model: one that `check_expressible` lets pass.
        dtype: of the weights; not fp16, in which the latent's scale would underflow.
    """
    config, source = deepseek_config(model), model.source.model
    stream = (EPS / model.config.text_config.rms_norm_eps) ** 0.5
    weights: dict[str, Tensor] = {
        "model.embed_tokens.weight": source.embed_tokens.weight.float() * stream,
        "model.norm.weight": source.norm.weight,
        "lm_head.weight": model.source.lm_head.weight,
    }
    for number, layer in enumerate(source.layers):
        at = f"model.layers.{number}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}{norm}.weight"] = getattr(layer, norm).weight
        for part in ("gate_proj", "up_proj"):
            weights[f"{at}mlp.{part}.weight"] = getattr(layer.mlp, part).weight
        weights[f"{at}mlp.down_proj.weight"] = layer.mlp.down_proj.weight.float() * stream
        own = _attention(model, number, config, stream)
        weights |= {f"{at}self_attn.{name}.weight": tensor for name, tensor in own.items()}
    with torch.device("meta"):
        exported = DeepseekV3ForCausalLM(config)
    weights = {name: tensor.to(dtype, copy=True).cpu().contiguous() for name, tensor in weights.items()}
    exported.load_state_dict(weights, strict=True, assign=True)
    exported.model.rotary_emb = type(exported.model.rotary_emb)(config)  # its buffer is no weight
    exported.generation_config = model.generation_config
    return exported.eval().requires_grad_(False)


def _attention(model: CllaForCausalLM, number: int, config: DeepseekV3Config, stream: float) -> dict[str, Tensor]:
    """Weights of one layer's attention, fp32."""
    attention: Any = attention_modules(model.source)[number]
    spec = model.config.spec
    where = next(i for i, group in enumerate(spec.groups) if number in group.layers)
    codec: Any = model.codec.groups[where]
    pairs, heads, width = spec.groups[where].rope_pairs, spec.heads, spec.head_dim
    nope, value = config.qk_nope_head_dim, config.v_head_dim
    rope = rope_of(model.source, spec.rope)
    assert rope is not None and value is not None
    # A projection is a batch of queries, one for each input channel, before their rotation.
    queries = attention.q_proj.weight.float().unflatten(0, (-1, width)).transpose(1, 2)[None]  # [1, H_q, h, d]
    like = rope(torch.zeros(1, 1, dtype=torch.long, device=queries.device))
    still, rotary = split_query(queries, codec, 0, pairs, None, like)
    folded = attention.scaling * (nope + ROPE) ** 0.5
    q = torch.cat((_padded(still[0], nope), rotary[0]), dim=-1).transpose(1, 2).flatten(0, 1) * folded
    latent = codec.encoder.float() * LATENT_SCALE
    down = torch.cat((nn.functional.pad(latent, (0, 0, 0, LATENT - len(latent))), codec.rope_encoder.float()))
    decoder = codec.decoder[0].float().unflatten(0, (2, heads, width))  # [2, H, d, r]
    keys, values = (_padded(x.mT, size).mT for x, size in zip(decoder, (nope, value), strict=True))
    each = torch.cat((keys, values), dim=1).repeat_interleave(config.num_attention_heads // heads, dim=0)
    out = attention.o_proj.weight.float().unflatten(1, (-1, width))
    return {
        "q_proj": q,
        "kv_a_proj_with_mqa": down,
        "kv_a_layernorm": torch.full((LATENT,), EPS**0.5 / LATENT_SCALE),
        "kv_b_proj": _padded(each.flatten(0, 1), LATENT),
        "o_proj": _padded(out, value).flatten(1) * stream,
    }


def _padded(x: Tensor, width: int) -> Tensor:
    """Zeros behind the last axis, up to a width."""
    return nn.functional.pad(x, (0, width - x.shape[-1]))
