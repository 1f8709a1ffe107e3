"""Gradients of keys and values against autograd's own, and layers that run again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import pico
from helpers import tokens
from torch import Tensor, nn
from torch.nn import functional

from clla.artifacts.stats import Stats
from clla.calibrate import recomputation
from clla.calibrate.collect import Collection, Collector, batch_generator, collect, unrotated_gradient
from clla.calibrate.fisher import sampled_label_gradient
from clla.calibrate.rope_detection import rope_settings
from clla.modeling.rotary_clla import Rotation
from clla.source.families import kv_shape, split_layers


def collector_of(model: Any, *, checkpointing: str = "auto", **options: Any) -> Collector:
    layers, _ = split_layers(model.config)
    rope = rope_settings(model, layers)
    wanted = Collection(layers, kv_shape(model.config), 3, rope, **options)
    return Collector(model, wanted, checkpointing=checkpointing)


def same(a: Stats, b: Stats) -> bool:
    pairs = [(x, getattr(b, name)) for name, x in vars(a).items() if isinstance(x, Tensor)]
    return bool(pairs) and all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("scale", (1.0, 1.3))
def test_unrotated_gradients_are_those_of_autograd(interleaved: bool, scale: float) -> None:
    """Partial rotation of 6 of 10 channels, lengths changed as yarn does."""
    angles = torch.rand(1, 7, 3, dtype=torch.float64)
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    rotation = Rotation(scale * angles.cos().float(), scale * angles.sin().float(), interleaved, frozenset({5}))
    keys, gradient = torch.randn(2, 3, 7, 10, requires_grad=True), torch.randn(2, 3, 7, 10)
    for layer in (0, 5):
        (expected,) = torch.autograd.grad(rotation.rotate(keys, layer), keys, gradient)
        torch.testing.assert_close(unrotated_gradient(gradient, rotation, layer), expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_loss_of_the_labels() -> None:
    """The oracle: a zero added to keys and values where they are projected, and autograd's gradient for it."""
    model, ids = pico(), tokens(2, 12)
    taps = collector_of(model).watch(ids)
    logits = model(ids).logits
    labels = (logits.softmax(-1) - sampled_label_gradient(logits, batch_generator(0, 0))).argmax(-1)
    for number, tap in enumerate(taps):
        attention, half = model.model.layers[number].self_attn, tap.gradient.shape[-1] // 2
        zeros = [torch.zeros(2, 12, half, requires_grad=True) for _ in range(2)]
        handles = [
            module.register_forward_hook(lambda _module, _args, out, zero=zero: out + zero)
            for module, zero in zip((attention.k_proj, attention.v_proj), zeros, strict=True)
        ]
        loss = functional.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten(), reduction="sum")
        expected = torch.cat(torch.autograd.grad(loss, zeros), dim=-1)
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(tap.gradient, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_no_weight_has_a_gradient_and_the_graph_begins_at_the_first_keys() -> None:
    model = pico()
    collector = collector_of(model)
    model.requires_grad_(True)
    seen: list[tuple[bool, bool, bool]] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        weights = any(parameter.requires_grad for parameter in model.parameters())
        seen.append((hidden.requires_grad, weights, torch.is_grad_enabled()))

    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in model.model.layers]
    collector.add(tokens(2, 20))
    for handle in handles:
        handle.remove()
    assert [needs for needs, _, _ in seen] == [False, True, True, True]
    assert not any(weights for _, weights, _ in seen) and all(enabled for _, _, enabled in seen)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ("llama", "gpt2", "gemma3_text"))
def test_layers_that_run_again_give_the_same_moments(name: str) -> None:
    model, batches = pico(name), [tokens(2, 40, seed) for seed in range(2)]
    found = [
        collect(collector_of(model, checkpointing=wanted, with_inputs=True), batches, made_from="test")
        for wanted in ("never", "always")
    ]
    assert same(*found)


@pytest.mark.parametrize("room, used", ((1 << 40, False), (1 << 10, True)))
def test_memory_decides_whether_layers_run_again(monkeypatch: pytest.MonkeyPatch, room: int, used: bool) -> None:
    monkeypatch.setattr(recomputation, "free_memory", lambda _: room)
    model, batches = pico(), [tokens(2, 40, seed) for seed in range(3)]
    runs = ran_again(model, collector := collector_of(model), batches)
    assert collector.recomputation.used == used
    assert (runs > len(batches) * len(model.model.layers)) == used


def ran_again(model: Any, collector: Collector, batches: Sequence[Tensor]) -> int:
    """How often feed-forward layers ran."""
    runs: list[int] = []
    handles = [layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1)) for layer in model.model.layers]
    for batch in batches:
        collector.add(batch)
    for handle in handles:
        handle.remove()
    return len(runs)
