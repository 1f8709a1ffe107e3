"""Closed-form encoders and decoders against direct oracles on data whose every token is known."""

from __future__ import annotations

import pytest
import torch
from random_stats import Sampled, sampled
from sklearn.decomposition import PCA
from torch import Tensor

from clla.artifacts.codec import GroupCodec
from clla.artifacts.plan import KVShape, LayerGroup, Plan
from clla.artifacts.stats import Stats
from clla.convert.factor import error_covariance, error_shares, factor, make_codec, predicted_kl
from clla.modeling.quantize_clla import RowLayout
from clla.plan.metrics import needs_inputs, surrogate_stats
from clla.plan.rate import ERROR_SHARE
from clla.plan.spectra import FLOOR, Spectra, metric_power

GROUPS = [(0, 1), (1, 1), (0, 2), (1, 2), (0, 3)]


def naive_metric(fisher: Tensor, power: float) -> Tensor:
    """F^power from an eigenvalue loop, eigenvalues floored at a thousandth of the largest."""
    values, vectors = torch.linalg.eigh(fisher.double())
    out = torch.zeros_like(fisher, dtype=torch.float64)
    for value, vector in zip(values, vectors.mT, strict=True):
        out += torch.clamp(value, min=1e-3 * values.max()) ** power * torch.outer(vector, vector)
    return out


def group_metric(data: Sampled, start: int, size: int, power: float) -> Tensor:
    """M = blockdiag(F_l^(p/2))."""
    return torch.block_diag(*(naive_metric(data.stats.fisher[start + i], power / 2) for i in range(size)))


def joined(x: Tensor, start: int, size: int) -> Tensor:
    """Tokens of a group's layers side by side, [N, G·n]."""
    return torch.cat(list(x[start : start + size]), dim=1)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


def encode(codec: GroupCodec, inputs: Tensor) -> Tensor:
    return (inputs - codec.offset.double()) @ codec.encoder.double().mT


def reconstruct(codec: GroupCodec, latents: Tensor) -> Tensor:
    """[N, G·n]."""
    layers = [latents @ d.double().mT + m.double() for d, m in zip(codec.decoder, codec.mean, strict=True)]
    return torch.cat(layers, dim=1)


def weighted_error(data: Sampled, codec: GroupCodec, start: int, size: int, power: float, source: str) -> float:
    """Mean squared norm of M times the error over the tokens."""
    y = joined(data.y, start, size)
    inputs = data.x[start] if source == "first" else y
    error = (y - reconstruct(codec, encode(codec, inputs))) @ group_metric(data, start, size, power)
    return float(error.square().sum(1).mean())


def fit(spectra: Spectra, start: int, size: int, rank: int) -> tuple[GroupCodec, Tensor]:
    """A codec and the covariance of its error without quantization."""
    codec = factor(spectra, start, size, rank)
    return codec, error_covariance(codec, spectra.stats, start, size, source=spectra.source)


def kl_of(
    codec: GroupCodec, stats: Stats, start: int, size: int, tier_bits: tuple[int, ...], source: str = "group"
) -> float:
    """Predicted KL of a quantized codec with tiers of 8."""
    error = error_covariance(codec, stats, start, size, source=source, shares=error_shares(tier_bits, 8))
    return predicted_kl(error, stats.fisher[start : start + size])


@pytest.fixture(scope="module")
def data() -> Sampled:
    return sampled()


@pytest.mark.parametrize("power", (-1.0, -0.375, 0.0, 0.375, 1.0))
def test_metric_power_equals_the_eigenvalue_loop(data: Sampled, power: float) -> None:
    powers = metric_power(data.stats.fisher, power)
    for layer, matrix in enumerate(powers):
        expected = naive_metric(data.stats.fisher[layer], power)
        torch.testing.assert_close(matrix, expected, rtol=0, atol=5e-5 * float(expected.abs().max()))
    values = torch.linalg.eigvalsh(data.stats.fisher.double())
    assert bool((values[:, 0] < FLOOR * values[:, -1]).any()), "the floor should take part in this test"


def test_metric_power_of_a_zero_matrix_is_finite() -> None:
    assert bool(metric_power(torch.zeros(2, 4, 4), 0.375).isfinite().all())


