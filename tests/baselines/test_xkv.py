"""xKV: the shared basis, keys turned back and forth, and bytes that are really kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_helpers import B, D, H, config_of, feed, stream, vectors
from conftest import pico
from helpers import kept_bytes, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clla.baselines.xkv import XkvCache, truncated_svd
from clla.calibrate.rope_detection import rope_settings
from clla.errors import UsageError
from clla.modeling.hooks_clla import rope_of
from clla.modeling.rotary_clla import Rope, rotate, unrotate


def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Three frequencies over six of eight channels."""
    turned = positions[..., None] * torch.tensor([1.0, 0.3, 0.05]).repeat(2)
    return turned.cos(), turned.sin()


ROPES = {form: Rope(angles, form) for form in ("halves", "pairs_of_halves")}


def models_rope(model: Any) -> Rope | None:
    return rope_of(model, rope_settings(model, tuple(range(model.config.num_hidden_layers))))


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 12), columns=st.integers(1, 12), rank=st.integers(1, 14))
@settings(deadline=None, max_examples=40)
def test_truncated_svd_is_the_best_approximation(seed: int, rows: int, columns: int, rank: int) -> None:
    x = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(seed))
    left, right = truncated_svd(x, rank)
    full = min(rank, rows, columns)
    assert left.shape == (2, rows, full) and right.shape == (2, full, columns)
    tail = torch.linalg.svdvals(x)[:, full:].square().sum(-1).sqrt()
    torch.testing.assert_close((x - left @ right).flatten(1).norm(dim=-1), tail, atol=1e-4, rtol=1e-4)


