"""What the compressed cache costs each layer by itself: errors of its keys, values and attention output.

The model runs on exact keys and values, which are also what the compressed cache gets, chunk by chunk as at inference.
What that cache then returns is compared with them, and so is the attention of the same queries over it: errors of
earlier layers do not reach a layer through its input.

Shape legend: N samples, T tokens per sample, B sequences, H key-value heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from clla.modeling.cache_clla import CllaCache
from clla.modeling.hooks_clla import CACHE, rope_of
from clla.modeling.modeling_clla import CllaForCausalLM
from clla.modeling.observe_clla import Attention


@dataclass(frozen=True)
class LayerError:
    """Relative errors ‖x - x̂‖ / ‖x‖ of one layer over all tokens measured.

    Attributes:
        layer: its index in the model.
        key: of the keys that were coded.
        value: of the values that were coded.
        output: of the attention output of tokens that look at some that were coded; None where the model's attention
            cannot be observed, or does not read the cache's keys as they are.
    """

    layer: int
    key: float
    value: float
    output: float | None


@dataclass
class _Sums:
    """Squared norms of errors and of what they are errors of, by kind."""

    error: dict[str, float] = field(default_factory=dict)
    norm: dict[str, float] = field(default_factory=dict)

    def add(self, kind: str, found: Tensor, wanted: Tensor) -> None:
        error, norm = (x.float().square().sum(dtype=torch.float64) for x in (found.float() - wanted.float(), wanted))
        self.error[kind] = self.error.get(kind, 0.0) + float(error)
        self.norm[kind] = self.norm.get(kind, 0.0) + float(norm)

    def relative(self, kind: str) -> float | None:
        norm = self.norm.get(kind, 0.0)
        return (self.error[kind] / norm) ** 0.5 if norm > 0 else None


class ProbeCache(CllaCache):
    """A compressed cache that gives the model exact keys and values, and measures its own beside them.

    Args:
        model: whose cache it is.
        sums: by layer, to add to.
    """

    def __init__(self, model: CllaForCausalLM, sums: dict[int, _Sums]) -> None:
        super().__init__(model.config, model.codec, rope_of(model.source, model.config.spec.rope))
        self.sums, self.exact = sums, DynamicCache()
        self._compared: dict[int, int] = {}  # slots of each layer that were
        self._given: dict[int, tuple[Tensor, ...]] = {}  # exact keys and values, and the cache's own

    def begin(self, position_ids: Tensor, attention_mask: Tensor | None) -> None:
        super().begin(position_ids, attention_mask)
        self._rows = self.groups[0].encoded  # what leaves the window now is read from its latents only later

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        coded: Any = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        group = self.group_of_layer.get(layer_idx)
        if group is None:
            return coded
        exact: Any = self.exact.update(key_states, value_states, layer_idx)
        stop = coded[0].shape[2] if group.windowless else self._rows
        start = max(self._compared.get(layer_idx, 0), group.sinks)
        if stop > start:
            for kind, found, wanted in zip(("key", "value"), coded, exact, strict=True):
                self.sums[layer_idx].add(kind, found[:, :, start:stop], wanted[:, :, start:stop])
            self._compared[layer_idx] = stop
        if stop > group.sinks:
            self._given[layer_idx] = (*exact, *coded)
        return exact

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, plain: Callable[[], Tensor]
    ) -> Tensor:
        output, given = plain(), self._given.pop(layer_idx, None)
        if given is not None and isinstance(plain, Attention) and key is given[0] and value is given[1]:
            self.sums[layer_idx].add("output", plain.over(given[2], given[3]), output)
        return output


@torch.no_grad()
def layer_errors(
    model: CllaForCausalLM,
    samples: Tensor,
    *,
    chunk: int,
    on_sample: Callable[[int], None] = lambda _: None,
) -> tuple[LayerError, ...]:
    """Measure the layers that share latents, in their order; none where no token of a sample leaves the exact ones.

    Args:
        model: the converted model, which runs on its own weights.
        samples: [N, T] token ids.
        chunk: tokens per forward pass.
        on_sample: called with 1 after each sample.
    """
    sums = {layer: _Sums() for group in model.config.spec.groups for layer in group.layers}
    for row in samples.to(model.device):
        cache = ProbeCache(model, sums)
        for ids in row[None].split(chunk, dim=1):
            model(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE: cache})
        on_sample(1)
    found = []
    for layer, own in sorted(sums.items()):
        key, value = own.relative("key"), own.relative("value")
        if key is not None and value is not None:
            found.append(LayerError(layer, key, value, own.relative("output")))
    return tuple(found)
