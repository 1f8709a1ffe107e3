"""Healing: the parallel student is the cache's model, losses are what they say, training helps and can be resumed."""

from __future__ import annotations

import json
import signal
import time
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import FAMILY_CONFIGS, byte_tokenizer, pico
from forks import Fork
from helpers import clla, converted_of, finish, mostly_slow, plan_of, stats_of, tokens, two_processes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from clla.artifacts.stats import Stats
from clla.errors import CorruptArtifactError, UnsupportedModelError, UsageError
from clla.evaluate.perplexity import Subject, compare
from clla.evaluate.source_cache import SourceCache
from clla.heal.attention import View, _seen, masks, mixed_attention, view_of, visible
from clla.heal.losses import chunked_kl, kl_of_logits
from clla.heal.run import resolve_healing
from clla.heal.steps import component_sizes, relative_steps
from clla.heal.student import Distiller, hidden_states, make_student, trainable_copy
from clla.heal.targets import fit_codec, group_error, record_targets
from clla.heal.text import _packed
from clla.heal.train import Progress, Schedule, enable_checkpointing, last_state, load_trained, parameter_groups, train
from clla.modeling.hooks_clla import logits_head
from clla.modeling.modeling_clla import CllaForCausalLM
from clla.recipe import HealConfig, Recipe
from clla.source.recording import RecordingCache

CHUNK = 24
UNOBSERVED = {"falcon", "falcon-alibi", "gemma2"}


@lru_cache(maxsize=1)
def source_and_stats(name: str = "llama") -> tuple[PreTrainedModel, Stats]:
    model = pico(name)
    return model, stats_of(model)


def letters(batch: int, seed: int) -> Tensor:
    """Sequences [batch, 128] of 24 different tokens, so that there is something to learn about them."""
    return torch.randint(0, 24, (batch, 128), generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize("block", (5, 16, 256))
@pytest.mark.parametrize("grouped", (1, 3))
def test_mixed_attention_is_one_softmax_over_both(grouped: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    heads, length, dim = 2, 37, 8

    def draw(count: int) -> Tensor:
        return torch.randn(2, count, length, dim, generator=generator)

    query, exact, decoded = draw(heads * grouped), (draw(heads), draw(heads)), (draw(heads), draw(heads))
    view = view_of(length, window=8, flush_block=4, sinks=2, chunk=5)
    monkeypatch.setattr("clla.heal.attention.BLOCK", block)
    _seen.cache_clear()
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
    hidden = hidden_states(model, ids, RecordingCache(model.config, set()))
    torch.testing.assert_close(logits_head(model)(hidden), model(ids).logits)


@pytest.mark.parametrize("name", mostly_slow(sorted(FAMILY_CONFIGS.keys() - UNOBSERVED), "llama", "gemma2", "gpt2"))
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
        assert (expected - lossless).abs().max() > 30 * tolerance  # it is not that nothing was compressed


@pytest.mark.parametrize("name", sorted(UNOBSERVED))
def test_models_whose_attention_cannot_be_observed_are_refused(name: str) -> None:
    """Falcon computes attention in its own modules, Gemma 2 has a soft cap that sdpa lacks."""
    with pytest.raises(UnsupportedModelError, match="without healing"):
        in_parallel(distiller_of(converted(name, bits=(2, 2))), tokens(2, 60))


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
        assert parameter.grad is not None, name
        unread = window == 0 and ("k_proj" in name or "v_proj" in name)  # the strict form needs no key or value
        assert (float(parameter.grad.abs().max()) > 0) != unread, name


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        distiller = distiller_of(converted(source="first", bits=(2, 2)), "all")
        if checkpointing:
            enable_checkpointing(distiller.student.source)
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
            total += float(loss.detach())
        return total

    with torch.no_grad():
        expected = float(kl_of_logits(model(ids).logits, model.source(ids).logits) / ids.numel())
    assert loss_of(backward=True) == pytest.approx(expected, rel=1e-4)
    decoder: Any = distiller.student.codec.groups[1].decoder
    assert decoder.grad.abs().max() > 0 and distiller.student.codec.groups[1].encoder.grad.abs().max() == 0
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


@pytest.mark.slow
@pytest.mark.parametrize("source", ("group", "first"))
def test_stage_one_brings_attention_outputs_nearer(source: str) -> None:
    distiller = distiller_of(converted(source=source, bits=(2,)))
    accelerator = Accelerator(cpu=True)
    seen = fit_codec(distiller, letters(32, seed=2), steps=60, batch=4, lr=3e-3, accelerator=accelerator)
    assert sum(seen[-5:]) < 0.7 * sum(seen[:5])


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
    return compare({"s": source, "c": Subject(student, student.new_cache)}, letters(3, seed=99), chunk=16)["c"].kl


TEXT = letters(480, seed=1)


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


SCHEDULE = Schedule(steps=30, batch=8, codec_lr=2e-3, weight_lr=1e-3, cache_share=0.1, evaluations=3)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Distiller, Progress, Path]:
    folder = tmp_path_factory.mktemp("unbroken")
    distiller, progress = run(folder, SCHEDULE)
    return distiller, progress, folder


@pytest.mark.slow
def test_healing_halves_the_held_out_kl(unbroken: tuple[Distiller, Progress, Path]) -> None:
    distiller, progress, _ = unbroken
    assert progress.best.held_out < 0.5 * progress.start_kl and not progress.stopped
    assert held_out_kl(distiller) == pytest.approx(progress.best.held_out, rel=1e-4)  # the best state is what is left
    assert [point.step for point in progress.history] == [0, 10, 20, 30]


@pytest.mark.slow
@pytest.mark.parametrize("stop", (3, 18, 28))
def test_a_run_taken_up_again_equals_an_unbroken_one(
    unbroken: tuple[Distiller, Progress, Path], tmp_path: Path, stop: int
) -> None:
    run(tmp_path, SCHEDULE, stop=stop)
    distiller, progress = run(tmp_path, SCHEDULE, resume=True)
    whole, expected, _ = unbroken
    for name, parameter in whole.student.named_parameters():
        assert torch.equal(distiller.student.get_parameter(name), parameter), name
    assert [p.held_out for p in progress.history] == [p.held_out for p in expected.history]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("step")] == ["step-00000030"]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", (False, True))