@pytest.mark.parametrize("power", (0.0, 0.75, 1.0))
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_assembled_moments_equal_those_of_the_weighted_tokens(
    data: Sampled, group: tuple[int, int], power: float
) -> None:
    spectra = Spectra(data.stats, power=power)
    weighted = centred(joined(data.y, *group)) @ group_metric(data, *group, power)
    expected = weighted.mT @ weighted / len(weighted)
    scale = float(expected.abs().max())
    torch.testing.assert_close(spectra.assembled(*group).double(), expected, rtol=1e-4, atol=1e-6 * scale)
    assert spectra.energy(*group) == pytest.approx(float(expected.trace()), rel=1e-5)
    values = torch.linalg.eigvalsh(expected).flip(0)
    torch.testing.assert_close(spectra.eigenvalues(*group), values, rtol=1e-3, atol=1e-6 * float(values[0]))


@pytest.mark.parametrize("power", (0.0, 0.75))
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_full_rank_reconstructs_exactly(data: Sampled, group: tuple[int, int], power: float) -> None:
    start, size = group
    codec, missing = fit(Spectra(data.stats, power=power), start, size, 8 * size)
    identity = codec.decoder.double().flatten(0, 1) @ codec.encoder.double()
    torch.testing.assert_close(identity, torch.eye(8 * size, dtype=torch.float64), rtol=0, atol=2e-3)
    y = joined(data.y, start, size)
    torch.testing.assert_close(reconstruct(codec, encode(codec, y)), y, rtol=1e-3, atol=2e-3 * float(y.std()))
    variance = data.stats.covariance[:, 0].diagonal(dim1=-2, dim2=-1).max()
    assert float(missing.abs().max()) < 1e-4 * float(variance)


@pytest.mark.parametrize("source", ("group", "first"))
@pytest.mark.parametrize("rank", (1, 4, 8))
def test_latents_have_unit_variance_and_are_uncorrelated(data: Sampled, rank: int, source: str) -> None:
    for start, size in GROUPS:
        codec, _ = fit(Spectra(data.stats, source=source), start, size, rank)
        assert codec.encoder.dtype == codec.decoder.dtype == torch.float32
        latents = encode(codec, data.x[start] if source == "first" else joined(data.y, start, size))
        torch.testing.assert_close(latents.mean(0), torch.zeros(rank, dtype=torch.float64), rtol=0, atol=1e-4)
        moments = latents.mT @ latents / len(latents)
        torch.testing.assert_close(moments, torch.eye(rank, dtype=torch.float64), rtol=0, atol=3e-3)


@pytest.mark.parametrize("source", ("group", "first"))
@pytest.mark.parametrize("power", (0.0, 0.75))
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_weighted_error_is_the_energy_that_was_dropped(
    data: Sampled, group: tuple[int, int], power: float, source: str
) -> None:
    spectra = Spectra(data.stats, power=power, source=source)
    values = spectra.eigenvalues(*group)
    energy = spectra.energy(*group)
    for rank in (0, 1, 3, 6):
        codec, missing = fit(spectra, *group, rank)
        error = weighted_error(data, codec, *group, power, source)
        # The absolute part is the ridge of the regression.
        assert error == pytest.approx(energy - float(values[:rank].sum()), rel=2e-3, abs=2e-5 * energy)
        metrics = [naive_metric(data.stats.fisher[group[0] + i], power) for i in range(group[1])]
        predicted = sum(float((m * e).sum()) for m, e in zip(metrics, missing, strict=True))
        assert predicted == pytest.approx(error, rel=2e-3, abs=2e-5 * energy)


