"""Healing: the parallel student is the cache's model, the losses are what they say, training helps and can be resumed."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import FAMILY_CONFIGS, pico
from helpers import converted_of, plan_of, stats_of, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from clla.artifacts import Stats
from clla.baselines.stored import SourceCache
from clla.evaluate.perplexity import Subject, compare
from clla.heal.attention import View, masks, mixed_attention, view_of, visible
from clla.heal.losses import chunked_kl, kl_of_logits
from clla.heal.student import Distiller, RecordingCache, hidden_states, make_student, trainable_copy
from clla.heal.targets import fit_codec, group_error, record_targets
from clla.heal.train import Schedule, parameter_groups, train
from clla.modeling.hooks_clla import logits_head
from clla.modeling.modeling_clla import CllaForCausalLM

CHUNK = 24


@lru_cache(maxsize=1)
def source_and_stats(name: str = "llama") -> tuple[PreTrainedModel, Stats]:
    model = pico(name)
    return model, stats_of(model)


def converted(name: str = "llama", **options: Any) -> CllaForCausalLM:
    model, stats = source_and_stats(name)
    if options.get("window") == 0:
        options["sinks"] = 0
    return converted_of(model, plan_of(stats, model, **options), stats, prefill_chunk=CHUNK)


def distiller_of(model: CllaForCausalLM, what: str = "codec") -> Distiller:
    return Distiller(model.source, make_student(model, what))


def in_parallel(distiller: Distiller, ids: Tensor, chunk: int = CHUNK) -> Tensor:
    """Logits of the student on whole sequences."""
    s: Any = distiller.student.config.clla
    view = view_of(ids.shape[1], window=s["window"], flush_block=s["flush_block"], sinks=s["sinks"], chunk=chunk)
    with torch.no_grad():
        _, kv = distiller.teach(ids, with_kv=not distiller.first)
        logits = distiller.student_head(distiller.run_student(ids, kv, view))
    distiller.release()
    return logits


# --- views and attention ---


@given(
    length=st.integers(1, 90), window=st.sampled_from((0, 4, 16)), block=st.sampled_from((1, 4)),
    sinks=st.integers(0, 5), chunk=st.sampled_from((1, 4, 7, 24)),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_views_are_what_the_cache_does(length: int, window: int, block: int, sinks: int, chunk: int) -> None:
    """Token by token, what has left the window is what a cache in use has encoded before each chunk."""
    view = view_of(length, window=window, flush_block=block, sinks=sinks, chunk=chunk)
    exact, latent = masks(view, torch.device("cpu"))
    encoded = filled = 0
    for start in range(0, length, chunk):
        count = min(chunk, length - start)
        for t in range(start, start + count):
            gone = t + 1 if window == 0 else encoded
            for s in range(length):
                assert bool(latent[t, s]) == (sinks <= s < gone and s <= t)
                assert bool(exact[t, s]) == (s <= t and not (sinks <= s < gone))
        filled += count
        if window and filled >= window + block:
            leaving = (filled - window) // block * block
            encoded, filled = encoded + leaving, filled - leaving


@pytest.mark.parametrize("grouped", (1, 3))
def test_mixed_attention_is_one_softmax_over_both(grouped: int) -> None:
    generator = torch.Generator().manual_seed(0)
    heads, length, dim = 2, 37, 8

    def draw(count: int) -> Tensor:
        return torch.randn(2, count, length, dim, generator=generator)

    query, exact, decoded = draw(heads * grouped), (draw(heads), draw(heads)), (draw(heads), draw(heads))
    view = view_of(length, window=8, flush_block=4, sinks=2, chunk=5)
    out = mixed_attention(query, exact, decoded, view, 0.3)
    seen_exactly, _ = masks(view, torch.device("cpu"))
    for b in range(2):
        for h in range(heads * grouped):
            for t in range(length):
                which = [exact if seen_exactly[t, s] else decoded for s in range(t + 1)]
                keys = torch.stack([which[s][0][b, h // grouped, s] for s in range(t + 1)])
                values = torch.stack([which[s][1][b, h // grouped, s] for s in range(t + 1)])
                expected = (query[b, h, t] @ keys.mT * 0.3).softmax(-1) @ values
                torch.testing.assert_close(out[b, t, h], expected, rtol=1e-4, atol=1e-5)


def test_flex_attention_sees_the_same() -> None:
    """What is compiled on a GPU has the same mask as what runs here."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length, view, device = 50, view_of(50, window=8, flush_block=4, sinks=2, chunk=4), torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, length, 16, generator=generator)
    pairs = [
        (torch.randn(1, 2, length, 16, generator=generator), torch.randn(1, 2, length, 16, generator=generator))
    ] * 2
    keys, values = (torch.cat(pair, dim=2) for pair in zip(*pairs, strict=True))
    mask = create_block_mask(visible(view, device), None, None, length, 2 * length, device)
    out: Any = flex_attention(query, keys, values, block_mask=mask, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(out.transpose(1, 2), mixed_attention(query, pairs[0], pairs[1], view, 0.25))


# --- the student ---


@pytest.mark.parametrize("name", sorted(FAMILY_CONFIGS))
def test_heads_give_the_models_logits(name: str) -> None:
    model, ids = pico(name), tokens(2, 20)
    hidden = hidden_states(model, ids, RecordingCache(set()))
    torch.testing.assert_close(logits_head(model)(hidden), model(ids).logits)


@pytest.mark.parametrize("name", sorted(FAMILY_CONFIGS))
@pytest.mark.parametrize(("source", "window"), [("group", 16), ("first", 16), ("first", 0)])
def test_parallel_student_is_the_converted_model(name: str, source: str, window: int) -> None:
    """Few bits with the `first` source, whose latents are the student's own; full rank with `group`."""
    bits = 16 if source == "group" else (4, 4)
    model, ids = converted(name, source=source, window=window, bits=bits), tokens(2, 60)
    distiller = distiller_of(model)
    with torch.no_grad():
        expected = model(ids).logits
    tolerance = 1e-3 if source == "group" else 1e-4
    torch.testing.assert_close(in_parallel(distiller, ids), expected, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        lossless = model.source(ids).logits
    if source == "first":
        assert (expected - lossless).abs().max() > 100 * tolerance  # it is not that nothing was compressed


def test_group_latents_of_the_first_layer_are_the_caches() -> None:
    """Where no layer below loses anything, the teacher's keys and values are the student's."""
    model, ids = converted(bits=(2, 2), groups=((0,),), window=16), tokens(2, 70)
    single = pico("llama")
    single.model.layers = single.model.layers[:1]
    single.config.num_hidden_layers = 1
    stats = stats_of(single, band=1)
    model = converted_of(single, plan_of(stats, single, bits=(2, 2)), stats, prefill_chunk=CHUNK)
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(in_parallel(distiller_of(model), ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", ("codec", "attention", "all"))
def test_copies_share_what_is_not_trained(what: str) -> None:
    model, _ = source_and_stats()
    twin = trainable_copy(model, what)
    own = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    wanted = {"codec": lambda n: False, "attention": lambda n: "self_attn" in n, "all": lambda n: True}[what]
    assert set(own) == {name for name, _ in model.named_parameters() if wanted(name)}
    for name, parameter in model.named_parameters():
        other = twin.get_parameter(name)
        assert (other.data_ptr() == parameter.data_ptr()) == (name not in own), name
        assert torch.equal(other, parameter)


def test_training_leaves_teacher_and_start_alone() -> None:
    model = converted(source="first", bits=(4,))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    distiller = distiller_of(model, "all")
    one_update(distiller, tokens(2, 60))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    changed = [not torch.equal(v, before[k]) for k, v in distiller.student.state_dict().items()]
    assert sum(changed) > len(changed) / 2
    with torch.no_grad():  # and the conversion still listens to its own source
        model(tokens(1, 60))


def one_update(distiller: Distiller, ids: Tensor) -> None:
    schedule = Schedule(1, len(ids), 1e-3, 1e-3, 0.0, 1)
    optimizer = torch.optim.SGD(parameter_groups(distiller, schedule))
    s: Any = distiller.student.config.clla
    view = view_of(ids.shape[1], window=s["window"], flush_block=s["flush_block"], sinks=s["sinks"], chunk=CHUNK)
    distiller(ids, view=view).backward()
    optimizer.step()
    distiller.release()


@pytest.mark.parametrize(("source", "window"), [("group", 16), ("first", 16), ("first", 0)])
def test_gradients_reach_every_trained_tensor(source: str, window: int) -> None:
    distiller = distiller_of(converted(source=source, window=window, bits=(2, 2)), "all")
    view = view_of(60, window=window, flush_block=4, sinks=4 if window else 0, chunk=CHUNK)
    distiller(tokens(2, 60), view=view).backward()
    distiller.release()
    for name, parameter in distiller.student.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        distiller = distiller_of(converted(source="first", bits=(2, 2)), "all")
        if checkpointing:
            distiller.student.source.gradient_checkpointing_enable({"use_reentrant": False})
            distiller.student.source.train()
        distiller(tokens(2, 60), view=view_of(60, window=16, flush_block=4, sinks=4, chunk=4)).backward()
        distiller.release()
        gradients.append({name: p.grad for name, p in distiller.student.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_the_own_cache_trains_decoder_and_weights() -> None:
    """Chunk by chunk the loss is that of the converted model, and its gradient that of a finite difference."""
    model, ids = converted(bits=(2, 2)), tokens(2, 72)
    distiller = distiller_of(model, "all")

    def loss_of(backward: bool) -> float:
        with torch.no_grad():
            hidden, _ = distiller.teach(ids, with_kv=False)
        cache, total = distiller.student.new_cache(), 0.0
        for start in range(0, 72, CHUNK):
            part = slice(start, start + CHUNK)
            loss = distiller(ids[:, part], cache=cache, teacher_hidden=hidden[:, part], start=start) / 3
            if backward:
                loss.backward()
            total += float(loss)
        return total

    with torch.no_grad():
        expected = float(kl_of_logits(model(ids).logits, model.source(ids).logits) / ids.numel())
    assert loss_of(backward=True) == pytest.approx(expected, rel=1e-4)
    decoder: Any = distiller.student.codec.groups[1].decoder
    assert decoder.grad.abs().max() > 0 and distiller.student.codec.groups[1].encoder.grad is None
    head: Any = distiller.student.source.lm_head.weight  # nothing that is kept depends on it
    where = head.grad.abs().flatten().argmax()
    step, found = 1e-2, []
    for sign in (1, -1):
        with torch.no_grad():
            head.flatten()[where] += sign * step
            found.append(loss_of(backward=False))
            head.flatten()[where] -= sign * step
    assert (found[0] - found[1]) / (2 * step) == pytest.approx(float(head.grad.flatten()[where]), rel=0.02)


# --- losses ---


def test_chunked_kl_and_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(50, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    other = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(30, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    fixed = torch.randn(30, 8, generator=generator, dtype=torch.float64)
    p, q = (other @ fixed.mT).softmax(-1), (own @ weight.mT).softmax(-1)
    naive = (p * (p / q).log()).sum(-1).mean()
    expected = torch.autograd.grad(naive, (own, weight))
    found = chunked_kl(own, other, lambda h: h @ weight.mT, lambda h: h @ fixed.mT, rows=7)
    assert float(found) == pytest.approx(float(naive), rel=1e-5)
    for a, b in zip(torch.autograd.grad(found, (own, weight)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_no_more_logits_than_asked_for_live_at_once() -> None:
    largest: list[int] = []

    def head(hidden: Tensor) -> Tensor:
        largest.append(len(hidden))
        return hidden

    chunked_kl(torch.randn(100, 8, requires_grad=True), torch.randn(100, 8), head, head, rows=16).backward()
    assert max(largest) == 16


# --- stage 1 ---


@pytest.mark.parametrize("source", ("group", "first"))
def test_stage_one_brings_attention_outputs_nearer(source: str) -> None:
    distiller = distiller_of(converted(source=source, bits=(2,)))
    sequences = torch.cat([tokens(8, 64, seed) for seed in range(20, 24)])
    seen = fit_codec(distiller, sequences, steps=40, batch=4, lr=3e-3, accelerator=Accelerator(cpu=True))
    assert sum(seen[-5:]) < 0.9 * sum(seen[:5])


def test_targets_are_what_attention_gives() -> None:
    distiller, ids = distiller_of(converted(bits=16)), tokens(2, 50)
    targets = record_targets(distiller, ids)
    view = View((0,) * 50, 0)
    for group in distiller.groups:  # nothing is a latent: only rounding is left
        assert float(group_error(group, targets, distiller.rotation(ids), view, first=False)) < 1e-9


# --- training ---


def held_out_kl(distiller: Distiller) -> float:
    model, student = distiller.teacher, distiller.student
    source = Subject(model, lambda: SourceCache(model.config, torch.float32))
    return compare({"s": source, "c": Subject(student, student.new_cache)}, tokens(3, 128, seed=99), chunk=16)["c"].kl


TEXT = torch.cat([tokens(16, 128, seed) for seed in range(200, 220)])


def run(folder: Path, schedule: Schedule, *, what: str = "all", resume: bool = False, stop: int | None = None) -> Any:
    """Train a lossy pico; `stop` interrupts after so many steps."""
    distiller = distiller_of(converted(bits=(1,), window=8), what)

    class Interrupted(Exception):
        pass

    done: list[int] = []

    def on_step(*_: Any) -> None:
        done.append(1)
        if stop is not None and len(done) == stop:
            raise Interrupted

    progress = None
    try:
        progress = train(
            distiller,
            TEXT,
            schedule,
            evaluate=lambda: held_out_kl(distiller),
            accelerator=Accelerator(cpu=True),
            folder=folder,
            resume=resume,
            on_step=on_step,
        )
    except Interrupted:
        assert stop is not None
    return distiller, progress
