"""TurboQuant: its levels, its rotation, what a key becomes, and the bytes that are really kept."""

from __future__ import annotations

import math

import pytest
import torch
from cache_helpers import B, D, H, feed, stream, vectors
from conftest import pico
from helpers import kept_bytes, tokens
from transformers import LlamaConfig

from clla.baselines.turboquant import FORMS, Rotated, TurboQuantCache, lloyd_max, random_rotation
from clla.errors import UsageError
from clla.evaluate.minmax import pack, unpack


def config_of(layers: int, head_dim: int = D) -> LlamaConfig:
    return LlamaConfig(num_hidden_layers=layers, head_dim=head_dim, dtype="float32")


@pytest.mark.parametrize(("bits", "error"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_levels_are_those_of_max(bits: int, error: float) -> None:
    """Max, IRE Trans. Inf. Theory 1960, table I; each level is the mean of what is nearest to it."""
    levels = torch.tensor(lloyd_max(bits), dtype=torch.float64)
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    density = (-x * x / 2).exp() / math.sqrt(2 * math.pi) * (x[1] - x[0])
    nearest = (x[:, None] - levels).abs().argmin(1)
    assert float((density * (x - levels[nearest]).square()).sum()) == pytest.approx(error, rel=1e-3)
    means = [(density * x)[nearest == i].sum() / density[nearest == i].sum() for i in range(len(levels))]
    torch.testing.assert_close(torch.stack(means), levels, atol=1e-3, rtol=0)


@pytest.mark.parametrize("size", [8, 64, 80])
def test_rotations_are_orthogonal_and_always_the_same(size: int) -> None:
    rotation = random_rotation(size)
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(size), atol=1e-5, rtol=0)
    assert torch.equal(rotation, random_rotation(size)) and not torch.equal(rotation, random_rotation(size, 1))
    assert (rotation.abs().std() < 1e-6) == (size != 80)  # Hadamard where there is one


@pytest.mark.parametrize("bits", [3, 4])
def test_a_key_keeps_its_norm_and_loses_what_the_levels_lose(bits: int) -> None:
    """An outlier channel, which min-max per token cannot bear, is spread over all coordinates."""
    keys = torch.randn(2, 3, 500, 64, generator=torch.Generator().manual_seed(0))
    keys[..., 5] += 30
    codec = Rotated(bits, random_rotation(64))
    codes, norm = codec.encode(keys)
    assert codes.shape == (2, 3, 500, 8 * bits) and codes.dtype == torch.uint8
    assert norm.shape == (2, 3, 500, 1) and norm.dtype == torch.float16
    found = codec.decode(codes, norm)
    torch.testing.assert_close(found.norm(dim=-1), keys.norm(dim=-1), rtol=1e-3, atol=0)
    lost = float((found - keys).square().sum() / keys.square().sum())
    assert 0.7 < lost / {3: 0.03454, 4: 0.009497}[bits] < 1.4
    assert not codec.decode(*codec.encode(torch.zeros(1, 1, 2, 64))).any()


def test_coordinate_by_coordinate() -> None:
    """One key, by a loop: rotate the unit vector, take the nearest level of each coordinate, correct the norm."""
    key, rotation, levels = torch.tensor([3.0, -1, 0.5, 2, 0, 0, 1, -2]), random_rotation(8), lloyd_max(3)
    turned = [sum(float(rotation[i, j] * key[j]) for j in range(8)) / float(key.norm()) for i in range(8)]
    nearest = [min(levels, key=lambda level: abs(level - t * math.sqrt(8))) for t in turned]
    size = math.sqrt(sum(level**2 for level in nearest))
    expected = [float(key.norm()) / size * sum(nearest[i] * float(rotation[i, j]) for i in range(8)) for j in range(8)]
    codec = Rotated(3, rotation)
    torch.testing.assert_close(
        codec.decode(*codec.encode(key.view(1, 1, 1, 8))).flatten(), torch.tensor(expected), rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize("form", FORMS)
def test_layers_and_bytes(form: str) -> None:
    """The ends stay exact; between them keys and values are each what their codec says, the present exact."""
    cache, text = TurboQuantCache(config_of(6), form=form, exact_layers=2), vectors(6, 20)
    feed(cache, text)
    handed = feed(cache, vectors(6, 1))
    for layer, (keys, values) in enumerate(handed):
        same = torch.equal(keys[:, :, :20], text[layer, 0]) and torch.equal(values[:, :, :20], text[layer, 1])
        assert same == (layer in (0, 1, 4, 5))
        if not same:
            bits = FORMS[form][1]
            torch.testing.assert_close(values[:, :, :20], unpack(*pack(text[layer, 1], bits), bits))
    tables = 0 if form == "k8v4" else D * D * 4 + 2 * (4 << FORMS[form][0])  # made from a seed, and from nothing
    assert cache.nbytes == kept_bytes(cache) - tables
    per_head = sum(FORMS[form]) * D // 8 + 4 + (0 if form == "k8v4" else 2)  # codes, scale and minimum, norm
    coded = B * H * 21 * per_head + (4 if form == "k8v4" else 0)
    assert cache.nbytes == 2 * coded + 4 * 2 * B * H * 21 * D * 4


def test_a_model_runs_on_it() -> None:
    model, ids = pico(), tokens(1, 40)
    exact = model(ids).logits[0].log_softmax(-1)
    errors = []
    for form in FORMS:
        found = stream(model, TurboQuantCache(model.config, form=form, exact_layers=1), ids, 8)
        errors.append(float((found - exact).abs().mean()))
    assert 0 < errors[1] < errors[3] < 0.5 and errors[0] > 0


def test_mistakes() -> None:
    with pytest.raises(UsageError, match="form is '2bit'"):
        TurboQuantCache(config_of(2), form="2bit")
    with pytest.raises(UsageError, match="head_dim is 12"):
        TurboQuantCache(config_of(2, 12), form="4bit_nc")
