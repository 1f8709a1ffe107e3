"""Run text through the source model and collect the moments that the plan rests on.

Keys and values are read where the model hands them to its cache, so that biases, QK-norm, grouped
heads and mixtures of experts need no special case. Their gradients are those of far queries (`far.py`), those of keys
before RoPE follow from those after it. No weight has a gradient, and the graph begins at the first layer's keys and
values.

Errors of different tokens do not cost the same: moments and metric are weighted (`importance.py`).

Shape legend: B sequences, T tokens, H key-value heads, d head dim, n = 2·H·d, L convertible layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedModel

from clla.artifacts.plan import KVShape
from clla.artifacts.stats import Stats
from clla.calibrate.far import Note, far_attention
from clla.calibrate.fisher import sampled_label_gradient
from clla.calibrate.importance import PORTION, Importance
from clla.calibrate.moments import BandedMoments
from clla.calibrate.queries import QueryPower
from clla.calibrate.recomputation import Recomputation
from clla.errors import DatasetError
from clla.modeling.hooks_clla import CACHE, attention_modules, rope_of
from clla.modeling.observe_clla import listening
from clla.modeling.rotary_clla import Rotation
from clla.source.recording import RecordingCache

CHECKED_TOKENS = 48


@dataclass
class Tap:
    """What one attention layer handed to its cache in the current forward pass, and the loss's gradient there.

    Attributes:
        layer: its index.
        rotation: of the keys; None if there is none.
        hidden: what the attention got, [B, T, h].
        states: keys after RoPE and values, [B, H, T, d] each.
        far: gradients are those of far queries, which attention tells; else of all queries.
        handed: what its attention gets, whose gradients are wanted.
        gradients: of the loss, with respect to keys and values.
        query: [B, H_q, T, d] after RoPE, where queries are listened to.
    """

    layer: int
    rotation: Rotation | None = None
    hidden: Tensor | None = None
    states: tuple[Tensor, Tensor] | None = None
    far: bool = False
    handed: tuple[Tensor, Tensor] | None = None
    gradients: dict[int, Tensor] = field(default_factory=dict)
    query: Tensor | None = None

    def watch(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Note keys and values, and hand on their like, whose gradients, if any are formed, will be noted."""
        if self.states is None:  # it is not when a checkpointed layer runs again, whose graph nobody follows
            self.states = (keys.detach(), values.detach())
        if not torch.is_grad_enabled():
            self.handed = keys, values
            return self.handed
        watched = []
        for number, state in enumerate((keys, values)):
            state = state.view_as(state) if state.requires_grad else state.detach().requires_grad_()
            if not self.far:
                state.register_hook(partial(self.gradients.__setitem__, number))
            watched.append(state)
        self.handed = watched[0], watched[1]
        return self.handed

    def read(self, key: Tensor) -> bool:
        """Whether these keys are what it handed on."""
        return self.handed is not None and self.handed[0] is key

    def note(self, *gradients: Tensor) -> None:
        """Add the gradients of keys and values [B, H, T, d] that one attention to them has told."""
        for number, gradient in enumerate(gradients):
            before = self.gradients.get(number)
            self.gradients[number] = gradient if before is None else before + gradient

    @property
    def values(self) -> Tensor:
        """Keys before RoPE and values, [B, T, n]."""
        assert self.states is not None, "the layer did not call its cache"
        keys, values = self.states
        return _side_by_side(keys if self.rotation is None else self.rotation.unrotate(keys, self.layer), values)

    @property
    def gradient(self) -> Tensor:
        """Of the loss, for keys before RoPE and values, [B, T, n], fp32; zero where nothing was read."""
        assert self.states is not None, "the layer did not call its cache"
        keys, values = (self.gradients.get(i, torch.zeros_like(state)).float() for i, state in enumerate(self.states))
        return _side_by_side(
            keys if self.rotation is None else unrotated_gradient(keys, self.rotation, self.layer), values
        )


