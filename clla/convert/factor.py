"""Encoders and decoders of the planned layer groups, in closed form.

`group`: with M·Cov(y_G)·M = V Λ Vᵀ, encoder E = Λ^(-1/2) Vᵀ M and decoder D = M⁻¹ V Λ^(1/2).
`first`: with R = T·Cov(x, y_G)·M = U S Vᵀ and T·Cov(x)·Tᵀ = I, E = Uᵀ T and D = M⁻¹ V S = M⁻¹ Rᵀ U.
Latents have unit variance and are sorted by their worth.

Shape legend: r rank, n = 2·H_kv·d, q coordinates of the moments (n unless reduced), h hidden size, G layers of a group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clla.artifacts.codec import Codec, GroupCodec
from clla.artifacts.plan import Plan
from clla.artifacts.stats import Stats
from clla.plan.decoupled import DecoupledSpectra
from clla.plan.rate import ERROR_SHARE
from clla.plan.spectra import CPU, Spectra, assemble


def make_codec(spectra: Spectra, plan: Plan, stats: Stats, *, on_step: Callable[[], None] = lambda: None) -> Codec:
    """Codecs of all layer groups of a plan, with the loss that they predict.

    Args:
        spectra: weighted moments that the plan was made from.
        plan: layer groups and tiers.
        stats: measured moments and Fisher metric, for the prediction (a baseline's spectra pretend others).
        on_step: called after each group, for progress.
    """
    groups, kl = [], 0.0
    for group in plan.groups:
        start, size = stats.layers.index(group.layers[0]), len(group.layers)
        codec = factor(spectra, start, size, len(group.tier_bits) * plan.tier_size)  # in the moments' coordinates
        shares = error_shares(group.tier_bits, plan.tier_size)
        aims, first = stats, start
        if isinstance(spectra, DecoupledSpectra):
            aims, first = spectra.of_group(start, size), 0
            kl += spectra.turning_kl(start, size)
        error = error_covariance(codec, aims, first, size, source=spectra.source, shares=shares, device=spectra.device)
        kl += predicted_kl(error, stats.fisher[start : start + size].to(spectra.device))
        if isinstance(spectra, DecoupledSpectra):
            codec = spectra.rotary(codec, start, size)
        groups.append(lift(codec, stats, start, size, source=spectra.source))
        on_step()
    if stats.dropped is not None:
        kl += float(stats.dropped.sum())
    return Codec(tuple(groups), made_from=plan.made_from, predicted_kl=kl)


def factor(spectra: Spectra, start: int, size: int, rank: int) -> GroupCodec:
    """Codec of one layer group for the coordinates of the moments, fp32.

    Args:
        spectra: weighted moments.
        start: first layer of the group, among the convertible ones.
        size: number of layers G.
        rank: r.
    """
    stats, n = spectra.stats, spectra.stats.width
    mean = stats.mean[start : start + size].float()
    if stats.reading is not None:
        mean = mean.new_zeros(size, n)  # coordinates are centred
    metric, inverse = spectra.metric[start : start + size], spectra.inverse_metric[start : start + size]
    if spectra.source == "first":
        assert stats.input_mean is not None
        _, left = spectra.eigenpairs(start, size, rank)
        encoder = left.mT @ spectra.input_whitening(start)  # [r, h]
        loadings, offset = spectra.regression(start, size).mT @ left, stats.input_mean[start]
    else:
        values, vectors = (x.double() for x in spectra.eigenpairs(start, size, max(1, rank)))
        values, vectors = values[:rank].clamp_min(float(values[0]) * 1e-12), vectors[:, :rank]
        per_layer = vectors.unflatten(0, (size, n)).mT @ metric  # [G, r, n]
        encoder = (per_layer / values.sqrt()[:, None]).transpose(0, 1).flatten(1)  # [r, G·n]
        loadings, offset = vectors * values.sqrt(), mean.flatten().clone()
    decoder = inverse @ loadings.unflatten(0, (size, n))  # [G, n, r]
    return GroupCodec(
        encoder=encoder.float().cpu(),
        offset=offset.float(),
        decoder=decoder.float().cpu(),
        mean=mean,
    )


def lift(codec: GroupCodec, stats: Stats, start: int, size: int, *, source: str) -> GroupCodec:
    """The codec of keys and values, from that of the coordinates in which the moments are kept.

    Args:
        codec: from `factor`.
        stats: its moments.
        start: first layer of the group, among the convertible ones.
        size: number of layers G.
        source: `group` or `first`.
    """
    if stats.reading is None or stats.writing is None:
        return codec
    mean, encoder, offset = stats.mean[start : start + size].float(), codec.encoder, codec.offset
    if source == "group":
        parts = encoder.unflatten(1, (size, stats.width)).transpose(0, 1)  # [G, r, q]
        encoder = (parts @ stats.reading[start : start + size]).transpose(0, 1).flatten(1)  # [r, G·n]
        offset = mean.flatten().clone()
    decoder = stats.writing[start : start + size] @ codec.decoder  # [G, n, r]
    return GroupCodec(encoder=encoder.contiguous(), offset=offset, decoder=decoder, mean=mean)


def error_covariance(
    codec: GroupCodec,
    stats: Stats,
    start: int,
    size: int,
    *,
    source: str,
    shares: Tensor | None = None,
    device: torch.device = CPU,
) -> Tensor:
    """Covariance of each layer's reconstruction error in the moments' coordinates, [G, q, q], fp64.

    Products are formed in the precision of the moments and of the codec, fp32.

    Args:
        codec: any linear codec of the group, for those coordinates.
        stats: measured moments.
        start: first layer of the group, among the convertible ones.
        size: number of layers G.
        source: `group` or `first`.
        shares: [r] error of quantization as a share of each component's variance; None for no quantization.
        device: to compute on.
    """
    encoder, decoder = codec.encoder.to(device), codec.decoder.to(device)
    if source == "first":
        assert stats.input_covariance is not None and stats.input_cross is not None
        read = encoder @ stats.input_covariance[start].to(device)  # [r, h]
        cross = encoder @ stats.input_cross[start, :size].to(device)  # [G, r, n]
    else:
        read = encoder @ assemble(stats.covariance, start, size).to(device)  # [r, G·n]
        cross = read.unflatten(1, (size, stats.width)).transpose(0, 1)
    latent = read @ encoder.mT  # [r, r]
    if shares is not None:
        latent.diagonal().mul_(1 + shares.to(latent))
    explained = (decoder @ cross).double()  # [G, n, n]
    kept = (decoder @ latent @ decoder.mT).double()
    return stats.covariance[start : start + size, 0].to(device).double() - explained - explained.mT + kept


def error_shares(tier_bits: tuple[int, ...], tier_size: int) -> Tensor:
    """Quantization error of each component as a share of its variance, [r]."""
    return torch.tensor([ERROR_SHARE[bits] for bits in tier_bits for _ in range(tier_size)], dtype=torch.float64)


def predicted_kl(error: Tensor, fisher: Tensor) -> float:
    """Second-order KL (nats per token) of errors: ½ Σ_l tr(F_l·Err_l), with both [G, n, n].

    Errors of different layers and tokens are taken as uncorrelated, and every token as coded.
    """
    return 0.5 * float((fisher.double() * error).sum())
