"""Palu: per-layer low-rank keys and values by group-head decomposition (arXiv 2407.21118, https://arxiv.org/abs/2407.21118).

The key and the value projection are cut into groups of neighbouring KV heads; each group's block W of the
projection is factored by an SVD whitened with the inputs' second moments (SVD-LLM, arXiv 2403.07378): with
E[xxᵀ] = SSᵀ and SᵀW = U Σ Vᵀ, A = S⁻ᵀ U_r and B = Σ_r V_rᵀ, so that xA is cached and xAB ≈ xW. Keys are rebuilt
before RoPE. Ranks are uniform here; the paper also searches them by layer. For 4 bits the paper spreads outliers
with a Hadamard matrix; here a random rotation does, which every rank has.

The result is a plan and a codec of the ordinary pipeline: groups of one layer, latents from the attention's input.

Shape legend: L layers, h hidden size, n = 2·H·d values per token and layer, g head groups, r rank of a head group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clla.artifacts.codec import Codec, GroupCodec
from clla.artifacts.plan import LayerGroup, Plan
from clla.artifacts.stats import Stats
from clla.errors import UsageError
from clla.plan.metrics import projections

TIER = 8
GROUP_HEADS = 4  # KV heads factored together, as in the paper, where there are as many


def head_groups(num_key_value_heads: int, size: int | None = None) -> int:
    """Number of head groups: of `size` heads (4 unless told), or one of all heads where that does not divide them.

    Raises:
        UsageError: a size that does not divide the heads.
    """
    if size is None:
        size = GROUP_HEADS if num_key_value_heads % GROUP_HEADS == 0 else num_key_value_heads
    if size < 1 or num_key_value_heads % size:
        raise UsageError(
            f"head groups of {size} for {num_key_value_heads} KV heads",
            expected="a size that divides the KV heads",
            remedy=f"use {num_key_value_heads} or a divisor of it",
        )
    return num_key_value_heads // size


def factor_projection(weight: Tensor, second_moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [h, r] with E[(xA)(xA)ᵀ] = 1 and B [r, m], with AB ≈ W in the norm of the inputs; fp64.

    Args:
        weight: W [h, m], y = xW.
        second_moment: E[xxᵀ], [h, h], positive definite.
        rank: r.
    """
    root = torch.linalg.cholesky(second_moment)
    left, singular, right = torch.linalg.svd(root.mT @ weight, full_matrices=False)
    return torch.linalg.solve_triangular(root.mT, left[:, :rank], upper=True), singular[:rank, None] * right[:rank]


def palu(
    stats: Stats, *, share: float, kv_itemsize: int, bits: int = 16, group_heads: int | None = None, seed: int = 0
) -> tuple[Plan, Codec]:
    """Plan and codec at a share of the values per token and layer, cut to whole tiers.

    Args:
        stats: collected with inputs.
        share: of the n values that is kept, in (0, 1].
        kv_itemsize: bytes of an exact component.
        bits: of a latent component, 16 or 4.
        group_heads: KV heads factored together.
        seed: of the rotation before quantization.

    Raises:
        UsageError: the share leaves less than one tier to a head group.
    """
    groups = head_groups(stats.kv.num_key_value_heads, group_heads)
    width = stats.kv.values // (2 * groups)  # columns of a head group
    rank = min(int(share * width) // TIER * TIER, width)
    if rank < TIER:
        least = TIER / width
        raise UsageError(
            f"Palu at {share:.1%} of the values leaves no rank",
            expected=f"at least {least:.1%}",
            remedy="raise the budget",
        )
    weights, moments, bias = projections(stats)
    generator = torch.Generator().manual_seed(seed)
    codecs = []
    for layer in range(len(stats.layers)):
        encoder, decoder = [], torch.zeros(stats.kv.values, 2 * groups * rank, dtype=torch.float64)
        for i in range(2 * groups):
            rows, columns = slice(i * width, (i + 1) * width), slice(i * rank, (i + 1) * rank)
            a, b = factor_projection(weights[layer][:, rows], moments[layer], rank)
            if bits < 16:
                # Latents of their natural size, mixed: all components of a group then vary alike.
                size = b.norm(dim=1) / b.norm() * rank**0.5
                mix = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))[0]
                a, b = (a * size) @ mix, mix.mT @ (b / size[:, None])
            encoder.append(a.mT)
            decoder[rows, columns] = b.mT
        codecs.append(
            GroupCodec(
                encoder=torch.cat(encoder).float(),
                offset=torch.zeros(weights.shape[1]),
                decoder=decoder.float()[None],
                mean=bias[layer].float()[None],
            )
        )
    tiers = (bits,) * (2 * groups * rank // TIER)
    plan = Plan(
        groups=tuple(LayerGroup((layer,), tiers) for layer in stats.layers),
        kv=stats.kv,
        kv_itemsize=kv_itemsize,
        tier_size=TIER,
        window=0,
        sinks=0,
        flush_block=1,
        source="first",
        budget_bytes=0.0,
        at_context=None,
        made_from=f"palu {share} {bits}",
    )
    return plan, Codec(tuple(codecs), made_from=plan.made_from)
