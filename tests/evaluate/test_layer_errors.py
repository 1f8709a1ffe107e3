"""Errors of each layer by itself: against the codec's own arithmetic, and without touching the model."""

from __future__ import annotations

import pytest
import torch
from conftest import pico
from helpers import converted_of, plan_of, stats_of, tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from clla.evaluate.layer_errors import ProbeCache, _Sums, layer_errors
from clla.modeling.codec_clla import before_rope, encode
from clla.modeling.hooks_clla import CACHE
from clla.modeling.modeling_clla import CllaForCausalLM
from clla.modeling.quantize_clla import layout_of

WINDOW, BLOCK, SINKS = 16, 4, 4


def pair(name: str = "llama", bits: int = 2, **options: object) -> tuple[PreTrainedModel, CllaForCausalLM]:
    model = pico(name)
    stats = stats_of(model)
    plan = plan_of(stats, model, bits=bits, window=WINDOW, sinks=SINKS, flush_block=BLOCK, **options)  # type: ignore[arg-type]
    return model, converted_of(model, plan, stats)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_keys_and_values_are_what_the_codec_makes_of_them() -> None:
    """The same by hand: all keys and values of one pass through encoder, quantizer and decoder."""
    model, converted = pair()
    ids = tokens(1, 96)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, use_cache=True, **{CACHE: cache})
        probe = ProbeCache(converted, {})
        probe.timeline.begin(torch.arange(96)[None], None)
        rotation = probe.timeline.rotation(0, 96)
        wanted = {}
        for spec, codec in zip(converted.config.spec.groups, converted.codec.groups, strict=True):
            layout = layout_of(spec)
            own = {i: torch.cat((cache.layers[i].keys, cache.layers[i].values), dim=1) for i in spec.layers}
            flat = before_rope(own, rotation, 2)
            latents = layout.rounded(encode(flat, codec))
            rows = slice(SINKS, 76)  # what the last chunk finds coded, without the sinks
            for index, layer in enumerate(spec.layers):
                n = flat.shape[-1] // len(own)
                true = flat[0, rows, index * n : (index + 1) * n]
                coded = (latents @ codec.decoder[index].mT + codec.mean[index])[0, rows]
                wanted[layer] = (
                    relative(coded[:, : n // 2], true[:, : n // 2]),
                    relative(coded[:, n // 2 :], true[:, n // 2 :]),
                )
    found = layer_errors(converted, ids, chunk=4)
    assert [error.layer for error in found] == sorted(wanted)
    for error in found:
        assert (error.key, error.value) == pytest.approx(wanted[error.layer], rel=1e-4)
        assert error.key > 0.05 and error.output is not None and 0 < error.output < 2


def test_the_model_runs_undisturbed() -> None:
    model, converted = pair()
    ids = tokens(1, 80)
    sums = {layer: _Sums() for layer in range(4)}
    cache, logits = ProbeCache(converted, sums), []
    with torch.no_grad():
        for part in ids.split(10, dim=1):
            logits.append(converted(part, use_cache=True, **{CACHE: cache}).logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits, rtol=1e-4, atol=1e-4)
    assert all(own.error["output"] > 0 for own in sums.values())


def test_nothing_is_lost_with_all_components_and_bits() -> None:
    _, converted = pair(bits=16)
    for error in layer_errors(converted, tokens(2, 64), chunk=16):
        assert max(error.key, error.value, error.output or 0.0) < 2e-3


def test_more_bits_lose_less_in_every_layer() -> None:
    coarse, fine = (layer_errors(pair(bits=bits)[1], tokens(1, 96), chunk=16) for bits in (2, 4))
    for low, high in zip(fine, coarse, strict=True):
        assert low.key < high.key and low.value < high.value


@pytest.mark.parametrize("name", ["ministral", "qwen3_next", "gpt2"])
def test_only_layers_that_share_latents_are_measured(name: str) -> None:
    model, converted = pair(name)
    found = layer_errors(converted, tokens(1, 96), chunk=16)
    shared = sorted(layer for spec in converted.config.spec.groups for layer in spec.layers)
    assert [error.layer for error in found] == shared
    assert len(shared) < model.config.num_hidden_layers or name == "gpt2"
    assert all(error.output is not None and error.output > 0 for error in found)


def test_attention_that_cannot_be_observed_has_no_error() -> None:
    model = pico()
    model.set_attn_implementation("eager")
    stats = stats_of(model)
    converted = converted_of(model, plan_of(stats, model, bits=2, window=WINDOW, sinks=SINKS, flush_block=BLOCK), stats)
    found = layer_errors(converted, tokens(1, 64), chunk=16)
    assert [error.output for error in found] == [None] * 4 and all(error.key > 0.05 for error in found)


def test_the_first_source_without_a_window() -> None:
    model = pico()
    stats = stats_of(model)
    plan = plan_of(stats, model, bits=8, source="first", window=0, sinks=SINKS, flush_block=BLOCK)
    found = layer_errors(converted_of(model, plan, stats), tokens(1, 64), chunk=16)
    assert len(found) == 4 and all(0 < error.key < 2 and error.output is not None for error in found)


def test_text_that_stays_in_the_window_has_no_errors() -> None:
    _, converted = pair()
    assert layer_errors(converted, tokens(1, WINDOW + BLOCK), chunk=4) == ()
