"""LESS: kept and evicted tokens in one softmax, states that do not depend on the chunks, and maps that learn."""

from __future__ import annotations

import math

import pytest
import torch
from caches import (
    H_Q,
    SCALING,
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
from torch import Tensor

from clla.baselines.attention import ObservedModel
from clla.baselines.less import FeatureMaps, LessCache, LessMaps, merge
from clla.baselines.less_training import (
    _capture,
    _CapturingLayer,
    evicted_part,
    output_error,
    simulate,
    train_feature_maps,
)
from clla.errors import UsageError

G, RANK = H_Q // H, 3


def random_maps(layers: int = 1, *, seed: int = 0) -> LessMaps:
    """Untrained maps with another scale in every head."""
    generator = torch.Generator().manual_seed(seed)
    built = []
    for _ in range(layers):
        maps = FeatureMaps((H, G), D, rank=RANK, hidden=5, generator=generator)
        maps.log_scale.data.copy_(torch.linspace(-3, 3, H_Q).view(H, G))
        built.append(maps.requires_grad_(False))
    return LessMaps(tuple(built))


class ConstantMaps(FeatureMaps):
    """φ is a constant, ψ is 1."""

    def __init__(self, phi: float) -> None:
        super().__init__((1, 1), 1, rank=1, hidden=1, generator=torch.Generator())
        self.phi = phi

    def of_queries(self, query: Tensor) -> Tensor:
        return torch.full((1, 1, 1, query.shape[2], 1), self.phi)

    def of_keys(self, key: Tensor) -> Tensor:
        return torch.ones(1, 1, key.shape[2], 1)


def test_the_worked_example() -> None:
    kept, zero = torch.tensor([1.0]), torch.tensor(0.0)
    assert float(merge(kept, zero, zero, torch.tensor(1.0), torch.tensor([3.0]))) == 2.0
    assert float(merge(kept, zero, zero, zero, torch.tensor([0.0]))) == 1.0


@pytest.mark.parametrize(("phi", "expected"), ((0.0, 1.0), (2.0, 2.0), (6.0, 2.5)))
def test_the_worked_example_in_a_stream(phi: float, expected: float) -> None:
    """Value 3 leaves; two tokens with value 1 stay, each with logit 0: (2 + 3 φ) / (2 + φ)."""
    cache = LessCache(config_of(1), LessMaps((ConstantMaps(phi).requires_grad_(False),)), capacity=1, sinks=0, block=1)
    nothing = torch.zeros(1, 1, 3, 1)
    value = torch.tensor([3.0, 1.0, 1.0]).view(1, 1, 3, 1)
    assert float(stream(cache, (nothing, nothing, value), [2, 1])[0, 2]) == pytest.approx(expected, rel=1e-6)


def test_any_difference_in_scale_is_stable() -> None:
    for log_scale, kept_log, expected in ((1e4, 0.0, 3.0), (-1e4, 0.0, 1.0), (0.0, 1e4, 1.0), (1e4, 1e4, 2.0)):
        mass, total = torch.tensor(1.0, requires_grad=True), torch.tensor([3.0])
        out = merge(torch.tensor([1.0]), torch.tensor(kept_log), torch.tensor(log_scale), mass, total)
        out.sum().backward()
        assert float(out.detach()) == pytest.approx(expected) and bool(mass.grad.isfinite())
    mass = torch.zeros((), requires_grad=True)
    merge(torch.tensor([1.0]), torch.tensor(0.0), torch.tensor(5.0), mass, mass[None] * 3).sum().backward()
    assert bool(mass.grad.isfinite())


def naive_output(
    maps: FeatureMaps, tensors: tuple[Tensor, Tensor, Tensor], t: int, head: int, evicted: list[int], kept: list[int]
) -> Tensor:
    """[D] of one query of the first sequence: the fraction of the paper, term by term, in fp64."""
    query, key, value = (x.double() for x in tensors)
    phi = maps.of_queries(tensors[0])[0, head // G, head % G, t].double() * math.exp(maps.log_scale.flatten()[head])
    psi = maps.of_keys(tensors[1])[0, head // G].double()
    above, below = torch.zeros(D, dtype=torch.float64), 0.0
    for s in kept:
        weight = math.exp(float(query[0, head, t] @ key[0, head // G, s]) * SCALING)
        above, below = above + weight * value[0, head // G, s], below + weight
    for s in evicted:
        weight = float(phi @ psi[s])
        above, below = above + weight * value[0, head // G, s], below + weight
    return above / below


@pytest.mark.parametrize("sizes", ([20, 11], [16] + [1] * 15, [5] * 6 + [1]))
def test_a_stream_equals_the_naive_fraction(sizes: list[int]) -> None:
    tensors, maps = qkv(31), random_maps()
    cache = LessCache(config_of(1), maps, capacity=8, sinks=2, block=3)
    out = stream(cache, tensors, sizes)
    t, held_before = 30, 31 - sizes[-1]
    gone = 2 + max(0, held_before - 10) // 3 * 3
    for head in range(H_Q):
        expected = naive_output(maps.layers[0], tensors, t, head, list(range(2, gone)), [0, 1, *range(gone, 31)])
        torch.testing.assert_close(out[0, t, head].double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", (3, 10, 40))
def test_every_chunking_gives_the_same_state(chunk: int) -> None:
    tensors, states = qkv(45), []
    for sizes in (cuts(45, 1), cuts(45, chunk)):
        cache = LessCache(config_of(1), random_maps(), capacity=9, sinks=3, block=4)
        stream(cache, tensors, sizes)
        layer = cache.layers[0]
        states.append((layer.keys, layer.values, layer.sums, layer.mass))
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)
    held = [*range(3), *range(35, 45)]  # 33 tokens too many, of which 32 are whole blocks
    assert torch.equal(states[1][0], tensors[1][:, :, held]) and torch.equal(states[1][1], tensors[2][:, :, held])


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8), sinks=st.integers(0, 4), block=st.integers(1, 7))
@settings(deadline=None, max_examples=30)
def test_nbytes_is_what_is_stored(sizes: list[int], sinks: int, block: int) -> None:
    cache = LessCache(config_of(2), random_maps(2), capacity=12, sinks=sinks, block=block)
    assert cache.nbytes == 0
    tensors, seen = qkv(sum(sizes), dtype=torch.bfloat16), 0
    for size in sizes:
        for layer in range(2):
            stream(cache, tuple(x[:, :, seen : seen + size] for x in tensors), [size], layer)
        seen += size
        surplus = max(0, seen - sinks - 12)
        held = seen - surplus // block * block
        assert held < sinks + 12 + block
        state = B * H * RANK * (D + 1) * 4 if held < seen else 0
        assert cache.nbytes == kept_bytes(cache) == 2 * (2 * B * H * held * D * 2 + state)
        assert cache.get_seq_length() == seen


def test_bf16_comes_back_as_bf16() -> None:
    tensors = qkv(40, dtype=torch.bfloat16)
    cache = LessCache(config_of(1), random_maps(), capacity=50)
    out = stream(cache, tensors, cuts(40, 15))
    assert out.dtype == torch.bfloat16 and cache.layers[0].keys.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), full_attention(*tensors), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("name", ("llama", "gpt_neox", "qwen2-sliding"))
@pytest.mark.parametrize("chunk", (1, 7, 60))
def test_a_capacity_above_the_text_is_lossless(name: str, chunk: int) -> None:
    model, ids = pico(name), tokens(2, 60)
    maps = train_feature_maps(model, [tokens(1, 40)], capacity=20, steps=1)
    cache = LessCache(model.config, maps, capacity=60)
    logits = logits_of(ObservedModel(model), ids, cache, cuts(60, chunk))
    torch.testing.assert_close(logits, reference_logits(model, ids), atol=2e-4, rtol=2e-4)


def test_training_sees_what_a_stream_sees() -> None:
    """The parallel form over sampled positions is the cache of one token at a time."""
    tensors, maps = qkv(40), random_maps()
    cache = LessCache(config_of(1), maps, capacity=9, sinks=2, block=1)
    out = stream(cache, tensors, [1] * 40)
    positions = torch.tensor([30, 12, 39])
    layer = _CapturingLayer(positions)
    keys, values = layer.update(tensors[1], tensors[2])
    layer.attend(tensors[0], keys, values, SCALING, lambda: torch.empty(0))
    sample = simulate(layer, capacity=9, sinks=2)
    assert sample.evicted.sum(-1).tolist() == [30 - 11, 1, 39 - 11]
    scale = maps.layers[0].log_scale[..., None]
    merged = merge(sample.kept, sample.kept_log, scale, *evicted_part(maps.layers[0], sample)).flatten(1, 2)
    torch.testing.assert_close(merged.transpose(1, 2), out[:, positions], atol=1e-5, rtol=1e-4)
    exact = full_attention(*tensors)[:, positions]
    torch.testing.assert_close(sample.target.flatten(1, 2).transpose(1, 2), exact, atol=1e-5, rtol=1e-4)


def test_training_learns_what_eviction_loses() -> None:
    """On text that was not trained on."""
    model, steps = pico(), []
    maps = train_feature_maps(
        model, [tokens(1, 200, seed) for seed in range(6)], capacity=24, steps=60, on_step=steps.append
    )
    assert steps == [1] * 4 * 60 and maps.nbytes == sum(p.nbytes for m in maps.layers for p in m.parameters()) + 4 * 8
    captured = _capture(model, tokens(1, 200, 99), 28, torch.Generator().manual_seed(1))
    for layer, trained in zip(captured, maps.layers, strict=True):
        sample = simulate(layer, capacity=24, sinks=4)
        pure = (sample.kept - sample.target).square().mean() / sample.target.square().mean()
        assert float(pure) > 0.01  # otherwise eviction loses nothing
        assert float(output_error(trained, sample)) < 0.7 * float(pure)
        assert not any(p.requires_grad for p in trained.parameters())


def test_the_same_seed_gives_the_same_maps() -> None:
    one, other = (train_feature_maps(pico(), [tokens(1, 60)], capacity=20, steps=3, seed=seed) for seed in (5, 5))
    for first, second in zip(one.layers, other.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_mistakes_are_told() -> None:
    with pytest.raises(UsageError, match="feature maps"):
        LessCache(config_of(2), random_maps(1), capacity=8)
    for wrong in ({"capacity": 0}, {"capacity": 8, "sinks": -1}, {"capacity": 8, "block": 0}):
        with pytest.raises(UsageError):
            LessCache(config_of(1), random_maps(), **wrong)
    with pytest.raises(UsageError, match="tokens for a cache"):
        train_feature_maps(pico(), [tokens(1, 24)], capacity=20)
    with pytest.raises(UsageError, match="no text"):
        train_feature_maps(pico(), [], capacity=20)
