"""Collect the moments layer by layer: for models larger than memory, and for wide ones.

Forward, each layer in turn runs on all batches, whose hidden states are kept at every layer boundary; backward, each
layer runs once more on what it got, now with a graph of its own, which passes the gradient on to the layer below. So
every layer's weights are read twice in all, and no more than one layer with the activations of one batch is ever in
use. What a layer is called with beside the hidden states (masks, rotations) is taken from the model's own forward pass,
in which its layers are replaced for the moment. Moments of neighbouring layers are formed on the way back, from the
keys and values of the last K layers.

Shape legend: B sequences, T tokens, n = 2·H·d, q coordinates, h hidden size, L convertible layers, K band.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from clla.artifacts.stats import Stats
from clla.calibrate.basis import leading_directions
from clla.calibrate.collect import (
    Collection,
    ProbeCache,
    Tap,
    alike,
    batch_generator,
    fewest_logits,
    near_tokens,
    tap_hook,
    token_rows,
)
from clla.calibrate.far import far_attention
from clla.calibrate.fisher import sampled_label_gradient
from clla.calibrate.importance import Importance, portions
from clla.calibrate.moments import folded_product
from clla.calibrate.queries import QueryPower
from clla.calibrate.recomputation import replaced
from clla.errors import DatasetError, UnsupportedModelError
from clla.modeling.hooks_clla import CACHE, attention_modules, rope_of
from clla.modeling.observe_clla import listening
from clla.source.placement import decoder_layers
from clla.source.recording import RecordingCache
from clla.storage.places import writing


class Spill:
    """Tensors by key: in memory, or as mapped files of a folder, which the system may write out and drop."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.held: dict[str, Tensor] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def put(self, key: str, value: Tensor) -> None:
        if self.folder is None:
            self.held[key] = value.detach().cpu()
            return
        if key not in self.held or self.held[key].shape != value.shape or self.held[key].dtype != value.dtype:
            self.drop(key)
            with writing(self.folder / key, needed=value.nbytes):
                _allocate(self.folder / key, value.nbytes)
            flat = torch.from_file(str(self.folder / key), shared=True, size=value.numel(), dtype=value.dtype)
            self.held[key] = flat.view(value.shape)
        self.held[key].copy_(value.detach())

    def get(self, key: str) -> Tensor:
        return self.held[key]

    def drop(self, key: str) -> None:
        if self.held.pop(key, None) is not None and self.folder is not None:
            (self.folder / key).unlink()

    def clear(self) -> None:
        for key in list(self.held):
            self.drop(key)


def _allocate(path: Path, size: int) -> None:
    """Room on the disk for a file: a mapped one that lacks it ends the process with a signal.

    Raises:
        OSError: there is none.
    """
    with path.open("wb") as stream:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, size)


