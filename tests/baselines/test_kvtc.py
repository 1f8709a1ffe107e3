"""KVTC: the transform, its bits, keys turned back and forth, and bytes that are really kept."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch
from cache_helpers import B, D, H, config_of, feed, stream, vectors
from conftest import pico
from helpers import kept_bytes, tokens
from test_xkv import ROPES, models_rope
from torch import Tensor

from clla.baselines.kvtc import Coder, KvtcCache, Transform, allocate, collect, principal
from clla.errors import UsageError
from clla.modeling.quantize_clla import RowLayout
from clla.modeling.rotary_clla import rotate, unrotate

LAYERS = 3
P = LAYERS * H * D


def decaying(count: int, width: int, seed: int = 0) -> Tensor:
    """[count, width] whose principal components fall by a tenth each, around a mean."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    return torch.randn(count, width, generator=generator) * 0.9 ** torch.arange(width) @ basis.mT + 3.0


def coders_of(bits: int = 8) -> tuple[Coder, Coder]:
    transforms = [principal(decaying(400, P, seed), P) for seed in (1, 2)]
    layout = RowLayout((bits,) * (P // 8), 8)
    return Coder(transforms[0], layout), Coder(transforms[1], layout)


def test_components_are_those_of_the_covariance() -> None:
    x = decaying(500, 40)
    found = principal(x, 40)
    covariance = torch.cov(x.mT.double(), correction=0)
    values = torch.linalg.eigvalsh(covariance).flip(0)
    torch.testing.assert_close(found.variances, values, rtol=1e-3, atol=1e-6)
    assert found.total == pytest.approx(float(covariance.trace()), rel=1e-4)
    torch.testing.assert_close(found.basis @ found.basis.mT, torch.eye(40), atol=1e-4, rtol=0)
    own = (x - found.mean) @ found.basis.mT
    torch.testing.assert_close(own.square().mean(0).double(), values, rtol=1e-3, atol=1e-6)


def test_random_projections_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = decaying(600, 300)
    exact, found = principal(x, 300), principal(x, 40)
    assert found.basis.shape == (40, 300)
    torch.testing.assert_close(found.variances, exact.variances[:40], rtol=1e-2, atol=1e-9)
    assert found.total == pytest.approx(exact.total)


def test_bits_go_where_the_variance_is() -> None:
    """Keys a hundred times as large get wider components, and more of them; the budget holds for both together."""
    keys, values = principal(10 * decaying(400, 96, 1), 96), principal(decaying(400, 96, 2), 96)
    for bits in (300, 700):
        coders = allocate(keys, values, bits)
        assert 8 * sum(coder.layout.row_bytes for coder in coders) <= bits
        assert coders[0].layout.row_bytes > coders[1].layout.row_bytes
        assert coders[0].layout.rank > coders[1].layout.rank
    with pytest.raises(UsageError, match="hold no component"):
        allocate(keys, values, 20)


@pytest.mark.parametrize("turning", (None, ROPES["halves"]))
def test_the_past_equals_a_naive_loop(turning: Any) -> None:
    """Two blocks of 8 after three sinks, five tokens of window and two that wait."""
    text, new, coders = vectors(LAYERS, 26), vectors(LAYERS, 2, seed=1), coders_of(3)
    cache = KvtcCache(config_of(LAYERS), turning, coders, window=5, block=8, sinks=3)
    feed(cache, text)
    handed = feed(cache, new)
    expected = torch.cat((text, new), dim=-2)
    for t in range(3, 19):
        for kind, coder in enumerate(coders):
            for b in range(B):
                own = text[:, kind, b, :, t][:, None, :, None]  # [LAYERS, 1, H, 1, D]
                cos, sin = turning(torch.tensor([[t]]))[:2] if turning is not None else (torch.ones(1, 1, 6),) * 2
                if kind == 0 and turning is not None:
                    own = torch.stack([unrotate(x, cos, sin) for x in own])
                row = coder.layout.pack((own.flatten()[None] - coder.transform.mean) @ coder.transform.basis.mT)
                back = coder.layout.unpack(row) @ coder.transform.basis + coder.transform.mean
                back = back.view(LAYERS, 1, H, 1, D)
                if kind == 0 and turning is not None:
                    back = torch.stack([rotate(x, cos, sin) for x in back])
                expected[:, kind, b, :, t] = back[:, 0, :, 0]
    for i, (keys, values) in enumerate(handed):
        torch.testing.assert_close(keys, expected[i, 0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(values, expected[i, 1], atol=1e-4, rtol=1e-4)
        assert torch.equal(keys[:, :, 19:], expected[i, 0][:, :, 19:])


def test_nbytes_is_what_is_stored() -> None:
    """Deflated codes, column by column, sinks and what is exact; never more than zlib's own frame over the codes."""
    coders = coders_of(2)
    cache, text = KvtcCache(config_of(LAYERS), None, coders, window=5, block=8, sinks=3), vectors(LAYERS, 30)
    feed(cache, text)
    coded = 0
    for start in (3, 11):
        for coder, kind in zip(coders, (0, 1), strict=True):
            flat = text[:, kind, :, :, start : start + 8].permute(1, 3, 0, 2, 4).flatten(2)
            coded += len(zlib.compress(coder.pack(flat).movedim(-1, 0).contiguous().numpy().tobytes(), 6))
    exact = (3 + 30 - 19) * LAYERS * 2 * B * H * D * 4
    transforms = 2 * (4 * P + 4 * P * P + 8 * P)  # of the model, not of the sequence
    assert cache.nbytes == kept_bytes(cache) - transforms == coded + exact
    assert coded <= 2 * sum(8 * B * coder.layout.row_bytes + 20 for coder in coders)


def test_state_does_not_depend_on_the_chunks() -> None:
    caches = [KvtcCache(config_of(LAYERS), ROPES["halves"], coders_of(), window=4, block=8, sinks=2) for _ in range(2)]
    text, new = vectors(LAYERS, 33), vectors(LAYERS, 3, seed=9)
    feed(caches[0], text)
    for i in range(33):
        feed(caches[1], text[..., i : i + 1, :])
    for (a, b), (c, d) in zip(*(feed(cache, new) for cache in caches), strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    assert caches[0].nbytes == caches[1].nbytes


def test_a_model_whose_vectors_are_kept_whole_answers_the_same() -> None:
    """Calibrated on the text itself, with all components of 16 bits; with a few of 2 bits something is lost."""
    model, ids = pico(), tokens(4, 60)
    rope = models_rope(model)
    found = collect(model, rope, [ids], sinks=2, window=8)
    assert found[0].shape == found[1].shape == (4 * 50, model.config.num_hidden_layers * 2 * 16)
    exact, errors = model(ids[:1]).logits[0].log_softmax(-1), []
    for bits, share in ((16, 1), (2, 4)):
        layout = RowLayout((bits,) * (found[0].shape[1] // 8 // share), 8)
        coders = [Coder(principal(x, x.shape[1]), layout) for x in found]
        cache = KvtcCache(model.config, rope, (coders[0], coders[1]), window=8, block=8, sinks=2)
        errors.append(float((stream(model, cache, ids[:1], 8) - exact).abs().mean()))
    assert errors[0] < 1e-3 < errors[1]


def test_transforms_hold_what_they_say() -> None:
    transform = principal(decaying(50, 16), 16)
    assert isinstance(transform, Transform) and transform.mean.shape == (16,)
    coder = Coder(transform, RowLayout((8, 8), 8))
    x = decaying(20, 16)[None]
    assert float((coder.unpack(coder.pack(x)) - x).norm() / x.norm()) < 0.05
