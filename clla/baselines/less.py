"""LESS (arXiv 2402.09398, https://arxiv.org/abs/2402.09398): a state of constant size stands for evicted tokens.

The first tokens and the newest stay (the Λ-shaped mask of the paper). What leaves is added to R rows per head,
H = Σ ψ(k) vᵀ and z = Σ ψ(k), and joins the softmax of the kept tokens as if φ(q)ᵀ ψ(k) were the exponential of a logit:
(Σ_kept exp(s) v + φᵀH) / (Σ_kept exp(s) + φᵀz). φ and ψ are learned, see `less_training`.

Against the paper: φ has weights and a scale of its own in every query head, so that the state may be shared by the
query heads of a key-value head; ψ has no activation after its last layer but the absolute value.

Shape legend: B sequences, H_q = H·G query heads, H key-value heads, T queries, S keys, R rank, h hidden, d head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clla.baselines.attending import AttendingCache, AttendingLayer
from clla.baselines.attention import causal_bias, grouped_logits
from clla.baselines.settings import check_at_least
from clla.errors import UsageError
from clla.source.families import split_layers

TINY = torch.finfo(torch.float32).tiny


class FeatureMaps(nn.Module):
    """φ and ψ of one layer, small MLPs with weights a head, in fp32.

    Args:
        heads: (H, G).
        head_dim: d.
        rank: R.
        hidden: h.
        generator: of the initial weights.
    """

    def __init__(self, heads: tuple[int, int], head_dim: int, *, rank: int, hidden: int, generator: torch.Generator):
        super().__init__()

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * shape[-2] ** -0.5)

        self.query_in = weight(*heads, head_dim, hidden)
        self.query_out = weight(*heads, hidden, rank)
        self.key_in = weight(heads[0], head_dim, hidden)
        self.key_mid = weight(heads[0], hidden, hidden)
        self.key_out = weight(heads[0], hidden, rank)
        # What the products mean to a softmax differs between heads by orders of magnitude.
        self.log_scale = nn.Parameter(torch.zeros(heads))
        self.query_unit = nn.Buffer(torch.ones(()))
        self.key_unit = nn.Buffer(torch.ones(()))

    def of_queries(self, query: Tensor) -> Tensor:
        """φ without its scale [B, H, G, T, R] of queries [B, H_q, T, d]."""
        grouped = query.float().unflatten(1, self.log_scale.shape) / self.query_unit
        return (nn.functional.gelu(grouped @ self.query_in) @ self.query_out).abs()

    def of_keys(self, key: Tensor) -> Tensor:
        """ψ [B, H, S, R] of keys [B, H, S, d]."""
        hidden = nn.functional.gelu(key.float() / self.key_unit @ self.key_in)
        return (nn.functional.gelu(hidden @ self.key_mid) @ self.key_out).abs()


@dataclass(frozen=True)
class LessMaps:
    """Attributes: layers: the trained maps of a model's layers that are not sliding, in order."""

    layers: tuple[FeatureMaps, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(t.nbytes for maps in self.layers for t in maps.state_dict().values())


def masked_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [B, H, G, T, d] and the logarithm of its denominator [B, H, G, T], fp32.

    Args:
        query: [B, H_q, T, d].
        key: [B, H, S, d], as value.
        mask: [T, S], true where a query may look; somewhere in every row.
    """
    logits = grouped_logits(query, key, scaling).masked_fill(~mask, float("-inf"))
    return torch.einsum("bhgts,bhsd->bhgtd", logits.softmax(-1), value.float()), logits.logsumexp(-1)


def merge(kept: Tensor, kept_log: Tensor, log_scale: Tensor, mass: Tensor, total: Tensor) -> Tensor:
    """Attention over kept and evicted tokens: both means, weighed by their denominators, which only meet as logarithms.

    Args:
        kept: [..., d], attention over the kept tokens.
        kept_log: [...], logarithm of its denominator.
        log_scale: [...], of φ.
        mass: [...], φᵀz without that scale, at least 0.
        total: [..., d], φᵀH without it.
    """
    mass = mass.clamp_min(TINY)
    share = torch.sigmoid(log_scale + mass.log() - kept_log)[..., None]
    return kept + share * (total / mass[..., None] - kept)


class LessLayer(AttendingLayer):
    """`keys` and `values` of the first tokens and the newest; `sums` [B, H, R, d] and `mass` [B, H, R] of the rest."""

    def __init__(self, maps: FeatureMaps, capacity: int, sinks: int, block: int) -> None:
        super().__init__()
        self.maps, self.capacity, self.sinks, self.block = maps, capacity, sinks, block
        self.sums: Tensor | None = None
        self.mass: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, plain: Callable[[], Tensor]) -> Tensor:
        mask = causal_bias(query.shape[2], key.shape[2], query.device)
        out, denominator = masked_attention(query, key, value, scaling, mask)
        if self.sums is not None and self.mass is not None:
            phi = self.maps.of_queries(query)
            mass = torch.einsum("bhgtr,bhr->bhgt", phi, self.mass)
            total = torch.einsum("bhgtr,bhrd->bhgtd", phi, self.sums)
            out = merge(out, denominator, self.maps.log_scale[..., None], mass, total)
        surplus = key.shape[2] - self.sinks - self.capacity
        if surplus >= self.block:
            # Whole blocks, so that the state depends on the number of tokens and not on the chunks.
            self._evict(key, value, self.sinks + surplus // self.block * self.block)
        return out.flatten(1, 2).transpose(1, 2).to(query.dtype)

    def _evict(self, key: Tensor, value: Tensor, end: int) -> None:
        """Move the tokens from the sinks to `end` into the state."""
        psi = self.maps.of_keys(key[:, :, self.sinks : end])
        mass = psi.sum(2)
        sums = torch.einsum("bhsr,bhsd->bhrd", psi, value[:, :, self.sinks : end].float())
        self.mass = mass if self.mass is None else self.mass + mass
        self.sums = sums if self.sums is None else self.sums + sums
        self.keys = torch.cat((key[:, :, : self.sinks], key[:, :, end:]), 2)
        self.values = torch.cat((value[:, :, : self.sinks], value[:, :, end:]), 2)


class LessCache(AttendingCache):
    """At most sinks + capacity + block - 1 tokens per layer between forward passes, and the state. For `ObservedModel`.

    Args:
        config: the model's text config.
        maps: from `train_feature_maps`. They are weights, not part of the cache; `maps.nbytes` tells their size.
        capacity: newest tokens kept.
        sinks: first tokens kept.
        block: tokens that leave together.

    Raises:
        UsageError: maps of another model, or nothing kept.
    """

    def __init__(self, config: Any, maps: LessMaps, *, capacity: int, sinks: int = 4, block: int = 16) -> None:
        check_at_least(1, capacity=capacity, block=block)
        check_at_least(0, sinks=sinks)
        num_layers = len(split_layers(config)[0])
        if len(maps.layers) != num_layers:
            raise UsageError(
                f"feature maps of {len(maps.layers)} layers",
                expected=f"one for each of the model's {num_layers} layers",
                remedy="train them on this model",
            )
        super().__init__(config, lambda number: LessLayer(maps.layers[number], capacity, sinks, block))
        self.maps = maps
