"""Encoders and decoders of the planned layer groups, in closed form.

`group`: with M·Cov(y_G)·M = V Λ Vᵀ, encoder E = Λ^(-1/2) Vᵀ M and decoder D = M⁻¹ V Λ^(1/2).
`first`: with Cov(x)^(-1/2)·Cov(x, y_G)·M = U S Vᵀ, E = Uᵀ Cov(x)^(-1/2) and D = M⁻¹ V S.
Latents have unit variance and are sorted by their worth.

Shape legend: r rank, n = 2·H_kv·d, h hidden size, G layers of a group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clla.artifacts import Codec, GroupCodec, Plan
from clla.convert.quantize import ERROR_SHARE
from clla.convert.spectra import Spectra


def make_codec(spectra: Spectra, plan: Plan, *, on_step: Callable[[], None] = lambda: None) -> Codec:
    """Codecs of all layer groups of a plan, with the loss that they predict.

    Args:
        spectra: weighted moments that the plan was made from.
        plan: layer groups and tiers.
        on_step: called after each group, for progress.
    """
    groups, kl = [], 0.0
    for group in plan.groups:
        start, size = spectra.stats.layers.index(group.layers[0]), len(group.layers)
        codec, missing = factor(spectra, start, size, len(group.tier_bits) * plan.tier_size)
        fisher = spectra.stats.fisher[start : start + size]
        kl += predicted_kl(codec, missing, fisher, group.tier_bits, plan.tier_size)
        groups.append(codec)
        on_step()
    return Codec(tuple(groups), made_from=plan.made_from, predicted_kl=kl)


def factor(spectra: Spectra, start: int, size: int, rank: int) -> tuple[GroupCodec, Tensor]:
    """Codec of one layer group.

    Args:
        spectra: weighted moments.
        start: first layer of the group, among the convertible ones.
        size: number of layers G.
        rank: r.

    Returns:
        The codec in fp32, and the decoder's error covariance when nothing is quantized, per layer [G, n, n].
    """
    stats, n = spectra.stats, spectra.stats.kv.values
    metric, inverse = spectra.metric[start : start + size], spectra.inverse_metric[start : start + size]
    if spectra.source == "first":
        assert stats.input_mean is not None
        left, singular, right = torch.linalg.svd(spectra.regression(start, size), full_matrices=False)
        encoder = left[:, :rank].mT @ spectra.input_whitening[start]  # [r, h]
        loadings, offset = right[:rank].mT * singular[:rank], stats.input_mean[start]
    else:
        values, vectors = torch.linalg.eigh(spectra.assembled(start, size).double())
        values, vectors = values.flip(0)[:rank].clamp_min(values[-1] * 1e-12), vectors.flip(1)[:, :rank]
        per_layer = vectors.unflatten(0, (size, n)).mT @ metric  # [G, r, n]
        encoder = (per_layer / values.sqrt()[:, None]).transpose(0, 1).flatten(1)  # [r, G·n]
        loadings, offset = vectors * values.sqrt(), stats.mean[start : start + size].flatten().clone()
    decoder = inverse @ loadings.unflatten(0, (size, n))  # [G, n, r]
    covariance = stats.covariance[start : start + size, 0].double()
    missing = covariance - decoder @ decoder.mT  # latents are white and uncorrelated with what is left out
    codec = GroupCodec(
        encoder=encoder.float(),
        offset=offset.float(),
        decoder=decoder.float(),
        mean=stats.mean[start : start + size].float(),
    )
    return codec, missing


def predicted_kl(
    codec: GroupCodec, missing: Tensor, fisher: Tensor, tier_bits: tuple[int, ...], tier_size: int
) -> float:
    """Second-order KL (nats a token) of one group's error: ½ Σ_l tr(F_l·Err_l).

    Errors of different layers and tokens are taken as uncorrelated, and every token as coded.

    Args:
        codec: of the group.
        missing: error covariance of truncation, [G, n, n].
        fisher: [G, n, n].
        tier_bits: bits of each tier.
        tier_size: components a tier.
    """
    shares = torch.tensor([ERROR_SHARE[b] for b in tier_bits for _ in range(tier_size)], dtype=torch.float64)
    decoder = codec.decoder.double()
    error = missing + (decoder * shares) @ decoder.mT
    return 0.5 * float((fisher.double() * error).sum())
