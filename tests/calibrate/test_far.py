"""Far gradients against autograd through two copies of keys and values, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import pico
from helpers import tokens
from torch import Tensor

from clla.calibrate import collect as collecting
from clla.calibrate import far, importance
from clla.calibrate.collect import Collection, Collector, batch_generator, collect
from clla.calibrate.far import far_attention, gradients
from clla.calibrate.fisher import sampled_label_gradient
from clla.calibrate.importance import LEAST, RIDGE
from clla.calibrate.rope_detection import rope_settings
from clla.calibrate.stream import StreamedCollector
from clla.source.families import kv_shape, split_layers

HEADS, PER_HEAD, LENGTH, SIZE, WINDOW = 2, 3, 70, 8, 16


class Copies:
    """An attention whose near and far queries read copies of their own."""

    def __init__(self, *, softcap: float | None, sink: bool, band: int | None) -> None:
        torch.manual_seed(0)
        query, key, value = (
            torch.randn(2, heads, LENGTH, SIZE, dtype=torch.float64) for heads in (HEADS * PER_HEAD, HEADS, HEADS)
        )
        self.query = query.requires_grad_()
        self.near, self.far = ([x.clone().requires_grad_() for x in (key, value)] for _ in range(2))
        self.softcap = softcap
        self.s_aux = torch.randn(HEADS * PER_HEAD, dtype=torch.float64) if sink else None
        token = torch.arange(LENGTH)
        self.distance = token[:, None] - token
        self.mask = None if band is None else ((self.distance >= 0) & (self.distance < band))[None, None]

    def logits(self, key: Tensor, seen: Tensor) -> Tensor:
        logits = self.query @ key.repeat_interleave(PER_HEAD, 1).mT * 0.3
        logits = logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()
        return logits.masked_fill(~seen, float("-inf"))

    def output(self) -> Tensor:
        seen = self.distance >= 0 if self.mask is None else self.mask[0, 0]
        parts = [
            self.logits(self.near[0], seen & (self.distance < WINDOW)),
            self.logits(self.far[0], seen & (self.distance >= WINDOW)),
        ]
        if self.s_aux is not None:
            parts.append(self.s_aux.view(1, -1, 1, 1).expand(2, -1, LENGTH, 1))
        p = torch.cat(parts, dim=-1).softmax(-1)
        near, distant = (x[1].repeat_interleave(PER_HEAD, 1) for x in (self.near, self.far))
        return p[..., :LENGTH] @ near + p[..., LENGTH : 2 * LENGTH] @ distant


@pytest.mark.parametrize("softcap", (None, 5.0))
@pytest.mark.parametrize("sink", (False, True))
@pytest.mark.parametrize("band", (None, 40))
@pytest.mark.parametrize("rows", (16, 24, LENGTH))
def test_gradients_of_two_copies(
    softcap: float | None, sink: bool, band: int | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of so many queries; soft caps, sinks in the softmax, and a mask of sliding layers."""
    monkeypatch.setitem(far.BLOCK_BYTES, "cpu", 4 * 2 * HEADS * PER_HEAD * LENGTH * rows)
    case, told = Copies(softcap=softcap, sink=sink, band=band), list[Tensor]()
    out = case.output()
    top = torch.randn_like(out)
    out.backward(top)
    settings = far.Settings(case.mask, case.s_aux, 0.3, softcap)
    keys, values = (x.detach() for x in case.near)
    with torch.no_grad():
        torch.testing.assert_close(settings.attended(case.query, keys, values), out)
        found = gradients(case.query, keys, values, out, top, settings, WINDOW, lambda *both: told.extend(both))
    wholes = [case.query.grad, *(a.grad + b.grad for a, b in zip(case.near, case.far, strict=True))]  # type: ignore[operator]
    for a, b in zip((*found, *told), (*wholes, *(x.grad for x in case.far)), strict=True):
        torch.testing.assert_close(a, b)


def collector_of(model: Any, **options: Any) -> Collector:
    layers, _ = split_layers(model.config)
    return Collector(model, Collection(layers, kv_shape(model.config), 2, rope_settings(model, layers), **options))


