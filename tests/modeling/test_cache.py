"""The cache when something goes wrong, goes back, or goes on in another mode: it is as it was, or says so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import pico
from conversions import BLOCK, CHUNK, FORMS, SINKS, form
from helpers import tokens
from torch import Tensor
from transformers import DynamicCache

from clla.modeling.cache_clla import CllaCache
from clla.modeling.modeling_clla import CllaForCausalLM

CLOSE = {"atol": 2e-4, "rtol": 2e-4}


def new_cache(name: str, length: int = 120, *, lossless: bool = False) -> CllaCache:
    return form(name, lossless).new_cache(length if name == "static" else None)


@torch.no_grad()
def run(name: str, cache: CllaCache, ids: Tensor, *, lossless: bool = False, **options: Any) -> Tensor:
    return form(name, lossless)(ids, past_key_values=cache, **options).logits


def padded(ids: Tensor, padding: int) -> dict[str, Tensor]:
    """Mask and positions with padding before the last sequence."""
    mask = torch.ones_like(ids)
    mask[-1, :padding] = 0
    return {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


# Going back


@pytest.mark.parametrize("name", FORMS)
def test_positive_numbers_are_refused(name: str) -> None:
    """Older scripts mean the length that stays; nothing is dropped."""
    cache = new_cache(name)
    run(name, cache, tokens(2, 30))
    for owner in (cache, *(layer for i, layer in enumerate(cache.layers) if i in cache.group_of_layer)):
        with pytest.raises(ValueError, match="negative number"):
            owner.crop(10)
    assert cache.get_seq_length() == 30


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dropped", [40, 1000])
def test_a_cache_without_tokens_is_a_new_one(name: str, dropped: int) -> None:
    """Also for another number of sequences, and without the padding of those before."""
    cache, ids = new_cache(name), tokens(3, 40, seed=2)
    run(name, cache, tokens(2, 40), **padded(tokens(2, 40), 9))
    cache.crop(-dropped)
    assert cache.get_seq_length() == 0 and cache.timeline.batch is None
    found = [run(name, cache, part) for part in ids.split((30, 1, 9), dim=1)]
    fresh = new_cache(name)
    expected = [run(name, fresh, part) for part in ids.split((30, 1, 9), dim=1)]
    assert torch.equal(torch.cat(found, 1), torch.cat(expected, 1)) and cache.nbytes == fresh.nbytes


@pytest.mark.parametrize("name", ["group", "static", "first", "first without a window", "strict"])
@pytest.mark.parametrize("stays", [3, 11, 20])
def test_dropped_tokens_are_forgotten(name: str, stays: int) -> None:
    """In steps, back into the padding, into what is encoded, into the window: as if only the rest had come."""
    ids, other = tokens(2, 26), tokens(2, 12, seed=5)
    options, caches = padded(ids, 11), [new_cache(name, lossless=True) for _ in range(2)]
    run(name, caches[0], ids, lossless=True, **options)
    for step in (0, -2, stays - 24):
        caches[0].crop(step)
    run(name, caches[1], ids[:, :stays], lossless=True, **{k: v[:, :stays] for k, v in options.items()})
    assert {layer.get_seq_length() for cache in caches for layer in cache.layers} == {stays}
    # No mask: what comes are tokens, even where only padding came before.
    found = [
        [run(name, cache, part, lossless=True) for part in other.split((1, 1, 8, 1, 1), dim=1)] for cache in caches
    ]
    torch.testing.assert_close(*(torch.cat(parts, 1) for parts in found), atol=2e-3, rtol=2e-3)


def test_sliding_layers_that_cannot_go_back_leave_all_as_it_was() -> None:
    cache, ids = new_cache("sliding"), tokens(1, 60)
    run("sliding", cache, ids)
    before = cache.nbytes
    with pytest.raises(RuntimeError, match="past"):
        cache.crop(-5)
    assert {layer.get_seq_length() for layer in cache.layers} == {60} and cache.nbytes == before


# Input that does not fit


def refused(name: str, cache: CllaCache, ids: Tensor, words: str, **options: Any) -> None:
    """Refused with these words, and the cache is what it was."""
    length, nbytes = cache.get_seq_length(), cache.nbytes
    with pytest.raises(ValueError, match=words):
        run(name, cache, ids, **options)
    assert cache.get_seq_length() == length and cache.nbytes == nbytes


@pytest.mark.parametrize("name", ["group", "strict"])
def test_input_of_another_shape_is_refused(name: str) -> None:
    cache, ids = new_cache(name), tokens(2, 40)
    run(name, cache, ids[:, :30])
    new, mask = ids[:, 30:], torch.ones_like(ids)
    refused(name, cache, new, r"attention_mask is \[2, 10\]; \[2, 40\]", attention_mask=mask[:, 30:])
    refused(name, cache, new, r"\[2, 41\]; \[2, 40\]", attention_mask=torch.ones(2, 41))
    refused(name, cache, new, r"\[1, 40\]; \[2, 40\]", attention_mask=mask[:1])
    refused(name, cache, new, r"position_ids are \[2, 9\]", position_ids=torch.arange(9).expand(2, -1))
    refused(name, cache, new, r"position_ids are \[3, 10\]", position_ids=torch.arange(10).expand(3, -1))
    refused(name, cache, tokens(3, 10), "holds 2 sequences of 30 tokens, the input has 3")
    refused(name, cache, new[:, :0], "no tokens")
    refused(name, cache, new, "other numbers than 0 and 1", attention_mask=torch.zeros(2, 40).fill_(-1e4))
    run(name, cache, new, attention_mask=mask)
    assert cache.get_seq_length() == 40


def test_a_long_prompt_with_a_short_mask_is_refused_at_once() -> None:
    """Not when its last chunk comes."""
    cache = new_cache("group")
    refused("group", cache, tokens(2, 100), r"\[2, 90\]; \[2, 100\]", attention_mask=torch.ones(2, 90))


def test_more_tokens_than_a_static_cache_was_made_for_are_refused_at_once() -> None:
    cache = form("group").new_cache(60)
    refused("group", cache, tokens(1, 61), "made for 60 tokens and holds 0, 61 more do not fit.*larger max_cache_len")
    run("group", cache, tokens(1, 60))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["group", "strict"])
def test_masks_of_any_dtype_mean_the_same(name: str) -> None:
    """More tokens than a mask of 8 bits or fp16 could count."""
    ids = tokens(2, 300)
    options, logits = padded(ids, 37), []
    for dtype in (torch.long, torch.bool, torch.int8, torch.uint8, torch.float16, torch.bfloat16, torch.float32):
        cache, mask = new_cache(name), options["attention_mask"].to(dtype)
        for start, stop in ((0, 299), (299, 300)):
            own = {"attention_mask": mask[:, :stop], "position_ids": options["position_ids"][:, start:stop]}
            logits.append(run(name, cache, ids[:, start:stop], logits_to_keep=1, **own))
        assert not cache.timeline.holes
        assert torch.equal(logits[-2], logits[0]) and torch.equal(logits[-1], logits[1])


# Forward passes that fail


class Break:
    """A layer that fails in some call, and the one after which it does so."""

    def __init__(self, layer: Any, call: int, error: BaseException) -> None:
        self.left, self.error = call, error
        self.hook = layer.register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if not self.left:
            self.hook.remove()
            raise self.error


def layers_of(name: str) -> Any:
    return form(name).source.model.layers


@pytest.mark.parametrize("name", [name for name in FORMS if name != "hybrid"])
@pytest.mark.parametrize(
    ("layer", "error"),
    [(0, KeyboardInterrupt()), (1, torch.OutOfMemoryError()), (3, KeyboardInterrupt())],
    ids=[0, 1, 3],
)
def test_a_pass_that_fails_never_was(name: str, layer: int, error: BaseException) -> None:
    """The first chunk, the third of a prompt, a single token; also where the retry has other padding."""
    ids, caches = tokens(2, 90), [new_cache(name) for _ in range(2)]
    options = padded(ids, 13)

    def part(start: int, stop: int) -> dict[str, Tensor]:
        return {"attention_mask": options["attention_mask"][:, :stop],
                "position_ids": options["position_ids"][:, start:stop]}  # fmt: skip

    Break(layers_of(name)[layer], 1, error)
    with pytest.raises(type(error)):
        run(name, caches[0], tokens(3, 20))
    assert caches[0].get_seq_length() == 0 and caches[0].nbytes == caches[1].nbytes
    for call, start, stays, stop in ((3, 0, 2 * CHUNK, 88), (1, 88, 88, 89)):
        Break(layers_of(name)[layer], call, error)
        with pytest.raises(type(error)):
            run(name, caches[0], ids[:, start:stop], **part(start, stop))
        if stays > start:
            run(name, caches[1], ids[:, start:stays], **part(start, stays))
        assert {each.get_seq_length() for held in caches for each in held.layers} == {stays}
        assert caches[0].nbytes == caches[1].nbytes
        assert torch.equal(*(run(name, held, ids[:, stays:stop], **part(stays, stop)) for held in caches))


def test_hybrids_that_cannot_go_back_say_so_until_they_are_reset() -> None:
    cache, ids = new_cache("hybrid"), tokens(2, 50)
    Break(layers_of("hybrid")[3], 1, torch.OutOfMemoryError())
    with pytest.raises(torch.OutOfMemoryError):
        run("hybrid", cache, ids)
    run("hybrid", cache, ids)  # nothing had been there
    other = new_cache("hybrid")
    Break(layers_of("hybrid")[3], 1, torch.OutOfMemoryError())
    with pytest.raises(torch.OutOfMemoryError):
        run("hybrid", other, tokens(3, 50))
    run("hybrid", other, ids)  # fewer sequences fit
    refused("hybrid", cache, tokens(1, 5), "holds 2 sequences")
    Break(layers_of("hybrid")[3], 1, torch.OutOfMemoryError())
    with pytest.raises(torch.OutOfMemoryError):
        run("hybrid", cache, ids[:, :1])
    for use in (lambda: run("hybrid", cache, ids[:, :1]), lambda: cache.crop(-1)):
        with pytest.raises(ValueError, match=r"reset\(\)"):
            use()
    cache.reset()
    fresh = new_cache("hybrid")
    assert torch.equal(run("hybrid", cache, ids), run("hybrid", fresh, ids))


@pytest.mark.parametrize("name", ["group", "static", "first"])
def test_encoding_that_fails_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After all layers have run, when the second group is to be stored."""
    from clla.modeling import group_clla

    ids, caches, calls = tokens(1, 60), [new_cache(name) for _ in range(2)], []

    def failing(*arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return packed(*arguments)

    packed = group_clla.packed
    for each in caches:
        run(name, each, ids[:, :50])
    with monkeypatch.context() as patch:
        patch.setattr(group_clla, "packed", failing)
        with pytest.raises(torch.OutOfMemoryError):
            run(name, caches[0], ids[:, 50:])
    assert caches[0].get_seq_length() == 50 and caches[0].nbytes == caches[1].nbytes
    assert torch.equal(*(run(name, each, ids[:, 50:]) for each in caches))


@pytest.mark.parametrize("name", ["group", "sliding", "strict"])
@pytest.mark.parametrize("change", ["repeat", "select", "reorder"])
def test_other_sequences_come_whole_or_not_at_all(name: str, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is short for the last group."""
    rows = torch.tensor([1, 0])
    changes: dict[str, Callable[[CllaCache], None]] = {
        "repeat": lambda held: held.batch_repeat_interleave(2),
        "select": lambda held: held.batch_select_indices(rows),
        "reorder": lambda held: held.reorder_cache(rows),
    }  # fmt: skip
    ids, caches = tokens(2, 50), [new_cache(name) for _ in range(2)]
    for each in caches:
        run(name, each, ids[:, :49])

    def failing(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(caches[0].groups[-1], "rebatch", failing)
    with pytest.raises(torch.OutOfMemoryError):
        changes[change](caches[0])
    assert caches[0].nbytes == caches[1].nbytes
    assert torch.equal(*(run(name, each, ids[:, 49:]) for each in caches))


# Copies


@pytest.mark.parametrize("name", FORMS)
def test_copies_go_on_by_themselves(name: str) -> None:
    """One prompt, several continuations: as the documentation of transformers does it."""
    prompt, first, second = tokens(2, 45), tokens(2, 12, seed=5), tokens(2, 12, seed=6)
    held = new_cache(name)
    run(name, held, prompt)
    with torch.inference_mode():
        twin = copy.deepcopy(held)
    assert twin.codec is held.codec and twin.nbytes == held.nbytes
    found = [run(name, held, first), run(name, twin, second)]
    for ids, logits in zip((first, second), found, strict=True):
        fresh = new_cache(name)
        run(name, fresh, prompt)
        assert torch.equal(run(name, fresh, ids), logits)


# Modes


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("modes", ["inference no_grad", "no_grad inference", "inference grad", "no_grad grad"])
def test_caches_outlive_the_mode_of_a_call(name: str, modes: str) -> None:
    """Begun in one mode, changed in it, continued in the other by many tokens and by single ones."""
    contexts: dict[str, Callable[[], Any]] = {
        "inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": nullcontext}  # fmt: skip
    first, second = (contexts[mode] for mode in modes.split())
    model, ids, logits = form(name), tokens(2, 48), []
    for context in (second, first):  # the whole in one mode, and a part of it in another
        cache = new_cache(name)
        with context():
            model(ids[:, :30], past_key_values=cache)
            model(ids[:, 30:31], past_key_values=cache)
            cache.reorder_cache(torch.tensor([1, 0]))
            if name not in ("sliding", "hybrid"):
                cache.crop(-1)
        with second():
            model.codec.requires_grad_(modes.endswith(" grad"))  # healing trains it
            parts = [model(part, past_key_values=cache).logits for part in ids[:, 31:].split((1, 16), dim=1)]
            model.codec.requires_grad_(False)
        logits.append(torch.cat(parts, 1))
        if modes.endswith(" grad"):
            logits[-1].square().mean().backward()
    torch.testing.assert_close(*(x.detach() for x in logits), **CLOSE)


@pytest.mark.parametrize("name", ["group", "static", "first", "sliding"])
@pytest.mark.parametrize("of_source", [False, True], ids=["model", "its source"])
def test_the_attention_may_change_between_calls(name: str, of_source: bool) -> None:
    """Also to one that cannot be observed, for weights of a prompt's last token, and back."""
    model, ids, cache = form(name, True), tokens(1, 60), new_cache(name, lossless=True)
    owner = model.source if of_source else model
    found = [run(name, cache, ids[:, :40], lossless=True), run(name, cache, ids[:, 40:41], lossless=True)]
    try:
        for start, implementation in ((41, "eager"), (50, "sdpa")):
            owner.set_attn_implementation(implementation)
            parts = ids[:, start : start + 9].split(1, dim=1)
            found += [run(name, cache, part, lossless=True) for part in parts]
    finally:
        model.set_attn_implementation("sdpa")
    expected = run(name, new_cache(name, lossless=True), ids[:, :59], lossless=True)
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=2e-3, rtol=2e-3)


# Bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_no_cache_is_larger_than_the_sources(name: str) -> None:
    """Token by token until many are in latents.

    A latent of the first layer's input is stored beside exact tokens, too.
    """
    model, ids = form(name), tokens(1, 56)
    cache, own = new_cache(name, 56), DynamicCache(config=model.config.text_config)
    source, rows = pico({"sliding": "qwen2-sliding", "hybrid": "lfm2"}.get(name, "llama")), 0
    with torch.no_grad():
        for part in ids.split(1, dim=1):
            model(part, past_key_values=cache)
            source(part, past_key_values=own)
            if name in ("first", "first without a window"):
                rows = sum(g.layout.row_bytes * (g.filled + min(SINKS, g.encoded)) for g in cache.groups)
            there = own.layers if name != "static" else []
            nbytes = sum(x.nbytes for layer in there for x in tensors_of(layer)) or 56 * bytes_per_token(model)
            assert cache.nbytes <= nbytes + rows, (cache.get_seq_length(), cache.nbytes, nbytes)
    assert cache.groups[0].encoded >= 2 * (BLOCK + SINKS)


def tensors_of(layer: Any) -> list[Tensor]:
    values = [x for x in vars(layer).values() if isinstance(x, Tensor)]
    return values + [x for value in vars(layer).values() if isinstance(value, dict) for x in value.values()
                     if isinstance(x, Tensor)]  # fmt: skip


def bytes_per_token(model: CllaForCausalLM) -> int:
    kv = model.config.clla["kv"]
    return 4 * 4 * 2 * kv["num_key_value_heads"] * kv["head_dim"]
