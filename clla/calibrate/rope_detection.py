"""How a model turns its keys by their positions, found out from what it does.

A single token attends to itself alone. With rotary positions everything but the rotation of its key is then the same
at every position, so two positions tell which layers rotate (some models leave layers out) and how pairs are laid out.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from clla.calibrate.lossless import check_lossless
from clla.errors import UnsupportedModelError, blamed
from clla.modeling.hooks_clla import CACHE, rope_of, rotary_module
from clla.modeling.rotary_clla import ROPE_FORMS
from clla.source.families import kv_shape
from clla.source.lengths import reach_of
from clla.source.recording import RecordingCache

SAME = 0.02  # relative difference of keys that are the same but for rounding to 16 bits
FAR = 1000  # so far that also slow frequencies have turned
TOKENS = 8


@torch.no_grad()
def rope_settings(model: PreTrainedModel, layers: tuple[int, ...], *, trusted: bool = False) -> dict[str, Any] | None:
    """The `rope` entry of the config's `clla` block.

    Args:
        model: the source.
        layers: convertible layer indices.
        trusted: do not also run the model on a lossless cache, which reads all weights several times.

    Returns:
        `form`, a key of `ROPE_FORMS`, and `plain_layers`, those whose keys are not rotated; None if no key is.

    Raises:
        UnsupportedModelError: keys depend on the position in another way, are not what the config says, or the
            model computes something else when they pass through our cache.
    """
    with blamed(
        f"this {model.config.model_type!r} model cannot be run on a few tokens",
        expected="a config that fits the weights and the code of transformers",
        remedy="correct in its config.json what the reason names, or copy it again",
        kind=UnsupportedModelError,
    ):
        settings = _find_rope(model, layers)
        if not trusted:
            check_lossless(model, layers, settings)
    return settings


def _find_rope(model: PreTrainedModel, layers: tuple[int, ...]) -> dict[str, Any] | None:
    far = reach_of(model.config).fit(FAR + 1) - 1
    near_kv, far_kv = _single_tokens(model, layers, 0), _single_tokens(model, layers, far)
    _check_shapes(model.config, layers, near_kv)
    if not all(tensor.isfinite().all() for kv in (near_kv, far_kv) for pair in kv.values() for tensor in pair):
        raise UnsupportedModelError(
            f"this {model.config.model_type!r} model makes keys or values that are NaN or infinite",
            expected="finite numbers",
            remedy="pass --dtype float32; if that does not help, the model is damaged",
        )
    plain = {i: _difference(near_kv[i][0], far_kv[i][0]) for i in layers}
    if all(value < SAME for value in plain.values()):
        return None
    learned = all(_difference(near_kv[i][1], far_kv[i][1]) > SAME for i in layers)
    try:
        rotates = rotary_module(model) is not None
    except ValueError:  # several modules, and no telling which layer has which
        rotates = learned = False
    if learned and not rotates:
        return None  # positions are in the hidden states: keys are what they are
    for form in ROPE_FORMS if rotates else ():
        turned = _turned_differences(model, form, near_kv, far_kv, far)
        plain_layers = [i for i in layers if turned is not None and plain[i] <= turned[i]]
        if turned is not None and all(min(plain[i], turned[i]) < SAME for i in layers):
            return {"form": form, "plain_layers": plain_layers}
    raise UnsupportedModelError(
        f"the keys of this {model.config.model_type!r} model depend on their positions in an unknown way",
        expected="rotary embeddings in halves or in pairs, learned positions, or none",
        remedy="open an issue naming the model",
    )


def _single_tokens(model: PreTrainedModel, layers: tuple[int, ...], position: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values [B, H, 1, d] of sequences of one token each, at a position."""
    text_config: Any = model.config.get_text_config()
    ids = torch.linspace(0, text_config.vocab_size - 1, TOKENS, device=model.device).long()[:, None]
    options: dict[str, Any] = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        options["position_ids"] = torch.full_like(ids, position)
    cache = RecordingCache(model.config, set(layers))
    model(input_ids=ids, use_cache=True, **{CACHE: cache}, **options)
    return cache.kv


def _check_shapes(config: Any, layers: tuple[int, ...], kv: dict[int, tuple[Tensor, Tensor]]) -> None:
    expected = kv_shape(config)
    wanted = (TOKENS, expected.num_key_value_heads, 1, expected.head_dim)
    for layer in layers:
        if layer not in kv:
            got = "it hands nothing to its cache"
        elif tuple(kv[layer][0].shape) != wanted or kv[layer][1].shape != kv[layer][0].shape:
            got = f"it caches keys {tuple(kv[layer][0].shape[1:])} and values {tuple(kv[layer][1].shape[1:])} a token"
        else:
            continue
        raise UnsupportedModelError(
            f"layer {layer} of this {config.model_type!r} model is not of the standard form: {got}",
            expected=f"keys and values {wanted[1:]} (heads, tokens, head dim) in every layer with full attention",
            remedy="open an issue naming the model",
        )


def _turned_differences(
    model: PreTrainedModel,
    form: str,
    near_kv: dict[int, tuple[Tensor, Tensor]],
    far_kv: dict[int, tuple[Tensor, Tensor]],
    far: int,
) -> dict[int, float] | None:
    """Relative difference of the keys of two positions before RoPE, if it is of this form; None if it cannot be."""
    rope = rope_of(model, {"form": form, "plain_layers": ()})
    assert rope is not None
    try:
        at = [rope(torch.full((1, 1), position, device=model.device)) for position in (0, far)]
        return {i: _difference(at[0].unrotate(near_kv[i][0]), at[1].unrotate(far_kv[i][0])) for i in near_kv}
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None  # what the embedding returns does not fit


def _difference(a: Tensor, b: Tensor) -> float:
    a, b = a.float(), b.float()
    return float((a - b).norm() / a.norm().clamp_min(1e-30))