def test_sliding_layers_and_checkpointing_train_on_the_cache(checkpointing: bool, tmp_path: Path) -> None:
    """Kept layers hold no graph between chunks; recomputed layers still see the cache, so both give one result."""
    distiller = distiller_of(converted("qwen2-sliding", bits=(2,), window=8), "all")
    schedule = Schedule(4, 4, 1e-3, 1e-4, 0.5, 2, gradient_checkpointing=checkpointing)
    progress = train(
        distiller,
        letters(16, seed=1),
        schedule,
        evaluate=lambda: held_out_kl(distiller),
        accelerator=Accelerator(cpu=True),
        folder=tmp_path,
    )
    assert not progress.stopped and progress.step == 4
    assert progress.history[-1].kl < 5 * progress.start_kl  # without its cache the student would be far off


def test_relative_steps_scale_with_each_component() -> None:
    distiller = distiller_of(converted(bits=(2, 2)))
    sizes = component_sizes(distiller)
    before = [tensor.detach().clone() for tensor, _ in sizes]
    with relative_steps(sizes), torch.no_grad():
        for tensor, _ in sizes:
            tensor += 0.01
    for (tensor, size), old in zip(sizes, before, strict=True):
        torch.testing.assert_close(tensor.detach() - old, (0.01 * size).expand_as(old), rtol=1e-3, atol=1e-6)
    encoder, size = sizes[0]
    assert encoder.shape[0] == size.numel() and float(size[3]) == pytest.approx(
        float(before[0][3].square().mean() ** 0.5)
    )