def low_rank_keys(layers: int, count: int, rank: int, form: str) -> Tensor:
    """Keys [layers, B, H, count, D] after RoPE whose columns before it lie in `rank` dimensions."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(B, count, rank, generator=generator)
    flat = basis @ torch.randn(rank, layers * H * D, generator=generator)
    keys = flat.unflatten(-1, (layers, H, D)).permute(2, 0, 3, 1, 4)
    rotation = ROPES[form](torch.arange(count)[None])
    return torch.stack([rotation.rotate(layer) for layer in keys])


@pytest.mark.parametrize("form", ROPES)
def test_rank_one_before_rope_is_enough(form: str) -> None:
    """Keys of one dimension come back exactly, at the positions of every block, and only if turned the right way."""
    text = vectors(4, 23)
    text[:, 0] = low_rank_keys(4, 23, 1, form)
    errors = []
    for turning in (form, *(other for other in ROPES if other != form)):
        cache = XkvCache(config_of(4), ROPES[turning], rank=1, block=8, sinks=3)
        feed(cache, text)
        handed = feed(cache, vectors(4, 1))
        errors.append(max(float((keys[..., :23, :] - text[i, 0]).abs().max()) for i, (keys, _) in enumerate(handed)))
    assert errors[0] < 1e-5 and errors[1] > 0.1


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("turning", (None, ROPES["halves"]))
def test_the_past_equals_a_naive_loop(turning: Any, dtype: torch.dtype) -> None:
    """Six layers in groups of four and two; two blocks of 8 after three sinks, and four exact tokens."""
    text, new = vectors(6, 23, dtype=dtype), vectors(6, 2, seed=1, dtype=dtype)
    cache = XkvCache(config_of(6), turning, rank=4, block=8, sinks=3)
    feed(cache, text)
    handed = feed(cache, new)
    expected = torch.cat((text, new), dim=-2).float()
    for members in ((0, 1, 2, 3), (4, 5)):
        for start in (3, 11):
            rotation = (torch.ones(1, 8, 6), torch.zeros(1, 8, 6))
            if turning is not None:
                rotation = turning(torch.arange(start, start + 8)[None])
            for kind, rank in ((0, 4), (1, 6)):
                for b in range(B):
                    plain = [expected[i, kind, b : b + 1, :, start : start + 8] for i in members]
                    if kind == 0:
                        plain = [unrotate(x, *rotation[:2]) for x in plain]
                    side_by_side = torch.cat([x[0, h] for x in plain for h in range(H)], dim=1)  # [8, G·H·D]
                    u, s, v = torch.linalg.svd(side_by_side, full_matrices=False)
                    rebuilt = (u[:, :rank] * s[:rank]) @ v[:rank]
                    for column, i in enumerate(members):
                        for h in range(H):
                            part = rebuilt[:, (column * H + h) * D :][:, :D][None, None]
                            if kind == 0:
                                part = rotate(part, *rotation[:2])
                            expected[i, kind, b, h, start : start + 8] = part[0, 0]
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for i, pair in enumerate(handed):
        got = torch.stack(pair)
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), expected[i], atol=tolerance, rtol=tolerance)
        assert torch.equal(got[..., :3, :], text[i][..., :3, :])
        assert torch.equal(got[..., 19:, :].float(), expected[i][..., 19:, :])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("sinks", (0, 3))
def test_nbytes_is_what_is_stored(sinks: int, dtype: torch.dtype) -> None:
    """Five layers: a group of four, and one of one that is never of rank above 16."""
    cache, size, block, rank = (
        XkvCache(config_of(5), ROPES["halves"], rank=6, block=20, sinks=sinks),
        dtype.itemsize,
        20,
        6,
    )
    assert cache.nbytes == kept_bytes(cache) == 0
    total = 0
    for step, new in enumerate((19, 1, 2, 1, 60)):
        feed(cache, vectors(5, new, seed=step, dtype=dtype))
        total += new
        done = max(0, total - sinks) // block
        factors = sum((rank + 9) * (block + layers * H * D) for layers in (4, 1)) * B * done * size
        exact = (total - done * block) * 5 * 2 * B * H * D * size
        assert cache.nbytes == kept_bytes(cache) == factors + exact
        assert cache.get_seq_length(3) == cache.get_seq_length() == total


def test_more_than_full_rank_is_full_rank() -> None:
    cache = XkvCache(config_of(1), ROPES["halves"], rank=50, block=20, sinks=0)
    feed(cache, vectors(1, 20))
    assert cache.nbytes == kept_bytes(cache) == 2 * B * 16 * (20 + 16) * 4


def test_state_does_not_depend_on_the_chunks() -> None:
    caches = [XkvCache(config_of(4), ROPES["halves"], rank=3, block=8, sinks=2) for _ in range(2)]
    text, new = vectors(4, 21), vectors(4, 3, seed=9)
    feed(caches[0], text)
    for i in range(21):
        feed(caches[1], text[..., i : i + 1, :])
    for got, expected in zip(feed(caches[0], new), feed(caches[1], new), strict=True):
        assert torch.equal(torch.stack(got), torch.stack(expected))


@pytest.mark.parametrize("name", ("llama", "llama-yarn", "qwen3", "gpt_neox"))
@pytest.mark.parametrize(("chunk", "group_size", "block"), ((1, 4, 16), (7, 3, 16), (5, 1, 40)))
def test_full_rank_reproduces_the_source(name: str, chunk: int, group_size: int, block: int) -> None:
    model, ids = pico(name), tokens(1, 50)
    cache = XkvCache(model.config, models_rope(model), rank=64, group_size=group_size, block=block)
    expected = model(ids).logits[0].log_softmax(-1)
    torch.testing.assert_close(stream(model, cache, ids, chunk), expected, atol=1e-5, rtol=1e-5)


def test_a_low_rank_matters_from_its_first_block_on() -> None:
    model, ids = pico(), tokens(1, 50)
    expected = model(ids).logits[0].log_softmax(-1)
    got = stream(model, XkvCache(model.config, models_rope(model), rank=2, block=20), ids, 8)
    torch.testing.assert_close(got[:24], expected[:24], atol=1e-4, rtol=1e-4)
    assert float((got[24:] - expected[24:]).abs().amax(-1).min()) > 1e-2


def test_sliding_layers_stay_as_they_are() -> None:
    model, ids = pico("qwen2-sliding"), tokens(1, 50)
    cache = XkvCache(model.config, models_rope(model), rank=16, block=16)
    expected = model(ids).logits[0].log_softmax(-1)
    torch.testing.assert_close(stream(model, cache, ids, 8), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wrong", ({"rank": 0}, {"group_size": 0}, {"block": 0}, {"sinks": -1}))
def test_settings_that_cannot_be(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        XkvCache(config_of(4), ROPES["halves"], **{"rank": 4, **wrong})
