"""Keys in two parts: a short rotary key, cached beside the latent, and a position-free rest, decoded from it.

A rotary pair of a key, as a complex number κ, meets the query's q as Re(q* κ e^(iθΔ)) over a distance of Δ tokens.
Pairs of one frequency, in whatever layer and head of a group, turn alike, so any combination of them still turns with
θ: each component of the rotary key is one, c = uᴴ W^(1/2) κ. The rest κ' = κ - W^(-1/2) u c is treated as
position-free: in place of e^(iθΔ) stands g = E_Δ[cos θΔ] (`mean_rotation`), and g κ' is decoded from the latent like
the values. A constant in a position-free key changes no softmax, so it has no mean.

With W the power of the queries that read each pair and S = E[κ̂ κ̂ᴴ] what the input of the group's first layer
explains, components are eigenvectors u of W^(1/2) S W^(1/2), over all frequencies those of the largest λ·(1 - g²): what
would be lost by taking their rotation for its mean. It is the decoupled key of multi-head latent attention
(DeepSeek-V2, arXiv 2405.04434; k^R of CLLA, arXiv 2410.15252), found in closed form as in TransMLA (arXiv 2502.07864),
which turns heads of one frequency into each other.

Shape legend: L layers, G layers of a group, H key-value heads, d head dim, n = 2·H·d, F rotary pairs of a head,
h hidden size, P pairs of the rotary key.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from clla.artifacts.codec import GroupCodec
from clla.artifacts.stats import Stats
from clla.errors import UsageError
from clla.plan.spectra import Spectra
from clla.recipe import Recipe

NEAR = 256  # tokens over whose distances rotations are averaged: attention looks no further (docs/lab-notes.md)
DEEPSEEK_ROPE = 64  # components of the rotary key, as kernels for DeepseekV3 want them


def mean_rotation(frequencies: Tensor, context: int) -> Tensor:
    """g = E_Δ[cos θΔ] over the distances of all pairs of tokens in a causal context.

    Of T tokens T - Δ pairs are Δ apart, each with itself included. The sum of (T - Δ) cos θΔ over Δ from -T to T is
    Fejér's kernel sin²(θT/2) / sin²(θ/2), and so

        g = 2/(T(T+1)) Σ_{0≤Δ<T} (T - Δ) cos θΔ = [T + sin²(θT/2) / sin²(θ/2)] / (T(T+1)).

    In place of e^(iθΔ), g errs by |e^(iθΔ) - g|² = 1 - g² on average. (The complex mean errs less, by the square of the
    mean sine, but over distances that attention does not care for: docs/lab-notes.md.)

    Args:
        frequencies: θ in radians a token, any shape, fp64.
        context: T.
    """
    half = frequencies.double() / 2
    kernel = ((half * context).sin() / half.sin()).square()
    return (context + torch.where(half == 0, float(context) ** 2, kernel)) / (context * (context + 1))


def uncentred(stats: Stats) -> Stats:
    """Stats around zero instead of the mean: codecs made from them add no constant to anything."""
    assert stats.input_mean is not None and stats.input_covariance is not None and stats.input_cross is not None
    covariance, cross, inputs = stats.covariance.clone(), stats.input_cross.clone(), stats.input_mean
    count = len(stats.mean)
    for j in range(min(covariance.shape[1], count)):
        ahead = stats.mean[j:, None]
        covariance[: count - j, j] += stats.mean[: count - j, :, None] * ahead
        cross[: count - j, j] += inputs[: count - j, :, None] * ahead
    return replace(
        stats,
        mean=torch.zeros_like(stats.mean),
        covariance=covariance,
        input_mean=torch.zeros_like(inputs),
        input_covariance=stats.input_covariance + inputs[:, :, None] * inputs[:, None],
        input_cross=cross,
    )


def settle_decoupled(recipe: Recipe, *, head_dim: int) -> Recipe:
    """A recipe whose rotary key has a width, if keys are decoupled: by default that of a head.

    Args:
        recipe: what was asked for.
        head_dim: of the model.

    Raises:
        UsageError: an exact window or sinks, a latent from the whole group, or a layout without a decoupled key.
    """
    plan, budget = recipe.plan, recipe.budget
    if plan.key == "reconstruct":
        if plan.layout != "free":
            raise UsageError(
                f"plan.layout {plan.layout!r} with keys that are reconstructed whole",
                expected="plan.key 'decoupled'",
                remedy="start from --recipe deepseek",
            )
        return recipe
    wrong = [
        name
        for name, good in (
            ("plan.latent_input 'all_layers'", plan.source == "first"),
            (f"budget.exact_window {budget.exact_window}", budget.exact_window == 0),
            (f"budget.num_sinks {budget.num_sinks}", budget.num_sinks == 0),
        )
        if not good
    ]
    if wrong:
        raise UsageError(
            "a decoupled key with " + ", ".join(wrong),
            expected="plan.latent_input 'first_layer', no exact window and no sinks, as in --recipe mla",
            remedy="leave those out, or use plan.key 'reconstruct'",
        )
    if plan.layout == "deepseek" and plan.max_layers_per_group != 1:
        raise UsageError(
            f"plan.layout 'deepseek' with groups of up to {plan.max_layers_per_group or 'several'} layers",
            expected="groups of one layer: DeepseekV3 shares no latent between layers",
            remedy="pass --max-layers-per-group 1",
        )
    width = DEEPSEEK_ROPE if plan.layout == "deepseek" else max(8, head_dim // 8 * 8)
    return recipe.override({"plan": {"qk_rope_head_dim": plan.qk_rope_head_dim or width}})


@dataclass(frozen=True)
class KeySplit:
    """How the keys of one layer group fall apart; all in fp64.

    Attributes:
        pairs: [P] which rotary pair of a head each pair of the rotary key turns like.
        encoder: [2P, h] rotary key, of unit variance, from the input less its mean.
        mean: [2P] added to it.
        query: [G, H, P] complex, what each pair of a key is in terms of its component.
        rest: [G, h, n] whitened regression of position-free keys and values, T·Cov(x, y')
        whole: [G, h, n] the same of whole keys and values.
        stirred: [G, H, F] mean square of what the mean rotation misses of a pair.
    """

    pairs: tuple[int, ...]
    encoder: Tensor
    mean: Tensor
    query: Tensor
    rest: Tensor
    whole: Tensor
    stirred: Tensor


@dataclass(frozen=True)
class DecoupledSpectra(Spectra):
    """As `Spectra`, of position-free keys and values: what the latent holds beside a rotary key.

    Args:
        components: of the rotary key, 2P.
        context: tokens over whose distances rotations are averaged.
        once: take the first component of each of P evenly spaced frequencies, instead of the best of all.
    """

    components: int = 0
    context: int = 0
    once: bool = False

    def __post_init__(self) -> None:
        stats = self.stats
        if stats.reading is not None:
            raise UsageError(
                f"decoupled keys with moments reduced to {stats.width} coordinates per layer",
                expected="moments of all keys and values",
                remedy=f"raise calibration.basis to {stats.kv.values}",
            )
        assert stats.frequencies is not None, "the stats were collected without queries"
        pairs, most = self.components // 2, stats.kv.num_key_value_heads * stats.frequencies.shape[1]
        most = stats.frequencies.shape[1] if self.once else most
        if pairs > most:
            raise UsageError(
                f"plan.qk_rope_head_dim {self.components}",
                expected=f"at most {2 * most} for this model and plan.layout",
                remedy="lower it",
            )

    @cached_property
    def mean_rotations(self) -> Tensor:
        """g [L, F]."""
        assert self.stats.frequencies is not None
        return mean_rotation(self.stats.frequencies, self.context).to(self.device)

    @cached_property
    def missed(self) -> Tensor:
        """1 - g² [L, F]: the share of a pair's energy that its mean rotation misses."""
        return 1 - self.mean_rotations.square()

    @cached_property
    def _whitening(self) -> dict[int, Tensor]:
        return {}

    def input_whitening(self, start: int) -> Tensor:
        if start not in self._whitening:
            self._whitening.clear()  # groups come by their first layers
            self._whitening[start] = super().input_whitening(start)
        return self._whitening[start]

    @cached_property
    def _splits(self) -> dict[tuple[int, int], KeySplit]:
        return {}

    def split(self, start: int, size: int) -> KeySplit:
        """How the keys of the layers start … start + size - 1 fall apart."""
        if (start, size) not in self._splits:
            self._splits.clear()  # one is asked for several times in a row
            self._splits[start, size] = self._split(start, size)
        return self._splits[start, size]

    def _split(self, start: int, size: int) -> KeySplit:
        stats = self.stats
        assert stats.input_cross is not None and stats.query_power is not None and stats.rotary_channels is not None
        heads, width = stats.kv.num_key_value_heads, stats.kv.head_dim
        layers = slice(start, start + size)
        whitening = self.input_whitening(start)
        whole = whitening @ stats.input_cross[start, :size].to(self.device).double()  # [G, h, n]
        keys = whole[..., : heads * width].unflatten(-1, (heads, width))[..., stats.rotary_channels]  # [G, h, H, F, 2]
        pairs = torch.view_as_complex(keys.contiguous()).permute(3, 1, 0, 2).flatten(2)  # [F, h, G·H]
        means = stats.mean[layers, : heads * width].to(self.device).double().unflatten(1, (heads, width))
        means = torch.view_as_complex(means[..., stats.rotary_channels].contiguous()).permute(2, 0, 1).flatten(1)
        power = stats.query_power[layers].to(self.device).double().unflatten(1, (heads, -1)).sum(2)  # [G, H, F]
        power = torch.where((stats.frequencies[layers] != 0)[:, None].to(self.device), power, 0.0)  # type: ignore[index]
        root = power.permute(2, 0, 1).flatten(1).sqrt()  # W^(1/2) [F, G·H]
        energy = pairs.mT @ pairs.conj() + means[:, :, None] * means[:, None].conj()  # S [F, G·H, G·H]
        values, vectors = torch.linalg.eigh(root[:, :, None] * energy * root[:, None])
        where, which = self._best(values, self.missed[layers].amax(0))
        chosen, worth = vectors[where, :, which], values[where, which]  # [P, G·H], [P]
        size_of = (worth.clamp_min(0) / 2).sqrt()  # root mean square of real and imaginary part
        down = torch.where(size_of > 0, 1 / size_of, 0.0)
        reader = chosen.conj() * root[where] * down[:, None]
        inverse = torch.where(root > 0, 1 / root, 0.0)
        answer = chosen * inverse[where] * size_of[:, None]  # [P, G·H]
        encoder = (reader[:, None] @ pairs[where].mT)[:, 0] @ whitening.to(reader.dtype)  # [P, h]
        # What is left of the pairs: (1 - W^(-1/2) u uᴴ W^(1/2)) κ, summed over a frequency's components.
        kept = torch.zeros_like(energy)
        kept.index_put_((where,), answer[:, :, None] * reader[:, None], accumulate=True)  # [F, G·H, G·H]
        rest = pairs - pairs @ kept.mT
        left = means - (kept @ means[..., None])[..., 0]
        stirred = rest.abs().square().sum(1) + left.abs().square()  # [F, G·H]
        stirred = stirred.unflatten(1, (size, heads)).permute(1, 2, 0) * self.missed[layers][:, None]
        still = rest.unflatten(2, (size, heads)).permute(2, 1, 3, 0) * self.mean_rotations[layers][:, None, None]
        out = whole.clone()
        out_keys = out[..., : heads * width].unflatten(-1, (heads, width))
        out_keys[..., stats.rotary_channels.to(self.device)] = torch.view_as_real(still)
        return KeySplit(
            pairs=tuple(where.tolist()),
            encoder=torch.view_as_real(encoder).permute(0, 2, 1).flatten(0, 1),
            mean=torch.view_as_real((reader * means[where]).sum(1)).flatten(),
            query=answer.unflatten(1, (size, heads)).permute(1, 2, 0),
            rest=out,
            whole=whole,
            stirred=stirred,
        )

    def _best(self, values: Tensor, missed: Tensor) -> tuple[Tensor, Tensor]:
        """Frequency and number of the eigenvalues [F, G·H] that become components; `missed` [F] is lost of others."""
        count, pairs = values.shape[1], self.components // 2
        if self.once:
            where = torch.arange(pairs, device=values.device) * (len(values) // pairs)
            return where, torch.full_like(where, count - 1)
        order = (values * missed[:, None]).flatten().argsort(descending=True)[:pairs]
        return order // count, order % count

    def regression(self, start: int, size: int) -> Tensor:
        """T·Cov(x, y')·M of a group's position-free keys and values, [h, n·G], fp64."""
        return (self.split(start, size).rest @ self.metric[start : start + size]).transpose(0, 1).flatten(1)

    def energy(self, start: int, size: int) -> float:
        """Weighted variance that the latent is to hold, and what neither it nor the rotary key can."""
        split, metric = self.split(start, size), self.metric[start : start + size]
        explained = (split.whole @ metric).square().sum() - (split.rest @ metric).square().sum()
        weights = self._pair_weights(metric @ metric)
        return super().energy(start, size) - float(explained) + float((weights * split.stirred).sum())

    def _pair_weights(self, metric: Tensor) -> Tensor:
        """Mean diagonal entry of quadratic forms [G, n, n] in each rotary pair of a key, [G, H, F]."""
        heads, width = self.stats.kv.num_key_value_heads, self.stats.kv.head_dim
        assert self.stats.rotary_channels is not None
        own = metric.diagonal(dim1=-2, dim2=-1)[:, : heads * width].unflatten(1, (heads, width))
        return own[..., self.stats.rotary_channels].mean(-1)

    def rotary(self, codec: GroupCodec, start: int, size: int) -> GroupCodec:
        """A group's codec for position-free keys and values, with its rotary key."""
        split, half = self.split(start, size), self.stats.kv.values // 2
        mean = codec.mean.clone()
        mean[:, :half] = 0
        return replace(
            codec,
            mean=mean,
            rope_encoder=split.encoder.float().cpu().contiguous(),
            rope_mean=split.mean.float().cpu(),
            rope_query=torch.view_as_real(split.query.resolve_conj()).float().cpu().contiguous(),
        )

    def of_group(self, start: int, size: int) -> Stats:
        """Stats of one group alone, with position-free keys and values in place of whole ones: what codecs aim at."""
        split, stats = self.split(start, size), self.stats
        assert stats.input_covariance is not None
        cross = torch.linalg.solve_triangular(self.input_whitening(start), split.rest, upper=False)
        more = split.rest.mT @ split.rest - split.whole.mT @ split.whole
        return replace(
            stats,
            input_covariance=stats.input_covariance[start : start + 1],
            input_cross=cross.float().cpu()[None],
            covariance=(stats.covariance[start : start + size, 0] + more.float().cpu())[:, None],
        )

    def turning_kl(self, start: int, size: int) -> float:
        """Nats a token, by second order, that taking rotations for their means costs."""
        fisher = self.stats.fisher[start : start + size].to(self.device).double()
        return 0.5 * float((self._pair_weights(fisher) * self.split(start, size).stirred).sum())