@pytest.mark.parametrize("source", ("group", "first"))
def test_missing_is_the_covariance_of_the_error(data: Sampled, source: str) -> None:
    codec, missing = fit(Spectra(data.stats, source=source), 0, 3, 5)
    y = joined(data.y, 0, 3)
    error = y - reconstruct(codec, encode(codec, data.x[0] if source == "first" else y))
    for layer, own in enumerate(error.split(8, dim=1)):
        expected = own.mT @ own / len(own)
        torch.testing.assert_close(missing[layer], expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("power", (0.0, 0.75))
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_first_is_weighted_reduced_rank_regression(data: Sampled, group: tuple[int, int], power: float) -> None:
    """Izenman's closed form from least squares on the tokens: project the weighted fit on its leading axes."""
    start, size = group
    metric = group_metric(data, start, size, power)
    x, y = centred(data.x[start]), centred(joined(data.y, start, size))
    least_squares = torch.linalg.lstsq(x, y @ metric).solution  # [h, G·n]
    _, values, axes = torch.linalg.svd(x @ least_squares, full_matrices=False)
    for rank in (1, 4, 7):
        codec, _ = fit(Spectra(data.stats, power=power, source="first"), start, size, rank)
        leading = axes[:rank].mT @ axes[:rank]
        closed_form = least_squares @ leading @ torch.linalg.inv(metric)
        own = codec.encoder.double().mT @ codec.decoder.double().flatten(0, 1).mT
        torch.testing.assert_close(x @ own, x @ closed_form, rtol=0, atol=3e-3 * float(y.std()))
        total = float((y @ metric).square().sum()) - float(values[:rank].square().sum())
        error = weighted_error(data, codec, start, size, power, "first")
        assert error == pytest.approx(total / len(y), rel=1e-3)


@pytest.mark.parametrize("source", ("group", "first"))
def test_no_other_encoder_of_the_same_rank_does_better(data: Sampled, source: str) -> None:
    """Random and perturbed encoders, each with its own best decoder."""
    generator = torch.Generator().manual_seed(0)
    start, size, rank = 0, 2, 4
    codec, _ = fit(Spectra(data.stats, source=source), start, size, rank)
    error = weighted_error(data, codec, start, size, 0.75, source)
    target = centred(joined(data.y, start, size)) @ group_metric(data, start, size, 0.75)
    inputs = centred(data.x[start] if source == "first" else joined(data.y, start, size))
    for spread in (0.03, 0.1, 0.3, 1.0, 100.0):
        for _ in range(3):
            noise = torch.randn(codec.encoder.shape, generator=generator, dtype=torch.float64)
            encoder = codec.encoder.double() + spread * noise * codec.encoder.double().std()
            latents = inputs @ encoder.mT
            best = latents @ torch.linalg.lstsq(latents, target).solution
            other = float((target - best).square().sum(1).mean())
            assert other > error * (1 + 1e-6)


@pytest.mark.parametrize("power", (0.0, 0.75))
def test_pca_is_sklearns(data: Sampled, power: float) -> None:
    """The `pca` metric drops the Fisher matrices, whatever the power."""
    stats = surrogate_stats(data.stats, "pca")
    for start, size in GROUPS:
        y = joined(data.y, start, size)
        pca = PCA(n_components=4, svd_solver="full").fit(y.numpy())
        spectra = Spectra(stats, power=power)
        variance = torch.from_numpy(pca.explained_variance_) * (len(y) - 1) / len(y)
        torch.testing.assert_close(spectra.eigenvalues(start, size)[:4], variance, rtol=1e-4, atol=0)
        codec, _ = fit(spectra, start, size, 4)
        expected = torch.from_numpy(pca.inverse_transform(pca.transform(y.numpy())))
        own = reconstruct(codec, encode(codec, y))
        torch.testing.assert_close(own, expected, rtol=0, atol=2e-3 * float(y.std()))
        whitened = torch.from_numpy(PCA(n_components=4, whiten=True, svd_solver="full").fit_transform(y.numpy()))
        torch.testing.assert_close(encode(codec, y).abs(), whitened.abs(), rtol=1e-2, atol=1e-2)


def test_power_zero_ignores_the_metric(data: Sampled) -> None:
    with_fisher, _ = fit(Spectra(data.stats, power=0.0), 0, 2, 5)
    without, _ = fit(Spectra(surrogate_stats(data.stats, "pca"), power=0.75), 0, 2, 5)
    y = joined(data.y, 0, 2)
    own, other = (reconstruct(codec, encode(codec, y)) for codec in (with_fisher, without))
    torch.testing.assert_close(own, other, rtol=0, atol=1e-3 * float(y.std()))


def test_the_fisher_metric_protects_what_the_loss_sees(data: Sampled) -> None:
    """At the same rank it has less loss than PCA and more plain squared error."""
    fisher, _ = fit(Spectra(data.stats, power=1.0), 0, 3, 6)
    plain, _ = fit(Spectra(data.stats, power=0.0), 0, 3, 6)
    loss = [weighted_error(data, codec, 0, 3, 1.0, "group") for codec in (fisher, plain)]
    squared = [weighted_error(data, codec, 0, 3, 0.0, "group") for codec in (fisher, plain)]
    assert loss[0] < loss[1] and squared[0] > squared[1]


def test_sharing_beats_separate_layers(data: Sampled) -> None:
    spectra = Spectra(data.stats)
    shared = spectra.energy(0, 3) - float(spectra.eigenvalues(0, 3)[:6].sum())
    apart = sum(spectra.energy(i, 1) - float(spectra.eigenvalues(i, 1)[:2].sum()) for i in range(3))
    assert shared < apart


@pytest.mark.parametrize("metric", ("weights", "asvd"))
def test_weight_surrogates_are_svds_of_the_projections(metric: str) -> None:
    data = sampled(noise=0.0, seed=3)
    spectra = Spectra(surrogate_stats(data.stats, metric), power=0.0)
    for start, size in GROUPS:
        blocks = []
        for layer in range(start, start + size):
            rms = data.x[layer].square().mean(0).sqrt() if metric == "asvd" else torch.ones(12, dtype=torch.float64)
            blocks.append(rms[:, None] * data.projections[layer])
        _, singular, axes = torch.linalg.svd(torch.cat(blocks, dim=1), full_matrices=False)
        found = spectra.eigenvalues(start, size)
        count = min(12, 8 * size)
        torch.testing.assert_close(found[:count], singular.square(), rtol=0, atol=2e-3 * float(singular[0]) ** 2)
        codec, _ = fit(spectra, start, size, 5)
        projector = codec.decoder.double().flatten(0, 1) @ codec.encoder.double()
        torch.testing.assert_close(projector, axes[:5].mT @ axes[:5], rtol=0, atol=0.03)


def test_asvd_keeps_what_large_inputs_use() -> None:
    """W = diag(4, 1) and inputs of size 1 and 100: SVD keeps the weight 4, ASVD (so CSKV, arXiv 2409.10593) the 1."""
    weight, power = torch.diag(torch.tensor([4.0, 1.0])), torch.diag(torch.tensor([1.0, 100.0])).square()
    stats = Stats(
        layers=(0,),
        kv=KVShape(num_key_value_heads=1, head_dim=1),
        tokens=1,
        mean=torch.zeros(1, 2),
        covariance=(weight.mT @ power @ weight)[None, None],
        fisher=torch.eye(2)[None],
        made_from="test",
        input_mean=torch.zeros(1, 2),
        input_covariance=power[None],
        input_cross=(power @ weight)[None, None],
    )
    for metric, kept in (("weights", [[4.0, 0.0], [0.0, 0.0]]), ("asvd", [[0.0, 0.0], [0.0, 1.0]])):
        codec = factor(Spectra(surrogate_stats(stats, metric), power=0.0, source="first"), 0, 1, 1)
        product = codec.encoder.mT @ codec.decoder[0].mT
        # The ridge is relative to the mean power, and shrinks what the smaller input tells.
        torch.testing.assert_close(product, torch.tensor(kept), rtol=0.06, atol=1e-3)


@pytest.mark.parametrize("source", ("group", "first"))
@pytest.mark.parametrize("metric", ("fisher", "pca", "weights", "asvd"))
def test_components_are_never_worth_more_than_there_is(data: Sampled, metric: str, source: str) -> None:
    """Otherwise the loss that is left, and with it the predicted KL, turns negative."""
    spectra = Spectra(surrogate_stats(data.stats, metric), power=0.75, source=source)
    for start, size in GROUPS:
        worth = float(spectra.eigenvalues(start, size).sum())
        assert worth <= spectra.energy(start, size) * (1 + 1e-4)
        _, missing = fit(spectra, start, size, 4)
        assert float(missing.diagonal(dim1=-2, dim2=-1).sum()) > 0


def test_surrogates_leave_the_rest_alone(data: Sampled) -> None:
    assert surrogate_stats(data.stats, "fisher") is data.stats
    for metric in ("pca", "weights", "asvd"):
        changed = surrogate_stats(data.stats, metric)
        assert torch.equal(changed.fisher, torch.eye(8).expand(3, 8, 8))
        assert torch.equal(changed.mean, data.stats.mean) and changed.layers == data.stats.layers
    assert torch.equal(surrogate_stats(data.stats, "pca").covariance, data.stats.covariance)


@pytest.mark.parametrize(
    ("metric", "source", "needed"),
    [
        ("fisher", "group", False),
        ("pca", "group", False),
        ("weights", "group", True),
        ("asvd", "group", True),
        ("fisher", "first", True),
        ("pca", "first", True),
    ],
)
def test_inputs_are_collected_only_where_needed(metric: str, source: str, needed: bool) -> None:
    assert needs_inputs(metric, source) is needed


@pytest.mark.parametrize("tier_bits", [(4,), (8, 2), (3, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("source", ("group", "first"))
def test_predicted_kl_is_the_trace_with_sampled_quantization_noise(tier_bits: tuple[int, ...], source: str) -> None:
    """½ E[eᵀ F e] over tokens whose latents went through the packed rows.

    Exact to sampling with the error that the rows really have. The plan reckons with that of a large class, which
    is more: a class of 8 components leaves half to all of it, since its scale fits its own few values.
    """
    data = sampled(num_layers=2, head_dim=8, hidden=24, tokens=6000)
    layout = RowLayout(tier_bits, 8)
    codec, _missing = fit(Spectra(data.stats, source=source), 0, 2, layout.rank)
    y = joined(data.y, 0, 2)
    latents = encode(codec, data.x[0] if source == "first" else y)
    stored = layout.unpack(layout.pack(latents)).double()
    error = y - reconstruct(codec, stored)
    measured = 0.0
    for layer, own in enumerate(error.split(16, dim=1)):
        measured += 0.5 * float(torch.einsum("ti,ij,tj->t", own, data.stats.fisher[layer].double(), own).mean())
    assert measured < kl_of(codec, data.stats, 0, 2, tier_bits, source)
    shares = (stored - latents).square().mean(0) / latents.double().square().mean(0)
    assert bool((shares < error_shares(tier_bits, 8)).all())
    real = error_covariance(codec, data.stats, 0, 2, source=source, shares=shares)
    assert measured == pytest.approx(predicted_kl(real, data.stats.fisher[:2]), rel=0.02)


def test_predicted_kl_equals_noise_of_the_stated_variance(data: Sampled) -> None:
    """Independent noise of variance ε(b) on each latent component, sampled directly."""
    codec, missing = fit(Spectra(data.stats), 0, 3, 16)
    shares = torch.tensor([ERROR_SHARE[4]] * 8 + [ERROR_SHARE[2]] * 8, dtype=torch.float64)
    noise = torch.randn(40_000, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * shares.sqrt()
    expected = 0.0
    for layer in range(3):
        moved = noise @ codec.decoder[layer].double().mT
        fisher = data.stats.fisher[layer].double()
        expected += 0.5 * float(((moved @ fisher) * moved).sum(1).mean() + (fisher @ missing[layer]).trace())
    assert kl_of(codec, data.stats, 0, 3, (4, 2)) == pytest.approx(expected, rel=0.02)


def test_make_codec_follows_the_plan() -> None:
    """Groups with and without tiers, layers with indices of their own (others are kept)."""
    data = sampled(num_layers=4)
    stats = type(data.stats)(**{**vars(data.stats), "layers": (1, 2, 5, 6)})
    groups = (LayerGroup((1, 2), (4, 2)), LayerGroup((5,), ()), LayerGroup((6,), (8,)))
    plan = Plan(
        groups=groups,
        kv=KVShape(1, 4),
        kv_itemsize=2,
        tier_size=8,
        window=16,
        sinks=4,
        flush_block=16,
        source="group",
        budget_bytes=10.0,
        at_context=None,
        made_from="test",
        kept_layers=(0, 3, 4),
    )
    steps: list[int] = []
    spectra = Spectra(stats)
    codec = make_codec(spectra, plan, stats, on_step=lambda: steps.append(1))
    assert len(steps) == 3 and codec.made_from == "test"
    assert [tuple(g.encoder.shape) for g in codec.groups] == [(16, 16), (0, 8), (8, 8)]
    assert [tuple(g.decoder.shape) for g in codec.groups] == [(2, 8, 16), (1, 8, 0), (1, 8, 8)]
    assert torch.equal(codec.groups[1].mean, stats.mean[2:3])
    kl = 0.0
    for group, (start, size) in zip(groups, [(0, 2), (2, 1), (3, 1)], strict=True):
        own, _ = fit(spectra, start, size, 8 * len(group.tier_bits))
        kl += kl_of(own, stats, start, size, group.tier_bits)
    assert codec.predicted_kl == pytest.approx(kl)
    nothing = 0.5 * float((stats.fisher[2].double() * stats.covariance[2, 0].double()).sum())
    assert codec.predicted_kl > nothing


def test_a_dead_channel_gives_a_finite_codec() -> None:
    """A head that never fires has neither variance nor gradient."""
    data = sampled(num_layers=2)
    covariance, fisher = data.stats.covariance.clone(), data.stats.fisher.clone()
    for moments in (covariance, fisher):
        moments[..., 3, :] = 0
        moments[..., :, 3] = 0
    stats = type(data.stats)(**{**vars(data.stats), "covariance": covariance, "fisher": fisher})
    codec, missing = fit(Spectra(stats), 0, 2, 16)
    assert all(bool(t.isfinite().all()) for t in (codec.encoder, codec.decoder, missing))
    y = joined(data.y, 0, 2).clone()
    y[:, [3, 11]] = joined(stats.mean[:, None].double(), 0, 2)[:, [3, 11]]
    torch.testing.assert_close(reconstruct(codec, encode(codec, y)), y, rtol=0, atol=5e-3 * float(y.std()))
