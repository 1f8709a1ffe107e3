"""Does a model compute the same when its keys and values pass through our cache and nothing is lost in it?

Attention that reads more than its cache, positions that are counted otherwise, states that forget what came before the
current call: whatever does not fit shows in the logits, so it is found without knowing the family.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from clla.errors import UnsupportedModelError
from clla.modeling.configuration_clla import CllaConfig
from clla.modeling.hooks_clla import attention_modules
from clla.modeling.modeling_clla import CllaForCausalLM, GroupCodecModule
from clla.source.families import kv_shape, split_layers
from clla.source.lengths import reach_of

TOKENS, CHUNK, WINDOW = 48, 12, 8
# Relative error of the logits of four tokens in five: what rounding does not explain, and how often the rounding of one
# layer comes in.
SAME, ROUNDINGS = 0.01, 3.0


class RawLayout:
    """Stands for `RowLayout` and `JoinedLayout`, but keeps every bit of fp32."""

    def __init__(self, *ranks: int) -> None:
        self.rank, self.row_bytes = sum(ranks), 4 * sum(ranks)
        self.parts: tuple[RawLayout, ...] = tuple(map(RawLayout, ranks)) if len(ranks) > 1 else (self,)

    def pack(self, latents: Tensor) -> Tensor:
        return latents.float().contiguous().view(torch.uint8)

    def unpack(self, rows: Tensor, dtype: torch.dtype = torch.float32, *, out: Tensor | None = None) -> Tensor:
        latents = rows.contiguous().view(torch.float32)
        return latents.to(dtype) if out is None else out.copy_(latents)


@torch.no_grad()
def check_lossless(model: PreTrainedModel, layers: tuple[int, ...], rope: dict[str, Any] | None) -> None:
    """Run a few tokens through the model's own forward pass, and in parts through our cache with a lossless codec.

    Args:
        model: the source.
        layers: convertible layer indices.
        rope: how their keys are rotated.

    Raises:
        UnsupportedModelError: the logits differ, or the model cannot run on the cache at all.
    """
    config: Any = model.config
    count = reach_of(config).fit(TOKENS)
    ids = torch.arange(2 * count, device=model.device).view(2, count) * 7919 % config.get_text_config().vocab_size
    expected = model(input_ids=ids).logits
    ran: set[int] = set()
    modules = attention_modules(model)
    hooks = [
        modules[layer].register_forward_pre_hook(lambda *_, layer=layer: ran.add(layer))
        for layer in layers
        if layer in modules
    ]
    try:
        found = _through_the_cache(model, layers, rope, ids)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises that is used in a way it does not know
        raise _refusal(config, f"running on a compressed cache it says: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    if ran != set(layers):
        missing = sorted(set(layers) - ran)
        raise _refusal(config, f"no module named …Attention computes the attention of layers {missing}")
    moved = _difference(found, expected)
    if not moved < SAME and not moved < SAME + ROUNDINGS * _difference(_rounded_once(model, ids), expected):
        raise _refusal(config, f"running on a lossless cache in parts changes its logits by {100 * moved:.1f} %")


def _difference(found: Tensor, expected: Tensor) -> float:
    expected, found = (x.float() - x.float().mean(-1, keepdim=True) for x in (expected, found))  # [B, T, V]
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    return float(errors.quantile(0.8))


def _rounded_once(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits after the embeddings were changed in their last bit: how far rounding alone moves this model."""
    size = torch.finfo(model.dtype).eps

    def disturb(module: Any, args: Any, output: Tensor) -> Tensor:
        signs = torch.rand(output.shape, generator=torch.Generator().manual_seed(0)).to(output.device) > 0.5
        return output * (1 + size * (2.0 * signs - 1)).to(output.dtype)

    handle: Any = model.get_input_embeddings().register_forward_hook(disturb)
    try:
        return model(input_ids=ids).logits
    finally:
        handle.remove()


def _through_the_cache(
    model: PreTrainedModel, layers: tuple[int, ...], rope: dict[str, Any] | None, ids: Tensor
) -> Tensor:
    kv, kept = kv_shape(model.config), split_layers(model.config)[1]
    block = {
        "groups": [{"layers": [layer], "tier_bits": (16,)} for layer in layers],
        "kv": {"num_key_value_heads": kv.num_key_value_heads, "head_dim": kv.head_dim},
        "kv_dtype": str(model.dtype).removeprefix("torch."),
        "kept_layers": kept,
        "prefill_chunk": CHUNK,
        "window": WINDOW,
        "rope": rope,
        "source": "group",
        "tier_size": kv.values,
        "flush_block": 4,
        "sinks": 2,
    }
    with torch.device("meta"):
        converted = CllaForCausalLM(CllaConfig(text_config=model.config, clla=block, dtype=model.dtype))
        codec = GroupCodecModule(1, kv.values, kv.values, kv.values)
    converted.source = model
    converted.watch_decoder()
    eye = torch.eye(kv.values, device=model.device, dtype=model.dtype)
    zeros = eye.new_zeros(kv.values)
    codec.load_state_dict({"encoder": eye, "offset": zeros, "decoder": eye[None], "mean": zeros[None]}, assign=True)
    converted.codec.groups = nn.ModuleList([codec] * len(layers))
    converted.rotation_bucket = 1
    cache = converted.new_cache()
    for group in cache.groups:
        group.layout = RawLayout(kv.values)
    try:
        return converted(ids, past_key_values=cache).logits
    finally:
        converted.release_source()


def _refusal(config: Any, got: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"this {config.model_type!r} model does not run on a compressed cache: {got}",
        expected="attention that reads keys and values from its cache alone, in any number of calls",
        remedy="open an issue naming the model",
    )
