"""Run text through the source model and collect the moments that the plan rests on.

Keys and values are read where the model hands them to its cache, so that biases, QK-norm, grouped
heads and mixtures of experts need no special case. A zero that requires grad is added there, and its
gradient is that of the loss with respect to the key or value; no weight takes part in the backward pass.

Shape legend: B sequences, T tokens, H key-value heads, d head dim, n = 2·H·d, L convertible layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedModel

from clla.artifacts import KVShape, Stats
from clla.calibrate.fisher import sampled_label_gradient
from clla.calibrate.moments import BandedMoments
from clla.errors import DatasetError
from clla.modeling.hooks_clla import CACHE, attention_modules, rope_of
from clla.modeling.rotary_clla import Rotation
from clla.passing import RecordingCache


@dataclass
class Tap:
    """What one attention layer saw in the current forward pass."""

    hidden: Tensor | None = None
    values: Tensor | None = None  # [B, T, n]
    probe: tuple[Tensor, Tensor] | None = None  # zeros whose gradient is the metric's g

    @property
    def gradient(self) -> Tensor:
        """Of the loss, for keys before RoPE and values, [B, T, n]; zero where nothing was read."""
        assert self.probe is not None
        keys, values = (p.grad if p.grad is not None else torch.zeros_like(p) for p in self.probe)
        return torch.cat((keys, values), dim=1).transpose(1, 2).flatten(2)


class ProbeCache(RecordingCache):
    """Records keys before RoPE and values, and hands both on with a zero added."""

    def __init__(self, config: Any, taps: dict[int, Tap], rotation: Rotation | None) -> None:
        super().__init__(config, set())
        self.taps, self.rotation = taps, rotation

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        tap = self.taps.get(layer_idx)
        if tap is None:
            return key_states, value_states
        keys = key_states.detach()
        if self.rotation is not None:
            keys = self.rotation.unrotate(keys, layer_idx)
        both = torch.cat((keys, value_states.detach()), dim=1)  # [B, 2H, T, d]
        tap.values = both.transpose(1, 2).flatten(2)  # [B, T, n]
        probe_k, probe_v = torch.zeros_like(keys), torch.zeros_like(value_states)
        tap.probe = (probe_k.requires_grad_(), probe_v.requires_grad_())
        if self.rotation is not None:
            probe_k = self.rotation.rotate(probe_k, layer_idx)
        return key_states + probe_k, value_states + probe_v


class Collector:
    """Accumulates `Stats` batch by batch.

    Args:
        model: the source, in evaluation mode; its weights are not changed.
        layers: convertible layer indices.
        kv: what each layer caches.
        band: largest group size K.
        skip_positions: first positions of each sequence left out (attention sinks are outliers).
        rope: from `rope_settings`.
        with_inputs: also collect the attention inputs' moments (for the `first` source).
        seed: of the sampled labels.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        layers: tuple[int, ...],
        kv: KVShape,
        band: int,
        rope: dict[str, Any] | None,
        skip_positions: int = 8,
        with_inputs: bool = False,
        seed: int = 0,
    ) -> None:
        self.model, self.layers, self.kv, self.skip = model, layers, kv, skip_positions
        self.rope, self.with_inputs = rope_of(model, rope), with_inputs
        count, n, hidden = len(layers), kv.values, model.config.get_text_config().hidden_size
        band = min(band, count)
        self.moments = BandedMoments(count, n, band=band)
        self.metric = BandedMoments(count, n, band=1)
        self.inputs = BandedMoments(count, hidden, band=1) if with_inputs else None
        self.cross = BandedMoments(count, hidden, band=band, right_dim=n) if with_inputs else None
        self.seed = seed
        self.attention = attention_modules(model)

    def add(self, input_ids: Tensor, number: int = 0) -> None:
        """Fold in one batch of token ids [B, T]; every position counts, there is no padding.

        Args:
            input_ids: the batch.
            number: of it among all batches; its labels follow from it and the seed alone.
        """
        taps = {layer: Tap() for layer in self.layers}
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        rotation = None if self.rope is None else self.rope(positions)
        handles = [
            self.attention[layer].register_forward_pre_hook(tap_hook(taps[layer]), with_kwargs=True)
            for layer in self.layers
        ]
        frozen = [p for p in self.model.parameters() if p.requires_grad]
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            with torch.enable_grad():
                cache = ProbeCache(self.model.config, taps, rotation)
                logits = self.model(input_ids=input_ids, use_cache=True, **{CACHE: cache}).logits
                logits.backward(sampled_label_gradient(logits, batch_generator(self.seed, number)))
        finally:
            for handle in handles:
                handle.remove()
            for parameter in frozen:
                parameter.requires_grad_(True)
        self._fold([taps[layer] for layer in self.layers])

    @torch.no_grad()
    def _fold(self, taps: list[Tap]) -> None:
        values = torch.stack([self._rows(tap.values) for tap in taps])  # [L, N, n]
        gradients = torch.stack([self._rows(tap.gradient) for tap in taps])
        self.moments.add(values)
        self.metric.add(gradients)
        if self.inputs is not None and self.cross is not None:
            hidden = torch.stack([self._rows(tap.hidden) for tap in taps])  # [L, N, h]
            self.inputs.add(hidden)
            self.cross.add(hidden, values)

    def _rows(self, x: Tensor | None) -> Tensor:
        return token_rows(x, self.skip).to(self.model.device)  # layers may lie on several

    def join(self, device: torch.device) -> None:
        """Add up the moments of all processes; afterwards each has those of all. `device` talks to the others."""
        for moments in (self.moments, self.metric, self.inputs, self.cross):
            if moments is not None:
                moments.join(device)

    def stats(self, made_from: str) -> Stats:
        """The moments so far.

        Raises:
            DatasetError: no token was added.
        """
        if self.moments.count == 0:
            raise DatasetError("no calibration tokens were read", remedy="pass a longer --dataset")
        inputs: dict[str, Tensor] = {}
        if self.inputs is not None and self.cross is not None:
            inputs = {
                "input_mean": self.inputs.mean(),
                "input_covariance": self.inputs.covariance()[:, 0],
                "input_cross": self.cross.covariance(),
            }
        return Stats(
            layers=self.layers,
            kv=self.kv,
            tokens=self.moments.count,
            mean=self.moments.mean(),
            covariance=self.moments.covariance(),
            fisher=self.metric.second_moment()[:, 0],
            made_from=made_from,
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
    device, processes = collector.model.device, PartialState()
    for number, batch in enumerate(batches):
        if number % processes.num_processes == processes.process_index:
            collector.add(batch.to(device), number)
        if on_tokens is not None:
            on_tokens(batch.numel())
    if processes.num_processes > 1:
        collector.join(processes.device)
    return collector.stats(made_from)


def batch_generator(seed: int, number: int) -> torch.Generator:
    """Where the sampled labels of one batch come from: the same in whatever order, and by whom, batches are read."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


def token_rows(x: Tensor | None, skip: int) -> Tensor:
    """What a tap holds, [B, T, …], as rows of tokens [N, …] in fp32, the first positions left out."""
    assert x is not None, "the layer did not call its cache"
    return x.detach()[:, skip:].flatten(0, 1).float()


def tap_hook(tap: Tap) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        tap.hidden = hidden.detach()

    return hook
