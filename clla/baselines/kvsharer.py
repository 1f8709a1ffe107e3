"""KVSharer: some layers read the cache of a layer below them, unlike ones first (arXiv 2410.18517).

https://arxiv.org/abs/2410.18517 (KVSharer: Efficient Inference via Layer-Wise Dissimilar KV Cache Sharing)

Pairs of layers are tried in the order of the distance between their caches, averaged over calibration samples.
A pair is kept while the last decoder layer's output stays similar enough to the source model's.

Against the paper: its layers also skip computing keys and values that are never read; here only memory is saved.
The distance is that of whole flattened caches and the similarity a mean over tokens, as the text says; the
authors' code means vector distances, and takes the cosine of whole texts after the final norm. The two orders and
the KL score are for comparison.

Bytes per token at itemsize b: 2H·d·b a leader.

Shape legend: B sequences, H key-value heads, T tokens, d head dim, h hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from clla.baselines.settings import check_one_of
from clla.errors import UsageError
from clla.evaluate.measured_cache import MeasuredCache
from clla.modeling.hooks_clla import CACHE
from clla.source.families import split_layers

Order = Literal["dissimilar", "similar"]
Score = Literal["cosine", "kl"]


def collapse(mapping: dict[int, int], layer: int, leader: int) -> dict[int, int]:
    """The mapping of layers to leaders after `layer`, itself a leader, and its followers take over `leader`'s."""
    root = mapping[leader]
    return {follower: root if own == layer else own for follower, own in mapping.items()}


def ranked_pairs(caches: dict[int, Tensor], order: Order) -> list[tuple[int, int]]:
    """Pairs (layer, lower layer) by the Euclidean distance of their flattened caches."""
    layers = sorted(caches)
    pairs = [(upper, lower) for upper in layers for lower in layers if lower < upper]
    sign = {"dissimilar": -1, "similar": 1}[order]
    return sorted(pairs, key=lambda pair: sign * float((caches[pair[0]] - caches[pair[1]]).norm()))