class LayerStack:
    """A model's decoder layers, to be run one at a time as the model would."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        _, self.layers = decoder_layers(model)
        self._outputs: int | None = None  # how long the tuples are that layers return; 0 where they return no tuple
        self._calls: dict[tuple[int, ...], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    def __len__(self) -> int:
        return len(self.layers)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Hidden states [B, T, h] that the first layer gets; notes what else the layers are called with."""
        first: list[Tensor] = []
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(hidden: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            first.append(hidden)
            calls.append((rest, kwargs))
            return hidden

        with torch.no_grad():
            if self._outputs is None:
                self._outputs = self._count_outputs(input_ids)
            self._through(input_ids, note)
        known = self._calls.setdefault(tuple(input_ids.shape), calls)
        if known is not calls and not all(_same(a, b) for a, b in zip(known, calls, strict=True)):
            raise UnsupportedModelError(
                f"layers of {type(self.model).__name__} get something of the tokens beside their hidden states",
                expected="layers that can be run one after another",
                remedy="use a machine that holds the model in memory",
            )
        return first[0]

    def run(self, number: int, hidden: Tensor, input_shape: tuple[int, ...], cache: Cache) -> Tensor:
        """One layer's output [B, T, h]."""
        rest, kwargs = self._calls[input_shape][number]
        rest = tuple(cache if isinstance(value, Cache) else value for value in rest)
        kwargs = {name: cache if isinstance(value, Cache) else value for name, value in kwargs.items()}
        out = self.layers[number](hidden, *rest, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def logits(self, input_ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits [B, T, V] of the last layer's output."""
        return self._through(input_ids, lambda *_: hidden, with_logits=True).logits

    def _count_outputs(self, input_ids: Tensor) -> int:
        """Run the first layer to see what layers return."""
        caught: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

        def stop(hidden: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            caught.append((hidden, rest, kwargs))
            raise _Caught

        with suppress(_Caught):
            self._through(input_ids[:1, :2], stop)
        hidden, rest, kwargs = caught[0]
        out = self.layers[0](hidden, *rest, **kwargs)
        return len(out) if isinstance(out, tuple) else 0

    def _through(
        self,
        input_ids: Tensor,
        instead: Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Tensor],
        *,
        with_logits: bool = False,
    ) -> Any:
        """The model's forward pass with something else in its layers' places."""

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
            rest = args if args and hidden is not args[0] else args[1:]
            out = instead(hidden, rest, kwargs)
            return (out, *[None] * (self._outputs - 1)) if self._outputs else out

        with replaced(self.layers, [stand_in] * len(self.layers)):
            options: dict[str, Any] = {CACHE: RecordingCache(self.model.config, set())}
            if not with_logits:
                options |= fewest_logits(self.model)
            return self.model(input_ids=input_ids, use_cache=True, **options)


class _Caught(Exception):
    """What the first layer is called with is known."""


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return True


class StreamedCollector:
    """Makes `Stats` as `Collector` does, from the same batches and labels, layer by layer.

    Args:
        model: the source, in evaluation mode; its layers may lie on disk (`accelerate`).
        wanted: what is collected.
        basis: q, most coordinates in which the moments of one layer are kept.
        folder: where hidden states are spilled to; None keeps them in memory.
    """

    def __init__(
        self, model: PreTrainedModel, wanted: Collection, *, basis: int | None = None, folder: Path | None = None
    ) -> None:
        self.model, self.wanted, self.band = model, wanted, min(wanted.band, len(wanted.layers))
        self.basis = basis if basis is not None and basis < wanted.kv.values else None
        self.rope = rope_of(model, wanted.rope)
        self.queries = QueryPower(model, wanted.layers, wanted.rope) if wanted.with_queries else None
        self.stack, self.spill = LayerStack(model), Spill(folder)
        self.attention = attention_modules(model)
        self.device, self.window = model.device, wanted.window if wanted.with_metric else 0

    def collect(
        self, batches: Sequence[Tensor], *, made_from: str, on_tokens: Callable[[int], None] = lambda _: None
    ) -> Stats:
        """Moments of batches of token ids [B, T].

        Args:
            batches: token ids.
            made_from: hash of source, data and settings.
            on_tokens: called with tokens that a layer has read, for progress: each batch counts once for every layer
                forward and once backward.

        Raises:
            DatasetError: there is no batch.
            UnsupportedModelError: the model's layers cannot be run one after another.
        """
        if not batches:
            raise DatasetError("no calibration tokens were read", remedy="pass a longer --dataset")
        try:
            self._forward(batches, on_tokens)
            if self.wanted.with_metric:
                self._top(batches)
            return self._backward(batches, made_from, on_tokens)
        finally:
            self.spill.clear()

    def _forward(self, batches: Sequence[Tensor], on_tokens: Callable[[int], None]) -> None:
        """Leave the hidden states that each layer gets in `hidden-<layer>-<batch>`."""
        for b, ids in enumerate(batches):
            self.spill.put(f"hidden-0-{b}", self.stack.embed(ids.to(self.device)))
        for number in range(len(self.stack)):
            for b, ids in enumerate(batches):
                with torch.no_grad():
                    hidden = self.spill.get(f"hidden-{number}-{b}").to(self.device)
                    cache = RecordingCache(self.model.config, set())
                    out = self.stack.run(number, hidden, tuple(ids.shape), cache)
                if b == 0 and self.window and number in self.wanted.layers:
                    self.window *= self._sees_far(number, ids, hidden, out)
                self.spill.put(f"hidden-{number + 1}-{b}", out)
                on_tokens(ids.numel())

    def _top(self, batches: Sequence[Tensor]) -> None:
        """Leave the gradient of the last layer's output in `gradient-<batch>`."""
        top = len(self.stack)
        for b, ids in enumerate(batches):
            hidden = self.spill.get(f"hidden-{top}-{b}").to(self.device).detach().requires_grad_()
            with torch.enable_grad():
                logits = self.stack.logits(ids.to(self.device), hidden)
            logits.backward(sampled_label_gradient(logits, batch_generator(self.wanted.seed, b)))
            assert hidden.grad is not None
            self.spill.put(f"gradient-{b}", hidden.grad)
            self.spill.drop(f"hidden-{top}-{b}")

    def _backward(self, batches: Sequence[Tensor], made_from: str, on_tokens: Callable[[int], None]) -> Stats:
        """All layers from the last to the first, then moments, since all layers have a say in the tokens' weights."""
        layers, skip = self.wanted.layers, self.wanted.skip_positions
        weights: list[Tensor] = []
        for number in reversed(range(len(self.stack))):
            own = layers.index(number) if number in layers else None
            for b, ids in enumerate(batches):
                tap = self._step_back(number, b, ids)
                on_tokens(ids.numel())
                if own is None:
                    continue
                if self.wanted.with_metric:
                    self.spill.put(f"gradients-{own}-{b}", token_rows(tap.gradient, skip))
                self.spill.put(f"values-{own}-{b}", token_rows(tap.values, skip).float())
                if self.queries is not None:
                    self.queries.add(own, tap.query, skip)
                if self.wanted.with_inputs:
                    self.spill.put(f"inputs-{own}-{b}", token_rows(tap.hidden, skip).float())
            if own is not None:
                shares = self._shares(own, batches)
                weights = [a + b for a, b in zip(weights, shares, strict=True)] if weights else shares
        weights = [Importance.settled(total / len(layers)) for total in weights]
        mean = float(torch.cat(weights).mean(dtype=torch.float64))
        roots = [(w / mean).sqrt()[:, None] for w in weights]  # of weights of mean 1
        found = self._empty()
        for own in reversed(range(len(layers))):
            self._finish(found, own, roots)
        found |= {} if self.queries is None else self.queries.tensors()
        tokens = sum(len(root) for root in roots)
        return Stats(layers=layers, kv=self.wanted.kv, tokens=tokens, made_from=made_from, window=self.window, **found)

    def _shares(self, own: int, batches: Sequence[Tensor]) -> list[Tensor]:
        """What a layer adds to the weights of the tokens, [N] for each batch."""
        if not self.wanted.with_metric:
            return [torch.ones(len(self._held("values", own, b)), device=self.device) for b in range(len(batches))]
        importance, shares = Importance(1, self.wanted.kv.values), list[Tensor]()
        for portion in portions(batches):
            rows = [self._held("gradients", own, b) for b in portion]
            importance.learn([rows], self.device)
            shares += [importance.share(0, own_rows) for own_rows in rows]
        return shares

    def _step_back(self, number: int, b: int, ids: Tensor) -> Tap:
        """Run one layer on one batch once more, for the metric with a graph, to pass the gradient through it."""
        hidden, with_metric = self.spill.get(f"hidden-{number}-{b}").to(self.device).detach(), self.wanted.with_metric
        hidden.requires_grad_(with_metric)
        with self._tapped(number, ids, far=self.window > 0) as (tap, cache), ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(with_metric))
            if self.queries is not None:
                stack.enter_context(listening(cache))
            if self.window:
                window = near_tokens(self.window, ids.shape[1])
                stack.enter_context(far_attention(self.model, window, cache.reader))
            out = self.stack.run(number, hidden, tuple(ids.shape), cache)
            if with_metric:
                out.backward(self.spill.get(f"gradient-{b}").to(out.device))
                assert hidden.grad is not None
                self.spill.put(f"gradient-{b}", hidden.grad)
        self.spill.drop(f"hidden-{number}-{b}")
        return tap

    @contextmanager
    def _tapped(self, number: int, ids: Tensor, *, far: bool) -> Iterator[tuple[Tap, ProbeCache]]:
        """A tap for one layer, and a cache that has it if the layer is convertible."""
        rotation = None if self.rope is None else self.rope(torch.arange(ids.shape[1], device=self.device)[None])
        tap, taps, handles = Tap(number, rotation, far=far), {}, []
        if number in self.wanted.layers:
            taps[number] = tap
            handles.append(self.attention[number].register_forward_pre_hook(tap_hook(tap), with_kwargs=True))
        try:
            yield tap, ProbeCache(self.model.config, taps)
        finally:
            for handle in handles:
                handle.remove()

    def _sees_far(self, number: int, ids: Tensor, hidden: Tensor, expected: Tensor) -> bool:
        """Whether a layer computes the same through our attention, which sees what it caches."""
        seen: list[bool] = []
        with self._tapped(number, ids, far=True) as (tap, cache), torch.no_grad():
            try:
                with far_attention(self.model, 1, lambda key, _: seen.append(tap.read(key))):
                    found = self.stack.run(number, hidden, tuple(ids.shape), cache)
            except ValueError:  # transformers lets nobody else compute this model's attention
                return False
        return any(seen) and alike(found, expected)

    def _finish(self, found: dict[str, Tensor], own: int, roots: list[Tensor]) -> None:
        """Moments of a layer, with itself and the layers above, from weights whose roots [N, 1] are given."""
        batches, count = len(roots), sum(len(root) for root in roots)
        if self.wanted.with_metric:
            gradients = (self._held("gradients", own, b) / root for b, root in enumerate(roots))
            fisher = folded_product((rows, rows) for rows in gradients) / count
        else:
            fisher = torch.eye(self.wanted.kv.values, dtype=torch.float64)
        found["mean"][own] = self._centre("values", own, roots, count).cpu()
        if self.basis is not None:
            covariance = self._product(("values", own), ("values", own), batches) / count
            basis = leading_directions(covariance.float(), fisher.float(), self.basis, seed=self.wanted.seed)
            found["reading"][own], found["writing"][own] = basis.reading.cpu(), basis.writing.cpu()
            found["dropped"][own] = basis.dropped
            fisher = basis.writing.mT.double() @ fisher @ basis.writing.double()
            for b in range(batches):
                self.spill.put(f"values-{own}-{b}", self._held("values", own, b) @ basis.reading.mT)
        found["fisher"][own] = fisher.cpu()
        reach = range(min(self.band, len(self.wanted.layers) - own))
        for j in reach:
            found["covariance"][own, j] = (self._product(("values", own), ("values", own + j), batches) / count).cpu()
        if self.wanted.with_inputs:
            found["input_mean"][own] = self._centre("inputs", own, roots, count).cpu()
            found["input_covariance"][own] = (self._product(("inputs", own), ("inputs", own), batches) / count).cpu()
            for j in reach:
                found["input_cross"][own, j] = (
                    self._product(("inputs", own), ("values", own + j), batches) / count
                ).cpu()
        for b in range(batches):
            self.spill.drop(f"gradients-{own}-{b}")
            self.spill.drop(f"inputs-{own}-{b}")
            self.spill.drop(f"values-{own + self.band - 1}-{b}")

    def _centre(self, kind: str, layer: int, roots: list[Tensor], count: int) -> Tensor:
        """Weighted mean of a layer's rows, in fp64; they are left as √w·(row - mean)."""
        rows = [(self._held(kind, layer, b), root) for b, root in enumerate(roots)]
        mean = torch.stack([(own * root.square()).sum(0, dtype=torch.float64) for own, root in rows]).sum(0) / count
        for b, (own, root) in enumerate(rows):
            self.spill.put(f"{kind}-{layer}-{b}", (own - mean.float()) * root)
        return mean

    def _product(self, left: tuple[str, int], right: tuple[str, int], batches: int) -> Tensor:
        """Sum over tokens of the outer products of two layers' rows, each by kind and layer, in fp64."""
        pairs = ((self._held(*left, b), self._held(*right, b)) for b in range(batches))
        return folded_product(pairs)

    def _held(self, kind: str, layer: int, b: int) -> Tensor:
        return self.spill.get(f"{kind}-{layer}-{b}").to(self.device)

    def _empty(self) -> dict[str, Tensor]:
        """Where the moments go, on the CPU in fp32."""
        layers, n, band = len(self.wanted.layers), self.wanted.kv.values, self.band
        q, text_config = self.basis or n, self.model.config.get_text_config()
        shapes: dict[str, tuple[int, ...]] = {
            "mean": (layers, n),
            "covariance": (layers, band, q, q),
            "fisher": (layers, q, q),
        }
        if self.basis is not None:
            shapes |= {"reading": (layers, q, n), "writing": (layers, n, q), "dropped": (layers,)}
        if self.wanted.with_inputs:
            h = text_config.hidden_size
            shapes |= {
                "input_mean": (layers, h),
                "input_covariance": (layers, h, h),
                "input_cross": (layers, band, h, q),
            }
        return {name: torch.zeros(shape) for name, shape in shapes.items()}
