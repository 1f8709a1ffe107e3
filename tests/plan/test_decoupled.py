"""Decoupled keys in closed form: mean rotations, query power, which components turn and what is left for the latent."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch
from conftest import pico
from helpers import stats_of, strict_of, tokens
from torch import Tensor
from transformers import PreTrainedModel

from clla.artifacts.plan import LayerGroup, Plan
from clla.artifacts.stats import Stats
from clla.calibrate.collect import Collection
from clla.calibrate.queries import rotary_pairs
from clla.calibrate.rope_detection import rope_settings
from clla.calibrate.stream import StreamedCollector
from clla.convert.factor import error_covariance, factor, make_codec
from clla.errors import UnsupportedModelError, UsageError
from clla.plan.budget import Budget
from clla.plan.decoupled import DecoupledSpectra, mean_rotation, uncentred
from clla.plan.make import make_plan
from clla.plan.spectra import Spectra
from clla.recipe import PlanConfig
from clla.source.families import kv_shape


@lru_cache(maxsize=4)
def source_and_stats(family: str = "llama") -> tuple[PreTrainedModel, Stats]:
    model = pico(family)
    return model, stats_of(model, with_queries=True)


def spectra_of(stats: Stats, components: int, **options: object) -> DecoupledSpectra:
    return DecoupledSpectra(stats, source="first", components=components, context=64, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("context", [1, 2, 7, 300])
def test_mean_rotation_is_the_mean_over_all_pairs_of_tokens(context: int) -> None:
    frequencies = torch.tensor([1.0, 0.31, 1e-2, 1e-5, 1e-9, 0.0], dtype=torch.float64)
    found = mean_rotation(frequencies, context)
    for theta, g in zip(frequencies.tolist(), found.tolist(), strict=True):
        turns = [math.cos(theta * (n - m)) for n in range(context) for m in range(n + 1)]
        assert g == pytest.approx(sum(turns) / len(turns), abs=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "cohere", "smollm3"])
def test_query_power_is_that_of_the_projected_queries(family: str) -> None:
    """Before RoPE as after it: a rotation leaves the length of a pair alone."""
    model, stats = source_and_stats(family)
    assert stats.query_power is not None and stats.frequencies is not None and stats.rotary_channels is not None
    queries: dict[int, list[Tensor]] = {}
    name = "query_key_value" if family == "gpt_neox" else "q_proj"
    projections = [module for path, module in model.named_modules() if path.endswith(name)]
    hooks = [
        module.register_forward_hook(lambda _, __, out, i=i: queries.setdefault(i, []).append(out))
        for i, module in enumerate(projections)
    ]
    for seed in range(8):
        model(tokens(4, 64, seed))
    for hook in hooks:
        hook.remove()
    for layer in range(4):
        rows = torch.cat(queries[layer])[:, 8:].flatten(0, 1)
        heads = rows.unflatten(-1, (4, -1))[..., :16]  # of fused projections the first third is the query
        power = heads[..., stats.rotary_channels].square().sum(-1).mean(0)
        torch.testing.assert_close(stats.query_power[layer], power, rtol=1e-4, atol=1e-5)
    angles, _ = rotary_pairs(model, rope_settings(model, stats.layers))  # type: ignore[arg-type]
    plain = {1, 3} if family == "smollm3" else set()
    for layer in range(4):
        torch.testing.assert_close(stats.frequencies[layer], torch.zeros_like(angles) if layer in plain else angles)


def test_streamed_query_power_is_the_same() -> None:
    model, stats = source_and_stats()
    collector = StreamedCollector(
        model,
        Collection(stats.layers, stats.kv, 4, rope_settings(model, stats.layers), with_inputs=True, with_queries=True),
    )
    streamed = collector.collect([tokens(4, 64, seed) for seed in range(8)], made_from="test")
    for name in ("query_power", "frequencies", "rotary_channels"):
        torch.testing.assert_close(getattr(streamed, name), getattr(stats, name))


def test_models_without_rotations_are_refused() -> None:
    model = pico("gpt2")
    with pytest.raises(UnsupportedModelError, match="not rotated"):
        stats_of(model, with_queries=True)


def test_models_that_hide_their_queries_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="queries cannot be seen"):
        stats_of(pico("falcon"), with_queries=True)


def naive_split(stats: Stats, start: int, size: int, pairs: int) -> tuple[list[int], Tensor]:
    """Frequencies of the components and their worth, one frequency and complex number at a time."""
    assert stats.input_covariance is not None and stats.input_cross is not None
    assert stats.query_power is not None and stats.frequencies is not None and stats.rotary_channels is not None
    heads, width = stats.kv.num_key_value_heads, stats.kv.head_dim
    inverse = torch.linalg.inv(stats.input_covariance[start].double())
    found = []
    for f, (a, b) in enumerate(stats.rotary_channels.tolist()):
        columns, weights, means = [], [], []
        for j in range(size):
            for h in range(heads):
                cross, at = stats.input_cross[start, j].double(), h * width
                columns.append(torch.complex(cross[:, at + a], cross[:, at + b]))
                mean = stats.mean[start + j].double()
                means.append(torch.complex(mean[at + a], mean[at + b]))
                group = stats.query_power.shape[1] // heads
                weights.append(stats.query_power[start + j, h * group : (h + 1) * group, f].double().sum())
        cross, mean = torch.stack(columns, 1), torch.stack(means)
        energy = cross.mT @ inverse.to(cross.dtype) @ cross.conj() + torch.outer(mean, mean.conj())
        root = torch.stack(weights).sqrt()
        values = torch.linalg.eigvalsh(root[:, None] * energy * root)
        g = float(mean_rotation(stats.frequencies[start, f : f + 1], 64))
        found += [(float(value) * (1 - g * g), f) for value in values]
    best = sorted(found, reverse=True)[:pairs]
    return [f for _, f in best], torch.tensor([value for value, _ in best])


@pytest.mark.parametrize(("start", "size"), [(0, 1), (1, 2), (0, 3)])
def test_components_are_the_best_of_all_frequencies_and_heads(start: int, size: int) -> None:
    _, stats = source_and_stats()
    split = spectra_of(stats, 16).split(start, size)
    wanted, worth = naive_split(stats, start, size, 8)
    assert list(split.pairs) == wanted
    # Their worth is what the queries see of them: unit variance times the answers' weights.
    assert stats.query_power is not None and stats.frequencies is not None
    power = stats.query_power[start : start + size].double().unflatten(1, (2, -1)).sum(2)[..., list(split.pairs)]
    g = mean_rotation(stats.frequencies[start], 64)[list(split.pairs)]
    found = (2 * split.query.abs().square() * power).sum((0, 1)) * (1 - g.square())
    torch.testing.assert_close(found, worth.double(), rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize(("start", "size"), [(0, 1), (1, 2)])
def test_parts_add_up_to_the_key(start: int, size: int) -> None:
    """Rotary key and position-free rest, whose scaling is undone, are what the input explains of the key."""
    _, stats = source_and_stats()
    assert stats.input_covariance is not None and stats.rotary_channels is not None and stats.frequencies is not None
    spectra = spectra_of(stats, 16)
    split, heads = spectra.split(start, size), stats.kv.num_key_value_heads
    whole, rest = (x[..., :32].unflatten(-1, (heads, 16)) for x in (split.whole, split.rest))
    whitened = torch.linalg.solve(spectra.input_whitening(start).mT, split.encoder.mT)  # c = encoder·T⁻¹·(T·x)
    component = torch.view_as_complex(whitened.unflatten(1, (-1, 2)).contiguous())  # [h, P]
    g = spectra.mean_rotations[start : start + size]
    for layer in range(size):
        for head in range(heads):
            for f, (a, b) in enumerate(stats.rotary_channels.tolist()):
                own = torch.complex(whole[layer, :, head, a], whole[layer, :, head, b])
                left = torch.complex(rest[layer, :, head, a], rest[layer, :, head, b]) / g[layer, f]
                turned = sum(
                    component[:, j] * split.query[layer, head, j] for j, pair in enumerate(split.pairs) if pair == f
                )
                torch.testing.assert_close(left + turned, own, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(split.rest[..., 32:], split.whole[..., 32:])  # values stay what they are


def test_rotary_keys_have_unit_variance() -> None:
    _, stats = source_and_stats()
    assert stats.input_covariance is not None
    split = spectra_of(stats, 16).split(0, 2)
    variance = (split.encoder @ stats.input_covariance[0].double() @ split.encoder.mT).diagonal()
    square = (variance + split.mean.square()).unflatten(0, (-1, 2)).mean(1)
    torch.testing.assert_close(square, torch.ones_like(square), rtol=1e-3, atol=1e-3)


def test_losses_are_those_of_the_codec() -> None:
    """What the plan calls the loss of a group is the weighted error of its codec, and what rotations cost."""
    _, stats = source_and_stats()
    spectra, start, size, rank = spectra_of(stats, 16), 1, 2, 32
    codec = factor(spectra, start, size, rank)
    error = error_covariance(codec, spectra.of_group(start, size), 0, size, source="first")
    metric = spectra.metric[start : start + size]
    weighted = float((metric @ error @ metric).diagonal(dim1=-2, dim2=-1).sum())
    split = spectra.split(start, size)
    turning = float((spectra._pair_weights(metric @ metric) * split.stirred).sum())
    values = spectra.eigenvalues(start, size)[:rank]
    assert spectra.energy(start, size) - float(values.sum()) == pytest.approx(weighted + turning, rel=1e-3)
    assert turning > 0.01 * weighted


def test_with_all_components_nothing_is_left_to_turn() -> None:
    _, stats = source_and_stats()
    spectra = spectra_of(stats, 32)
    assert spectra.turning_kl(0, 1) < 1e-9 < spectra_of(stats, 16).turning_kl(0, 1)
    explained = (spectra.split(0, 1).rest[..., :32] ** 2).sum() / (spectra.split(0, 1).whole[..., :32] ** 2).sum()
    assert explained < 1e-9
    plain = Spectra(stats, source="first")
    assert spectra.energy(0, 1) < plain.energy(0, 1)


def test_uncentred_stats_are_moments_around_zero() -> None:
    _, stats = source_and_stats()
    found = uncentred(stats)
    assert stats.input_mean is not None and found.input_cross is not None and stats.input_cross is not None
    assert not found.mean.any() and found.input_mean is not None and not found.input_mean.any()
    for layer, j in ((0, 0), (1, 2), (3, 0)):
        wanted = stats.covariance[layer, j] + torch.outer(stats.mean[layer], stats.mean[layer + j])
        torch.testing.assert_close(found.covariance[layer, j], wanted)
        wanted = stats.input_cross[layer, j] + torch.outer(stats.input_mean[layer], stats.mean[layer + j])
        torch.testing.assert_close(found.input_cross[layer, j], wanted)


def plan_with(stats: Stats, budget: float, spectra: DecoupledSpectra, **options: object) -> Plan:
    settings = {"latent_input": "first_layer", "key": "decoupled", "max_layers_per_group": 6, **options}
    config = PlanConfig(qk_rope_head_dim=spectra.components, **settings)
    return make_plan(
        stats, config, budget=Budget(budget, None, 0, 0), kv_itemsize=4, kept_layers=(), kept_window=0,
        made_from="test", spectra=spectra,
    )  # fmt: skip


def test_plans_pay_for_rotary_keys() -> None:
    _, stats = source_and_stats()
    spectra = spectra_of(stats, 16)
    plan = plan_with(stats, 200.0, spectra, rope_bits=4)
    assert plan.decoupled and plan.row_bytes <= 200
    assert all(len(group.rope_pairs) == 8 for group in plan.groups)
    without = sum(sum(group.tier_bits) * plan.tier_size // 8 for group in plan.groups)
    assert plan.row_bytes > without + 8 * len(plan.groups)
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(UsageError, match="rotary keys"):
        plan_with(stats, 12.0, spectra)
    with pytest.raises(UsageError, match="qk_rope_head_dim 48"):
        spectra_of(stats, 48)


def test_codecs_with_rotary_keys_are_kept(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from clla.artifacts.codec import Codec

    _, stats = source_and_stats()
    spectra = spectra_of(stats, 16)
    plan = plan_with(stats, 200.0, spectra)
    codec = make_codec(spectra, plan, stats)
    codec.save(tmp_path / "codec.safetensors")
    stats.save(tmp_path / "stats.safetensors")
    again = Codec.load(tmp_path / "codec.safetensors")
    assert again.predicted_kl == codec.predicted_kl
    for a, b in zip(again.groups, codec.groups, strict=True):
        assert a.tensors().keys() == b.tensors().keys() >= {"rope_encoder", "rope_mean", "rope_query"}
        assert all(torch.equal(value, b.tensors()[name]) for name, value in a.tensors().items())
    loaded = Stats.load(tmp_path / "stats.safetensors")
    assert loaded.frequencies is not None and torch.equal(loaded.frequencies, stats.frequencies)  # type: ignore[arg-type]


def test_layers_without_rotation_take_no_component() -> None:
    model, stats = source_and_stats("smollm3")
    assert kv_shape(model.config) == stats.kv
    split = spectra_of(stats, 16).split(0, 2)  # the second one does not rotate
    assert split.query[0].abs().max() > 0 and not split.query[1].any()
    assert not split.stirred[1].any() and split.stirred[0].max() > 0


def test_predicted_kl_falls_with_components() -> None:
    model, stats = source_and_stats()
    found = []
    for components in (8, 16, 32):
        spectra = spectra_of(stats, components)
        _, plan = strict_of(model, stats, components=components)
        groups = tuple(LayerGroup(g.layers, g.tier_bits, 1.0, g.rope_pairs) for g in plan.groups)
        assert groups == plan.groups
        found.append(make_codec(spectra, plan, stats).predicted_kl)
    assert found[0] > found[1] > found[2]