def mean_cosine(outputs: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """Mean cosine similarity over tokens of hidden states [B, T, h]."""
    pairs = zip(outputs, references, strict=True)
    return float(torch.cat([nn.functional.cosine_similarity(a.float(), b.float(), dim=-1) for a, b in pairs]).mean())


def mean_kl(outputs: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """Mean KL over tokens, in nats, of logits [B, T, V] to the reference's."""
    losses = []
    for output, reference in zip(outputs, references, strict=True):
        log_p, log_q = reference.float().log_softmax(-1), output.float().log_softmax(-1)
        losses.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return float(torch.cat(losses).mean())


@torch.no_grad()
def mean_caches(model: PreTrainedModel, batches: Sequence[Tensor]) -> dict[int, Tensor]:
    """Keys and values [2, H, T, d] (fp32) of each layer with full attention, averaged over all sequences."""
    full, _ = split_layers(model.config)
    sums = dict.fromkeys(full, torch.zeros(()))
    for batch in batches:
        cache = DynamicCache(config=model.config)
        model(input_ids=batch.to(model.device), use_cache=True, logits_to_keep=1, **{CACHE: cache})
        layers: list[Any] = cache.layers
        for layer in full:
            sums[layer] = sums[layer] + torch.stack((layers[layer].keys, layers[layer].values)).float().sum(1).cpu()
    return {layer: total / sum(len(batch) for batch in batches) for layer, total in sums.items()}


@torch.no_grad()
def outputs_of(
    model: PreTrainedModel, batches: Sequence[Tensor], leaders: dict[int, int], score: Score
) -> list[Tensor]:
    """What `score` compares, one a batch: the last decoder layer's output [B, T, h], or logits [B, T, V]."""
    hidden: list[Tensor] = []

    def take(module: nn.Module, args: Any, output: Any) -> None:
        hidden.append(output[0] if isinstance(output, tuple) else output)

    decoder: Any = model.base_model
    hook = decoder.layers[-1].register_forward_hook(take)
    logits = []
    try:
        for batch in batches:
            cache = KvSharerCache(model.config, leaders=leaders)
            keep = 0 if score == "kl" else 1
            output = model(input_ids=batch.to(model.device), use_cache=True, logits_to_keep=keep, **{CACHE: cache})
            logits.append(output.logits)
    finally:
        hook.remove()
    return logits if score == "kl" else hidden


def search(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    *,
    share: int,
    order: Order = "dissimilar",
    score: Score = "cosine",
    threshold: float = 0.5,
    on_step: Callable[[int], None] = lambda _: None,
) -> dict[int, int]:
    """Find layers that can read another's cache.

    Args:
        model: the source model.
        batches: token ids [B, T], all of one length T.
        share: number of layers to replace.
        order: which pairs are tried first; the paper's is `dissimilar`.
        score: `cosine` of the last decoder layer's outputs, as in the paper, or `kl` of the logits.
        threshold: a pair is kept if the cosine is above it, or the KL below it.
        on_step: called with 1 after each trial, a forward pass over all batches.

    Returns:
        The leader of each layer with full attention, itself if it is kept. Fewer than `share` layers are
        replaced where no more pairs pass.

    Raises:
        UsageError: batches of several lengths, or none; more layers to replace than can be.
    """
    check_one_of(get_args(Order), order=order)
    check_one_of(get_args(Score), score=score)
    full, _ = split_layers(model.config)
    lengths = sorted({batch.shape[1] for batch in batches})
    if len(lengths) != 1:
        raise UsageError(
            f"calibration batches have lengths {lengths}", expected="one length", remedy="cut all to the shortest"
        )
    if not 0 <= share < len(full):
        raise UsageError(
            f"{share} of {len(full)} layers to be replaced",
            expected=f"0 to {len(full) - 1}",
            remedy="leave at least one layer its own cache",
        )
    leaders = {layer: layer for layer in full}
    reference = outputs_of(model, batches, leaders, score)
    for layer, leader in ranked_pairs(mean_caches(model, batches), order):
        if replaced(leaders) == share:
            break
        if leaders[layer] != layer:
            continue
        trial = collapse(leaders, layer, leader)
        outputs = outputs_of(model, batches, trial, score)
        if score == "kl":
            accepted = mean_kl(outputs, reference) < threshold
        else:
            accepted = mean_cosine(outputs, reference) > threshold
        if accepted:
            leaders = trial
        on_step(1)
    return leaders


def replaced(leaders: dict[int, int]) -> int:
    """Number of layers without a cache of their own."""
    return sum(layer != leader for layer, leader in leaders.items())


class FollowerLayer(DynamicLayer):
    """A layer that reads another's cache, which has run before it in the same forward pass."""

    def __init__(self, leader: DynamicLayer) -> None:
        super().__init__()
        self.leader = leader

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.leader.keys is not None and self.leader.values is not None, "the leader runs first"
        return self.leader.keys, self.leader.values

    def get_seq_length(self) -> int:
        return self.leader.get_seq_length()


class KvSharerCache(MeasuredCache):
    """Cache in which only leaders store; sliding-window layers stay as the model has them.

    Args:
        config: the model's text config.
        leaders: the leader of each layer with full attention, as `search` returns it.

    Raises:
        UsageError: other layers than those with full attention, or a leader that is none or lies higher.
    """

    def __init__(self, config: Any, *, leaders: dict[int, int]) -> None:
        full, _ = split_layers(config)
        broken = [f"{i}→{j}" for i, j in leaders.items() if j > i or leaders.get(j) != j]
        if sorted(leaders) != list(full) or broken:
            raise UsageError(
                f"leaders {', '.join(broken)}" if broken else f"leaders of layers {sorted(leaders)}",
                expected=f"for each of layers {list(full)} a leader that is not above it and leads itself",
                remedy="take the mapping that `search` found for this model",
            )
        stored = {leader: DynamicLayer() for leader in leaders.values()}
        super().__init__(config, stored | {i: FollowerLayer(stored[j]) for i, j in leaders.items() if i != j})