@pytest.mark.parametrize("name", ("llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "smollm3", "phi3"))
def test_without_near_queries_all_gradients_are_the_same(name: str) -> None:
    """Gradients of queries at least 0 tokens away are all gradients, with whatever attention the family has."""
    model, ids = pico(name), tokens(2, 40)
    plain, distant = collector_of(model), collector_of(model, window=1)
    assert distant.window == 1, "its attention is seen"
    expected = [tap.gradient for tap in plain.watch(ids)]
    distant.window = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clla.calibrate.collect.near_tokens", lambda *_: 0)
        found = [tap.gradient for tap in distant.watch(ids)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_far_queries_alone_count_and_what_is_passed_down_is_whole() -> None:
    """The far gradient of a layer is that of the loss when only its far reading changes, by finite differences."""
    model, ids = pico().double(), tokens(1, 64)
    collector = collector_of(model, window=16)
    taps = collector.watch(ids)
    logits = model(ids).logits
    labels = (logits.softmax(-1) - sampled_label_gradient(logits, batch_generator(0, 0))).argmax(-1)
    generator = torch.Generator().manual_seed(1)
    for number, tap in enumerate(taps):
        values = tap.states[1]  # type: ignore[index]
        nudge = torch.randn(values.shape, generator=generator, dtype=torch.float64)
        found = float((tap.gradients[1].double() * nudge).sum())
        losses = [nudged_loss(model, ids, labels, number, nudge * size) for size in (1e-2, -1e-2)]
        assert found == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=1e-3)


def nudged_loss(model: Any, ids: Tensor, labels: Tensor, layer: int, nudge: Tensor) -> float:
    """Summed loss of labels where queries at least 16 tokens away read other values in one layer."""
    attention = model.model.layers[layer].self_attn
    own = far.attention
    distance = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        out, _ = own(module, query, key, value, mask, **options)
        if module is not attention:
            return out, None
        per_head = query.shape[1] // key.shape[1]
        logits = (query @ key.repeat_interleave(per_head, 1).mT * options["scaling"]).masked_fill(
            distance < 0, float("-inf")
        )
        p = logits.softmax(-1) * (distance >= 16)
        return out + (p @ nudge.repeat_interleave(per_head, 1)).transpose(1, 2), None

    far.AttentionInterface.register(far.NAME, attend)
    try:
        with torch.no_grad(), far_attention(model, 16, lambda *_: None):
            logits = model(ids).logits
    finally:
        far.AttentionInterface.register(far.NAME, own)
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))


def test_what_cannot_be_seen_counts_all_queries() -> None:
    model = pico("falcon-alibi")
    assert collector_of(model, window=16).window == 0
    layers, _ = split_layers(model.config)
    wanted = Collection(layers, kv_shape(model.config), 2, None, window=16)
    stats = StreamedCollector(model, wanted).collect([tokens(2, 64)], made_from="test")
    assert stats.window == 0
    whole = collect(collector_of(model), [tokens(2, 64)], made_from="test")
    torch.testing.assert_close(stats.fisher, whole.fisher, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("streamed", (False, True))
def test_weights_and_metric_share_the_loss(streamed: bool) -> None:
    """E[(gᵀe)²] of errors that are alike for all tokens is what moments and metric say together."""
    model, batches = pico(), [tokens(4, 64, seed) for seed in range(2)]
    collector = collector_of(model, window=16)
    every = [collector.read(batch, number) for number, batch in enumerate(batches)]
    gradients = [torch.cat(rows) for rows in zip(*(read.gradients for read in every), strict=True)]
    values = [torch.cat(rows) for rows in zip(*(read.values for read in every), strict=True)]
    w = torch.zeros(len(gradients[0]))
    for rows in gradients:
        fisher = (rows.mT @ rows).double() / len(rows)
        ridged = fisher + RIDGE * fisher.diagonal().mean() * torch.eye(len(fisher), dtype=torch.float64)
        inverse, wide = ridged.inverse(), rows.double()
        w += (((wide @ inverse) * wide).sum(1) / torch.trace(inverse @ fisher)).float()
    w = (w / len(gradients)).clamp_min(LEAST)
    w = w / w.mean()
    if streamed:
        stats = StreamedCollector(model, collector.wanted).collect(batches, made_from="test")
    else:
        stats = collect(collector, batches, made_from="test")
    for number, (y, rows) in enumerate(zip(values, gradients, strict=True)):
        metric = rows.mT @ (rows / w[:, None]) / len(rows)
        torch.testing.assert_close(stats.fisher[number], metric, rtol=1e-3, atol=1e-7)
        mean = (w[:, None] * y).mean(0)
        torch.testing.assert_close(stats.mean[number], mean, rtol=1e-3, atol=1e-5)
        moments = (y - mean).mT @ (w[:, None] * (y - mean)) / len(rows)
        torch.testing.assert_close(stats.covariance[number, 0], moments, rtol=1e-3, atol=1e-5)


def test_portions_are_the_same_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of a portion's tokens rest on all tokens up to its end, however the text is read."""
    for module in (importance, collecting):
        monkeypatch.setattr(module, "PORTION", 256)
    model, batches = pico(), [tokens(4, 64, seed) for seed in range(3)]
    collector = collector_of(model, window=16)
    found = collect(collector, batches, made_from="test")
    streamed = StreamedCollector(model, collector.wanted).collect(batches, made_from="test")
    for name in ("mean", "covariance", "fisher"):
        value = getattr(found, name)
        torch.testing.assert_close(getattr(streamed, name), value, rtol=1e-3, atol=1e-5 * float(value.abs().max()))
    monkeypatch.setattr(collecting, "PORTION", 10_000)
    at_once = collect(collector_of(model, window=16), batches, made_from="test")
    assert float((at_once.fisher - found.fisher).norm() / found.fisher.norm()) > 1e-3  # portions matter
