"""ThinK: channels chosen, keys stored without the others, and streams in any chunks."""

from __future__ import annotations

import pytest
import torch
from caches import (
    H_Q,
    B,
    D,
    H,
    config_of,
    cuts,
    full_attention,
    logits_of,
    qkv,
    reference_logits,
    stream,
)
from conftest import pico
from helpers import kept_bytes, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from clla.baselines.attention import ObservedModel
from clla.baselines.think import ThinkCache, channel_scores, prune, restore
from clla.errors import UsageError


def test_the_worked_example() -> None:
    key = torch.tensor([1.0, 2.0, 3.0, 4.0])[None, None, None]
    query = torch.tensor([4.0, 3.0, 1.0, 0.9])[None, None, None]
    scores = channel_scores(query, key)
    torch.testing.assert_close(scores, torch.tensor([[[16, 36, 9, 12.96]]]))
    pruned, indices = prune(key, scores, 2)
    assert pruned.tolist() == [[[[1, 2]]]] and indices.tolist() == [[[0, 1]]] and indices.dtype == torch.uint8
    assert restore(pruned[:, :, None], indices[:, :, None], 4).tolist() == [[[[1, 2, 0, 0]]]]


def test_wide_heads_need_wider_indices() -> None:
    key = torch.arange(512.0)[None, None, None]
    pruned, indices = prune(key, channel_scores(key, key), 2)
    assert indices.dtype == torch.int16 and indices.tolist() == [[[510, 511]]]
    assert torch.equal(restore(pruned[:, :, None], indices[:, :, None], 512), key * (key >= 510))


def test_scores_equal_a_naive_loop() -> None:
    query, key, _ = qkv(5)
    scores = channel_scores(query[:, :, -3:], key)
    for b in range(B):
        for head in range(H):
            for channel in range(D):
                asked = [float(query[b, 2 * head + g, t, channel]) ** 2 for g in range(2) for t in range(2, 5)]
                held = [float(key[b, head, t, channel]) ** 2 for t in range(5)]
                assert float(scores[b, head, channel]) == pytest.approx(sum(asked) / 6 * sum(held) / 5, rel=1e-5)


def expected_keys(length: int, ratio: float, recent: int, asked: int, block: int) -> torch.Tensor:
    """Keys as a stream of one token at a time must decode them, by loops."""
    query, key, _ = qkv(length)
    key = key.clone()
    for start in range(0, length - recent - block + 1, block):
        due = start + block + recent
        scores = channel_scores(query[:, :, max(0, due - asked) : due], key[:, :, start : start + block])
        for b in range(B):
            for head in range(H):
                worst = sorted(range(D), key=lambda c: float(scores[b, head, c]))[: int(D * ratio)]
                key[b, head, start : start + block, worst] = 0
    return key


@pytest.mark.parametrize("chunk", (1, 3, 16, 50))
@pytest.mark.parametrize(("recent", "asked", "block"), ((4, 4, 8), (0, 6, 3), (5, 40, 7)))
def test_every_chunking_gives_the_same_state(chunk: int, recent: int, asked: int, block: int) -> None:
    query, key, value = qkv(50)
    cache = ThinkCache(config_of(1), ratio=0.6, recent=recent, queries=asked, block=block)
    stream(cache, (query, key, value), cuts(50, chunk))
    handed = cache.update(key[:, :, :1], value[:, :, :1], 0)
    expected = expected_keys(50, 0.6, recent, asked, block)
    assert torch.equal(handed[0], torch.cat((expected, key[:, :, :1]), 2))
    assert torch.equal(handed[1], torch.cat((value, value[:, :, :1]), 2))
    assert int((expected[:, :, 0] == 0).sum(-1).unique()) == 9  # a test where nothing is pruned would prove nothing


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=10), ratio=st.sampled_from((0.0, 0.3, 0.5, 0.9)))
@settings(deadline=None, max_examples=30)
def test_nbytes_is_what_is_stored(sizes: list[int], ratio: float) -> None:
    cache = ThinkCache(config_of(2), ratio=ratio, recent=6, queries=5, block=8)
    assert cache.nbytes == 0
    tensors, seen = qkv(sum(sizes), dtype=torch.bfloat16), 0
    for size in sizes:
        for layer in range(2):
            stream(cache, tuple(x[:, :, seen : seen + size] for x in tensors), [size], layer)
        seen += size
        blocks, kept = max(0, seen - 6) // 8, D - int(D * ratio)
        keys = blocks * (8 * kept * 2 + kept) + (seen - 8 * blocks) * D * 2
        expected = B * H * (keys + seen * D * 2) + B * H_Q * min(seen, 5) * D * 2
        assert cache.nbytes == kept_bytes(cache) == 2 * expected
        assert cache.get_seq_length() == seen


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_chunk_attends_to_itself_exactly_and_to_pruned_keys(dtype: torch.dtype) -> None:
    query, key, value = tensors = qkv(40, dtype=dtype)
    cache = ThinkCache(config_of(1), ratio=0.5, recent=4, queries=4, block=8)
    out = stream(cache, tensors, [28, 12])
    layer = cache.layers[0]
    assert out.dtype == dtype and layer.pruned.dtype == dtype
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 3e-2}
    first = full_attention(query[:, :, :28], key[:, :, :28], value[:, :, :28])
    torch.testing.assert_close(out[:, :28].float(), first, **tolerance)
    held = restore(layer.pruned, layer.indices, D)[:, :, :24]  # of the first chunk, three blocks
    second = full_attention(query[:, :, 28:], torch.cat((held, key[:, :, 24:]), 2), value)
    torch.testing.assert_close(out[:, 28:].float(), second, **tolerance)


@pytest.mark.parametrize("name", ("llama", "gpt_neox", "qwen2-sliding"))
@pytest.mark.parametrize("chunk", (1, 7, 60))
def test_no_pruning_is_lossless(name: str, chunk: int) -> None:
    model, ids = pico(name), tokens(2, 60)
    cache = ThinkCache(model.config, ratio=0.0, recent=4, block=8)
    logits = logits_of(ObservedModel(model), ids, cache, cuts(60, chunk))
    torch.testing.assert_close(logits, reference_logits(model, ids), atol=2e-4, rtol=2e-4)


def test_pruning_changes_the_logits_of_later_chunks_only() -> None:
    model, ids = pico(), tokens(1, 60)
    cache = ThinkCache(model.config, ratio=0.5, recent=4, block=8)
    difference = (logits_of(ObservedModel(model), ids, cache, [30, 30]) - reference_logits(model, ids)).abs().amax(-1)
    assert float(difference[:, :30].max()) < 1e-3 < float(difference[:, 30:].max())


@pytest.mark.parametrize("wrong", ({"ratio": 1.0}, {"ratio": -0.1}, {"ratio": 0.5, "queries": 0}))
def test_mistakes_are_told(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        ThinkCache(config_of(1), **wrong)
