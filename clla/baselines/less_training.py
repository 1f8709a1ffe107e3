"""Feature maps of LESS (arXiv 2402.09398) are trained a layer at a time: its full attention output is the target.

Queries, keys and values are read once from the unchanged model. Every query sees the first tokens and the newest
exactly, and those between through the maps, all in parallel. The paper trains on far more text.

Shape legend: B sequences, H_q = H·G query heads, H key-value heads, T tokens, P sampled queries, d head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from clla.baselines.attending import AttendingCache, AttendingLayer
from clla.baselines.attention import ObservedModel
from clla.baselines.less import FeatureMaps, LessMaps, masked_attention, merge
from clla.errors import UsageError
from clla.modeling.hooks_clla import CACHE

SAMPLED = 64  # queries of a sequence; more cost time and teach little


@dataclass(frozen=True)
class Sample:
    """Some queries of one batch in one layer, and what does not depend on the maps.

    Attributes:
        query: [B, H_q, P, d].
        key: [B, H, T, d], as value.
        evicted: [P, T], true where a token has left the cache when the query comes.
        kept: [B, H, G, P, d], attention over the kept tokens.
        kept_log: [B, H, G, P], logarithm of its denominator.
        evicted_log: [B, H, G, P], logarithm of what the evicted tokens would add to it.
        target: [B, H, G, P, d], attention over all tokens.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    evicted: Tensor
    kept: Tensor
    kept_log: Tensor
    evicted_log: Tensor
    target: Tensor


class _CapturingLayer(AttendingLayer):
    """Keeps every key and value, and the queries at some positions."""

    def __init__(self, positions: Tensor) -> None:
        super().__init__()
        self.positions = positions

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, plain: Callable[[], Tensor]) -> Tensor:
        self.query, self.scaling = query[:, :, self.positions], scaling
        return plain()


def train_feature_maps(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    *,
    capacity: int,
    sinks: int = 4,
    rank: int = 8,
    hidden: int = 64,
    steps: int = 200,
    lr: float = 1e-2,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda _: None,
) -> LessMaps:
    """Train φ and ψ of every layer that is not sliding.

    Args:
        model: in evaluation mode; its weights are not changed.
        batches: token ids [B, T] without padding, several capacities long.
        capacity: newest tokens kept.
        sinks: first tokens kept.
        rank: rows of the state.
        hidden: width of the maps.
        steps: a layer, one batch each.
        lr: of Adam at the start; it falls to zero.
        seed: of the maps and of the queries sampled.
        on_step: called with 1 after each step of each layer.

    Raises:
        UsageError: no text, or a text without an evicted token.
    """
    generator = torch.Generator().manual_seed(seed)
    captures = [_capture(model, batch, capacity + sinks, generator) for batch in batches]
    if not captures:
        raise UsageError("no text to train feature maps on", remedy="pass at least one batch")
    trained = []
    for layers in zip(*captures, strict=True):
        samples = [simulate(layer, capacity=capacity, sinks=sinks) for layer in layers]
        trained.append(
            _train_layer(samples, rank=rank, hidden=hidden, steps=steps, lr=lr, generator=generator, on_step=on_step)
        )
    return LessMaps(tuple(trained))


@torch.no_grad()
def _capture(model: PreTrainedModel, input_ids: Tensor, kept: int, generator: torch.Generator) -> list[_CapturingLayer]:
    """Run one batch [B, T]; queries are sampled among those for which a token has left."""
    if input_ids.shape[1] <= kept + 1:
        raise UsageError(
            f"texts of {input_ids.shape[1]} tokens for a cache that keeps {kept}",
            expected="several times as many",
            remedy="train on longer texts, or lower the capacity",
        )
    first = kept + 1
    chosen = first + torch.randperm(input_ids.shape[1] - first, generator=generator)[:SAMPLED].to(input_ids.device)
    layers: list[_CapturingLayer] = []

    def new_layer(_: int) -> _CapturingLayer:
        layers.append(_CapturingLayer(chosen))
        return layers[-1]

    cache = AttendingCache(model.config.get_text_config(), new_layer)
    ObservedModel(model)(input_ids=input_ids, use_cache=True, **{CACHE: cache})
    return layers


@torch.no_grad()
def simulate(layer: _CapturingLayer, *, capacity: int, sinks: int) -> Sample:
    """What a stream with that many tokens kept would see."""
    query, key, value, scaling = layer.query, layer.keys, layer.values, layer.scaling
    assert key is not None and value is not None
    ages = layer.positions[:, None] - torch.arange(key.shape[2], device=key.device)
    evicted = (ages > capacity) & (torch.arange(key.shape[2], device=key.device) >= sinks)
    kept, kept_log = masked_attention(query, key, value, scaling, (ages >= 0) & ~evicted)
    _, evicted_log = masked_attention(query, key, value, scaling, evicted)
    target, _ = masked_attention(query, key, value, scaling, ages >= 0)
    return Sample(query, key, value, evicted, kept, kept_log, evicted_log, target)


def evicted_part(maps: FeatureMaps, sample: Sample) -> tuple[Tensor, Tensor]:
    """φᵀz [B, H, G, P] and φᵀH [B, H, G, P, d] of each query's own evicted tokens, without φ's scale."""
    products = torch.einsum("bhgpr,bhtr->bhgpt", maps.of_queries(sample.query), maps.of_keys(sample.key))
    products = products * sample.evicted
    return products.sum(-1), torch.einsum("bhgpt,bhtd->bhgpd", products, sample.value.float())


def output_error(maps: FeatureMaps, sample: Sample) -> Tensor:
    """Mean squared error of the merged attention, relative to the mean square of the full one."""
    merged = merge(sample.kept, sample.kept_log, maps.log_scale[..., None], *evicted_part(maps, sample))
    return (merged - sample.target).square().mean() / sample.target.square().mean()


def _train_layer(
    samples: list[Sample],
    *,
    rank: int,
    hidden: int,
    steps: int,
    lr: float,
    generator: torch.Generator,
    on_step: Callable[[int], None],
) -> FeatureMaps:
    first = samples[0]
    heads = (first.key.shape[1], first.query.shape[1] // first.key.shape[1])
    maps = FeatureMaps(heads, first.key.shape[-1], rank=rank, hidden=hidden, generator=generator).to(first.key.device)
    with torch.no_grad():
        maps.query_unit.copy_(first.query.float().square().mean().sqrt())
        maps.key_unit.copy_(first.key.float().square().mean().sqrt())
        # Start where the evicted tokens weigh what they should on average, rather than all or nothing.
        short = [(s.evicted_log - evicted_part(maps, s)[0].log()).mean((0, -1)) for s in samples]
        maps.log_scale.copy_(torch.stack(short).mean(0))
    optimizer = torch.optim.Adam(maps.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for sample in itertools.islice(itertools.cycle(samples), steps):
            optimizer.zero_grad()
            output_error(maps, sample).backward()
            optimizer.step()
            schedule.step()
            on_step(1)
    return maps.requires_grad_(False)