def test_divergence_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    wild = Schedule(steps=60, batch=4, codec_lr=3.0, weight_lr=3.0, cache_share=0.0, evaluations=6)
    distiller, progress = run(tmp_path, wild)
    assert progress.stopped and progress.step < 60
    assert held_out_kl(distiller) == pytest.approx(progress.start_kl, rel=1e-4)


def test_a_loss_that_is_no_number_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Distiller.forward

    def broken(self: Distiller, *args: Any, **kwargs: Any) -> Tensor:
        return plain(self, *args, **kwargs) * float("nan")

    monkeypatch.setattr(Distiller, "forward", broken)
    distiller, progress = run(tmp_path, SCHEDULE)
    assert "nan" in progress.stopped and progress.step == 0
    assert all(bool(p.isfinite().all()) for p in distiller.student.parameters())


@pytest.mark.slow
def test_damaged_states_are_named(unbroken: tuple[Distiller, Progress, Path], tmp_path: Path) -> None:
    distiller, _, folder = unbroken
    cut, flipped = tmp_path / "cut.safetensors", tmp_path / "flipped.safetensors"
    whole = (folder / "best.safetensors").read_bytes()
    cut.write_bytes(whole[:1000])
    flipped.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    for path in (cut, flipped, tmp_path / "missing.safetensors"):
        with pytest.raises(CorruptArtifactError, match="state"):
            load_trained(distiller, path)


@pytest.mark.slow
def test_half_written_states_are_passed_over(unbroken: tuple[Distiller, Progress, Path], tmp_path: Path) -> None:
    (tmp_path / "step-00000010").mkdir()
    (tmp_path / "step-00000020.partial").mkdir()
    assert last_state(tmp_path) == tmp_path / "step-00000010"
    assert last_state(tmp_path / "nowhere") is None