def unrotated_gradient(gradient: Tensor, rotation: Rotation, layer: int) -> Tensor:
    """Gradient with respect to keys before RoPE, from that with respect to keys after it, [B, H, T, d] both.

    The transpose of a rotation is its inverse; where lengths change too (yarn), by s, it is s² of it.
    """
    if layer in rotation.plain_layers:
        return gradient
    turned, p = rotation.unrotate(gradient, layer), rotation.cos.shape[-1]
    scale = (rotation.cos.float().square() + rotation.sin.float().square()).unsqueeze(1).to(turned.device)
    turned[..., :p] *= scale
    return turned


def _side_by_side(keys: Tensor, values: Tensor) -> Tensor:
    return torch.cat((keys, values), dim=1).transpose(1, 2).flatten(2)  # [B, T, 2·H·d]


@dataclass
class TokenRows:
    """What some tokens have to say, one tensor per layer.

    Attributes:
        values: keys before RoPE and values, [N, n].
        gradients: of the loss with respect to them, fp32; none where no metric is wanted.
        inputs: of the attention, [N, h]; none where they are not wanted.
    """

    values: list[Tensor]
    gradients: list[Tensor]
    inputs: list[Tensor]

    def to(self, device: torch.device) -> TokenRows:
        """The same on a device."""
        return TokenRows(*([rows.to(device) for rows in own] for own in (self.values, self.gradients, self.inputs)))


class ProbeCache(RecordingCache):
    """A cache that passes keys and values to taps and returns what they return."""

    def __init__(self, config: Any, taps: dict[int, Tap]) -> None:
        super().__init__(config, set())
        self.taps = taps

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        tap = self.taps.get(layer_idx)
        return (key_states, value_states) if tap is None else tap.watch(key_states, value_states)

    def reader(self, key: Tensor, _: Tensor) -> Note | None:
        """Who is told the gradients of keys and values, if a tap handed them on; several layers may read the same."""
        for tap in self.taps.values():
            if tap.read(key):
                return tap.note
        return None

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, plain: Callable[[], Tensor]
    ) -> Tensor:
        if layer_idx in self.taps:
            self.taps[layer_idx].query = query.detach()
        return plain()


@dataclass(frozen=True)
class Collection:
    """What is collected.

    Attributes:
        layers: convertible layer indices.
        kv: what each layer caches.
        band: largest group size K.
        rope: from `rope_settings`.
        skip_positions: first positions of each sequence left out (attention sinks are outliers).
        with_inputs: also collect the attention inputs' moments (for latents from the first layer's input).
        with_queries: also collect the strength of queries (for the `decoupled` key).
        seed: of the sampled labels.
        window: W, newest tokens that will be exact: the metric counts what queries at least as far away read.
        with_metric: also collect gradients, by which tokens count; else all count alike, and the metric is I.
    """

    layers: tuple[int, ...]
    kv: KVShape
    band: int
    rope: dict[str, Any] | None
    skip_positions: int = 8
    with_inputs: bool = False
    with_queries: bool = False
    seed: int = 0
    window: int = 0
    with_metric: bool = True


class Collector:
    """Accumulates `Stats` batch by batch.

    Args:
        model: the source, in evaluation mode; its weights are not changed.
        wanted: what is collected.
        checkpointing: run layers again in the backward pass: `auto` where their activations would not fit.
    """

    def __init__(self, model: PreTrainedModel, wanted: Collection, *, checkpointing: str = "auto") -> None:
        self.model, self.wanted, self.rope = model, wanted, rope_of(model, wanted.rope)
        count, n, hidden = len(wanted.layers), wanted.kv.values, model.config.get_text_config().hidden_size
        band, with_inputs = min(wanted.band, count), wanted.with_inputs
        self.moments = BandedMoments(count, n, band=band)
        self.metric = BandedMoments(count, n, band=1)
        self.inputs = BandedMoments(count, hidden, band=1) if with_inputs else None
        self.cross = BandedMoments(count, hidden, band=band, right_dim=n) if with_inputs else None
        self.queries = QueryPower(model, wanted.layers, wanted.rope) if wanted.with_queries else None
        self.attention = attention_modules(model)
        self.recomputation = Recomputation(model, checkpointing)
        self.window = wanted.window if wanted.with_metric and wanted.window and self._sees_far() else 0
        self.importance: Importance | None = None  # by which tokens are weighted; without, all count alike
        self._top: Tensor | None = None  # gradient of the last batch's logits, whose memory the next one takes

    def add(self, input_ids: Tensor, number: int = 0) -> None:
        """Fold in one batch of token ids [B, T]; every position counts, there is no padding.

        Args:
            input_ids: the batch.
            number: of it among all batches, from which its labels follow.
        """
        self.fold(self.read(input_ids, number))

    def read(self, input_ids: Tensor, number: int = 0) -> TokenRows:
        """What one batch of token ids [B, T], the `number`-th, has to say."""
        taps = self.watch(input_ids, number)
        if self.queries is not None:
            for layer, tap in enumerate(taps):
                self.queries.add(layer, tap.query, self.wanted.skip_positions)
        return TokenRows(
            values=[self._rows(tap.values) for tap in taps],
            gradients=[self._rows(tap.gradient) for tap in taps] if self.wanted.with_metric else [],
            inputs=[self._rows(tap.hidden) for tap in taps] if self.inputs is not None else [],
        )

    def watch(self, input_ids: Tensor, number: int = 0) -> list[Tap]:
        """Run one batch forward and, for the metric, backward; what its layers' caches got."""
        with_metric = self.wanted.with_metric
        with self._tapped(input_ids, far=self.window > 0) as cache, ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(with_metric))
            stack.enter_context(self.recomputation.active(input_ids.numel()))
            if self.queries is not None:
                stack.enter_context(listening(cache))
            if self.window:
                window = near_tokens(self.window, input_ids.shape[1])
                stack.enter_context(far_attention(self.model, window, cache.reader))
            options = {} if with_metric else fewest_logits(self.model)
            logits = self.model(input_ids=input_ids, use_cache=True, **{CACHE: cache}, **options).logits
            if not with_metric:
                return list(cache.taps.values())
            self._top = sampled_label_gradient(logits, batch_generator(self.wanted.seed, number), out=self._top)
            logits.backward(self._top)
        return list(cache.taps.values())

    @contextmanager
    def _tapped(self, input_ids: Tensor, *, far: bool) -> Iterator[ProbeCache]:
        """A cache with a tap for each convertible layer; meanwhile no weight has a gradient."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        rotation = None if self.rope is None else self.rope(positions)
        taps = {layer: Tap(layer, rotation, far=far) for layer in self.wanted.layers}
        handles = [
            self.attention[layer].register_forward_pre_hook(tap_hook(tap), with_kwargs=True)
            for layer, tap in taps.items()
        ]
        frozen = [p for p in self.model.parameters() if p.requires_grad]
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            yield ProbeCache(self.model.config, taps)
        finally:
            for handle in handles:
                handle.remove()
            for parameter in frozen:
                parameter.requires_grad_(True)

    def _sees_far(self) -> bool:
        """Whether the model computes the same through our attention, which sees what all of its layers cache."""
        text_config = self.model.config.get_text_config()
        ids = torch.arange(CHECKED_TOKENS, device=self.model.device)[None] % text_config.vocab_size
        with torch.no_grad():
            expected = self.model(input_ids=ids, use_cache=False).logits
        seen: set[int] = set()
        with self._tapped(ids, far=True) as cache, torch.no_grad():

            def reader(key: Tensor, value: Tensor) -> None:
                seen.update(layer for layer, tap in cache.taps.items() if tap.read(key))

            try:
                with far_attention(self.model, 1, reader):
                    found = self.model(input_ids=ids, use_cache=True, **{CACHE: cache}).logits
            except ValueError:  # transformers lets nobody else compute this model's attention
                return False
        return seen == set(self.wanted.layers) and alike(found, expected)

    @torch.no_grad()
    def settle(self, portion: list[TokenRows]) -> None:
        """Weight tokens, with what they themselves say of weights, and add them to the moments."""
        if self.importance is not None:
            layers = range(len(self.wanted.layers))
            self.importance.learn([[rows.gradients[layer] for rows in portion] for layer in layers], self.model.device)
        for rows in portion:
            self.fold(rows.to(self.model.device))

    @torch.no_grad()
    def fold(self, rows: TokenRows) -> None:
        """Add tokens to the moments."""
        weights, gradients = None, rows.gradients
        if gradients and self.importance is not None:
            weights = self.importance.weights(gradients)
            gradients = [own / weights.sqrt()[:, None] for own in gradients]
        if gradients:
            self.metric.add(gradients)
        self.moments.add(rows.values, weights=weights)
        if self.inputs is not None and self.cross is not None:
            self.inputs.add(rows.inputs, weights=weights)
            self.cross.add(rows.inputs, rows.values, weights=weights)

    def _rows(self, x: Tensor | None) -> Tensor:
        return token_rows(x, self.wanted.skip_positions).to(self.model.device)  # layers may lie on several

    def join(self, device: torch.device) -> None:
        """Add up the moments of all processes; afterwards each has those of all. `device` talks to the others."""
        for moments in (self.moments, self.metric, self.inputs, self.cross):
            if moments is not None and (moments is not self.metric or self.wanted.with_metric):
                moments.join(device)
        if self.queries is not None:
            self.queries.join(device)

    def stats(self, made_from: str) -> Stats:
        """The moments so far.

        Raises:
            DatasetError: no token was added.
        """
        if self.moments.count == 0:
            raise DatasetError("no calibration tokens were read", remedy="pass a longer --dataset")
        count, n = len(self.wanted.layers), self.wanted.kv.values
        if self.wanted.with_metric:
            fisher = self.metric.second_moment()[:, 0] * (self.moments.total / self.moments.count)
        else:
            fisher = torch.eye(n).repeat(count, 1, 1)
        inputs: dict[str, Tensor] = {} if self.queries is None else self.queries.tensors()
        if self.inputs is not None and self.cross is not None:
            inputs |= {
                "input_mean": self.inputs.mean(),
                "input_covariance": self.inputs.covariance()[:, 0],
                "input_cross": self.cross.covariance(),
            }
        return Stats(
            layers=self.wanted.layers,
            kv=self.wanted.kv,
            tokens=self.moments.count,
            mean=self.moments.mean(),
            covariance=self.moments.covariance(),
            fisher=fisher,
            made_from=made_from,
            window=self.window,
            **inputs,
        )


def collect(
    collector: Collector, batches: Iterable[Tensor], *, made_from: str, on_tokens: Callable[[int], None] | None = None
) -> Stats:
    """Feed batches of token ids [B, T] to a collector and return its `Stats`.

    Under `accelerate launch` every process takes its share of the batches and gets the sums of all.

    Args:
        collector: where the moments accumulate.
        batches: token ids.
        made_from: hash of source, data and settings.
        on_tokens: called with the number of tokens after each batch, for progress.
    """
    wanted, processes, portion, tokens = collector.wanted, PartialState(), list[TokenRows](), 0
    device, several = collector.model.device, processes.num_processes > 1
    if wanted.with_metric:
        collector.importance = Importance(len(wanted.layers), wanted.kv.values, processes.device if several else None)
    for number, batch in enumerate(batches):
        if number % processes.num_processes == processes.process_index:
            portion.append(collector.read(batch.to(device), number).to(torch.device("cpu")))
        if (tokens := tokens + batch.numel()) >= PORTION:
            collector.settle(portion)
            portion, tokens = [], 0
        if on_tokens is not None:
            on_tokens(batch.numel())
    if tokens:
        collector.settle(portion)
    if several:
        collector.join(processes.device)
    return collector.stats(made_from)


def near_tokens(window: int, length: int) -> int:
    """How near queries do not count in sequences of a length: W, or less, so that most of what is read is far."""
    return min(window, length // 4)


def alike(found: Tensor, expected: Tensor) -> bool:
    """Whether two computations of the same in one dtype agree."""
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    return bool(error <= (1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.03))


def fewest_logits(model: PreTrainedModel) -> dict[str, int]:
    """What to call a model with to get no more logits than need be."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def batch_generator(seed: int, number: int) -> torch.Generator:
    """Where the sampled labels of one batch come from: the same in whatever order, and by whom, batches are read."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


def token_rows(x: Tensor | None, skip: int) -> Tensor:
    """What a tap holds, [B, T, …], as rows of tokens [N, …], the first positions left out."""
    assert x is not None, "the layer was not called"
    return x.detach()[:, skip:].flatten(0, 1)


def tap_hook(tap: Tap) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        tap.hidden = hidden.detach()

    return hook