def test_what_is_kept_back_of_a_short_text_is_not_lacking(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is taken beside what is trained on, as long as there is some."""
    config = HealConfig(dataset=str(text_file), tokens=256, sequence_length=64)
    sequences, held = _packed(config, byte_tokenizer(), 4)
    assert len(sequences) == 4 and len(held) == 4 and "read repeatedly" not in capsys.readouterr().err
    assert not {tuple(row) for row in sequences.tolist()} & {tuple(row) for row in held.tolist()}


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sequences"):
        run(tmp_path, Schedule(steps=1000, batch=4, codec_lr=1e-3, weight_lr=1e-3, cache_share=0, evaluations=1))


@given(steps=st.integers(1, 300), evaluations=st.integers(1, 20), share=st.floats(0, 1))
@settings(deadline=None)
def test_schedules_measure_at_the_end_and_never_stand_still(steps: int, evaluations: int, share: float) -> None:
    schedule = Schedule(steps, 1, 1e-3, 1e-3, share, evaluations)
    due = [step for step in range(1, steps + 1) if schedule.is_due(step)]
    assert due[-1] == steps and len(due) == min(steps, evaluations)
    assert all(0 < schedule.pace(step) <= 1 for step in range(steps))
    assert 0 <= schedule.cached_from <= steps


@pytest.mark.parametrize(("share", "trained"), [(0.125, "codec"), (0.0625, "all"), (0.02, "all")])
def test_defaults_follow_the_budget_and_the_batch(share: float, trained: str) -> None:
    plan: Any = SimpleNamespace(row_bytes=share * 1000, source_bytes_per_token=1000, decoupled=False)
    recipe = Recipe().override({"calibration": {"dataset": "a.txt"}})
    found = {d: resolve_healing(HealConfig(), plan, recipe, torch.device(d)) for d in ("cpu", "cuda")}
    for config in found.values():
        assert config.train == trained and config.dataset == "a.txt"
        assert config.weight_lr == pytest.approx(config.codec_lr / 10)
    assert found["cuda"].codec_lr == 1e-3 and found["cpu"].codec_lr == pytest.approx(1e-3 * (2048 / 65536) ** 0.5)
    assert found["cuda"].tokens > found["cpu"].tokens
    given = HealConfig(
        tokens=5, train="attention", codec_lr=1e-5, batch_tokens=64, dataset="b.txt", weight_lr=1.0, sequence_length=64
    )
    assert resolve_healing(given, plan, recipe, torch.device("cpu")) == given


# --- the command line ---

SMALL = ["--tokens", "8192", "--sequence-length", "128", "--batch-tokens", "512", "--device", "cpu"]
SMALL += ["--codec-lr", "5e-4", "--weight-lr", "5e-5"]
BRIEF = [*SMALL, "--tokens", "2048"]  # where it does not matter what is learnt


@pytest.mark.slow
def test_heal_writes_a_checkpoint_that_loads_and_tells(checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "healed"
    done = clla("heal", checkpoint, "-o", out, *SMALL, "--train", "attention", "--json")
    assert done.exit_code == 0, done.output + done.stderr
    told = json.loads(done.stdout)["healing"]
    history = told["history"]
    assert history[0]["tokens"] == 0 and history[-1]["tokens"] == 8192
    report = json.loads((out / "clla_report.json").read_text())
    converted = json.loads((checkpoint / "clla_report.json").read_text())
    assert converted["outlook"]["spectra"] and report["outlook"] == converted["outlook"]
    assert report["healing"] == told and "Healing took" in told["verdict"]
    before, after = told["before"], report["measured"]
    assert after["converted"]["kl"] > 0 and told["history"][-1]["held_out"] < told["history"][0]["held_out"]
    assert before["source"]["perplexity"] == pytest.approx(after["source"]["perplexity"])
    assert {"nll", "exact"} <= after["retrieval"]["converted"].keys()
    assert (out / "clla_healing.png").stat().st_size > 5000
    assert "trained briefly against the source (`attention`" in (out / "README.md").read_text()
    model, source = (AutoModelForCausalLM.from_pretrained(p, trust_remote_code=True) for p in (out, checkpoint))
    changed = {n for n, p in model.source.named_parameters() if not torch.equal(p, source.source.get_parameter(n))}
    assert changed and all("self_attn" in name for name in changed)
    assert model.generate(tokens(1, 40), max_new_tokens=5).shape == (1, 45)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_healing_again_needs_the_source(checkpoint: Path, tmp_path: Path, pico_dir: Path) -> None:
    """Weights that were trained are no teacher; the recipe says where the source is."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert clla("heal", checkpoint, "-o", once, *BRIEF, "--train", "all", "--no-eval").exit_code == 0
    text = (once / "clla_recipe.yaml").read_text()
    assert str(pico_dir) in text
    done = clla("heal", once, "-o", twice, *BRIEF, "--no-eval", "--json")
    assert done.exit_code == 0, done.output + done.stderr
    start = json.loads(done.stdout)["healing"]["history"][0]["held_out"]
    first = json.loads((once / "clla_report.json").read_text())["healing"]["history"]
    assert start == pytest.approx(min(point["held_out"] for point in first), rel=0.02)
    (once / "clla_recipe.yaml").write_text(text.replace(str(pico_dir), str(tmp_path / "gone")))
    (once / "clla_checksums.json").unlink()
    refused = clla("heal", once, "-o", tmp_path / "no", *SMALL, "--no-eval")
    assert refused.exit_code == 1 and "gone" in refused.stderr


@pytest.mark.slow
def test_convert_heals_at_once(pico_dir: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"budget: {{kv_budget: 1.5%, budget_context: 0, exact_window: 8}}\n"
        f"calibration: {{dataset: {text_file}, tokens: 2048, sequence_length: 128}}\n"
        f"heal: {{sequence_length: 128, batch_tokens: 512, tokens: 4096, codec_share: 0.25, codec_lr: 5.0e-4,\n"
        f"       weight_lr: 5.0e-5}}\n"
    )
    out = tmp_path / "healed"
    done = clla("convert", pico_dir, "-o", out, "--recipe", recipe, "--json")
    assert done.exit_code == 0, done.output + done.stderr
    told = json.loads(done.stdout)
    history = told["healing"]["history"]
    assert [p["tokens"] for p in history[:2]] == [0, 1024] and history[1]["step"] == 0  # before and after stage 1
    assert told["healing"]["config"]["train"] == "all" and 1024 < history[-1]["tokens"] <= 4096
    assert told["measured"]["converted"]["kl"] > 0 and told["healing"]["before"]["converted"]["kl"] > 0
    refused = clla("convert", pico_dir, "-o", tmp_path / "no", "--heal", "--codec-only", "--dataset", text_file)
    assert refused.exit_code == 2 and "codec" in refused.stderr
    refused = clla("convert", pico_dir, "-o", tmp_path / "no", "--heal-tokens", "5")
    assert refused.exit_code == 2 and "--heal" in refused.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("usual_rotations")
def test_a_killed_run_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of training, then --resume: the same weights as without the kill."""
    from safetensors.torch import load_file

    command = ["heal", checkpoint, *BRIEF, "--tokens", "4096", "--train", "codec", "--no-eval", "--evaluations", "4"]
    whole, broken, work = tmp_path / "whole", tmp_path / "broken", tmp_path / "work"
    assert clla(*command, "-o", whole).exit_code == 0
    arguments = [str(a) for a in (*command, "-o", broken, "--work-dir", work)]
    process = Fork("-m", "clla", *arguments)
    deadline = time.monotonic() + 120
    while not list(work.glob("heal/step-0000000*")) and not process.ended() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not broken.exists()
    done = clla(*arguments, "--resume")
    assert done.exit_code == 0, done.output + done.stderr
    a, b = load_file(whole / "model.safetensors"), load_file(broken / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.usefixtures("usual_rotations")
def test_two_processes_equal_one(checkpoint: Path, tmp_path: Path) -> None:
    """Data-parallel training: the mean of two half batches' gradients is the whole batch's."""
    from safetensors.torch import load_file

    command = ["heal", checkpoint, *BRIEF, "--train", "all", "--no-eval", "--evaluations", "1"]
    one, two, work = tmp_path / "one", tmp_path / "two", tmp_path / "work"
    assert clla(*command, "-o", one).exit_code == 0
    finish(two_processes("-m", "clla", *command, "-o", two, "--work-dir", work))
    assert len(list(work.glob("heal/step-*/random_states_*"))) == 2
    for name, value in load_file(one / "model.safetensors").items():
        torch.testing.assert_close(load_file(two / "model.safetensors")[name], value, rtol=1e-3, atol=2e-5, msg=name)
    histories = [json.loads((path / "clla_report.json").read_text())["healing"]["history"] for path in (one, two)]
    for a, b in zip(*histories, strict=True):
        assert (a["step"], a["tokens"]) == (b["step"], b["tokens"])
        assert a["held_out"] == pytest.approx(b["held_out"], rel=1e-3)
    assert histories[0][1]["kl"] == pytest.approx(histories[1][1]["kl"], rel=1e-3)
    assert histories[0][1]["held_out"] != histories[0][0]["held_out"]


@pytest.mark.slow
def test_another_run_is_not_taken_up(checkpoint: Path, tmp_path: Path) -> None:
    command = ["heal", checkpoint, *BRIEF, "--train", "codec", "--no-eval", "--work-dir", tmp_path / "work"]
    assert clla(*command, "-o", tmp_path / "one").exit_code == 0
    refused = clla(*command, "-o", tmp_path / "two", "--resume", "--seed", "7")
    assert refused.exit_code == 2 and "seed" in refused.stderr
    assert clla(*command, "-o", tmp_path / "two", "--resume").exit_code == 0  # finished already: nothing is left to do


def test_windows_longer_than_the_sequences_are_refused(pico_dir: Path, text_file: Path, tmp_path: Path) -> None:
    options = ["--exact-window", "128", "--budget-context", "0", "--dataset", text_file, "--calibration-tokens", "1024"]
    out = tmp_path / "out"
    assert clla("convert", pico_dir, "-o", out, *options, "--sequence-length", "128", "--no-eval").exit_code == 0
    refused = clla("heal", out, *SMALL, "--no-eval")
    assert refused.exit_code == 2 and "--sequence-length" in refused.stderr


@pytest.mark.parametrize(
    ("section", "flags", "word"),
    [
        ("{sequence_length: 64}", [], "raise heal.sequence_length, or"),
        ("{sequence_length: 256, batch_tokens: 128}", [], "heal.batch_tokens"),
        ("{sequence_length: 256, tokens: 100}", [], "heal.tokens"),
        ("{}", ["--report-to", "magic"], "--report-to"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_calibration(
    pico_dir: Path, text_file: Path, tmp_path: Path, section: str, flags: list[str], word: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"calibration: {{dataset: {text_file}}}\nbudget: {{exact_window: 32}}\nheal: {section}\n")
    out = tmp_path / "out"
    refused = clla("convert", pico_dir, "-o", out, "--recipe", recipe, *flags)
    assert refused.exit_code == 2 and word in refused.stderr
    assert not out.exists() and not (tmp_path / "out.work").exists()


def test_a_full_disk_is_found_before_training(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clla.checkpoint import write as checking

    usage = type("Usage", (), {"free": 1_000_000})()
    monkeypatch.setattr(checking.shutil, "disk_usage", lambda path: usage)
    refused = clla("heal", checkpoint, "-o", tmp_path / "out", *SMALL, "--train", "all", "--no-eval")
    assert refused.exit_code == 1 and "GB free" in refused.stderr and not (tmp_path / "out").exists()


def test_too_little_device_memory_says_what_helps(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clla.heal import train as training

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(training, "_one_step", full)
    refused = clla("heal", checkpoint, "-o", tmp_path / "out", *SMALL, "--no-eval")
    assert refused.exit_code == 1 and "--gradient-checkpointing" in refused.stderr


def test_a_name_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    for name in ("nobody/nothing", str(tmp_path / "missing")):
        refused = clla("heal", name, "-o", tmp_path / "out", "--no-eval")
        assert refused.exit_code == 1 and "Error: " in refused.stderr and name in refused.stderr
        assert "a directory or Hub id" in refused.stderr and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_eval_measures_a_healed_model_against_its_source(checkpoint: Path, tmp_path: Path, text_file: Path) -> None:
    healed = tmp_path / "healed"
    assert clla("heal", checkpoint, "-o", healed, *SMALL, "--train", "all", "--no-eval").exit_code == 0
    options = ["--text", text_file, "--num-samples", 1, "--sequence-length", 256, "--contexts", "256", "--no-retrieval"]
    found = [json.loads(clla("eval", path, *options, "--json").stdout) for path in (checkpoint, healed)]
    assert found[0]["source"] == found[1]["source"]
    assert found[0]["converted"] != found[1]["converted"]


@pytest.mark.slow
def test_text_of_its_own_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    options = ["--tokens", "2048", "--sequence-length", "64", "--batch-tokens", "256", "--device", "cpu", "--no-eval"]
    done = clla("heal", checkpoint, "-o", tmp_path / "out", *options, "--dataset", "self", "--work-dir", tmp_path / "w")
    assert done.exit_code == 0, done.output + done.stderr
    assert len(list((tmp_path / "w" / "heal").glob("text-*.safetensors"))) == 1


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--train", "everything"], "heal.train"),
        (["--batch-tokens", "64"], "batch_tokens"),
        (["--dataset", "no/such/file.txt"], "does not exist"),
        (["--cache-share", "2"], "heal.cache_share"),
        (["--report-to", "magic"], "--report-to"),
        (["--source-model", "no/such/model"], "no/such/model"),
    ],
)
def test_bad_options_are_named(checkpoint: Path, tmp_path: Path, options: list[str], word: str) -> None:
    done = clla("heal", checkpoint, "-o", tmp_path / "out", *SMALL, *options, "--no-eval")
    assert done.exit_code in (1, 2) and word in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
