"""Run decoder layers again in the backward pass where the activations of all of them would not fit in memory.

It costs one more forward pass, so it is done only then. What a layer leaves for the backward pass is measured on the
second one, whose keys and values are the first that hang in a graph as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from clla.errors import UnsupportedModelError
from clla.source.placement import decoder_layers

ROOM = 0.6  # of the free memory, that activations may take; logits and their gradient need some, too


class Recomputation:
    """Decides for every forward pass with a graph whether layers are run again.

    Args:
        model: the source.
        wanted: `auto`, `always` or `never`.

    Attributes:
        used: whether the last pass ran layers again.
    """

    def __init__(self, model: PreTrainedModel, wanted: str = "auto") -> None:
        self.wanted, self.used = wanted, wanted == "always"
        self._device = model.device
        self._per_token: float | None = None  # bytes that a layer leaves
        try:
            self._layers: list[nn.Module] = list(decoder_layers(model)[1])
        except UnsupportedModelError:  # no plain list of layers: their activations have to fit
            self._layers = []

    @contextmanager
    def active(self, tokens: int) -> Iterator[None]:
        """Layers of the forward pass inside run again when their gradients are wanted, if need be.

        Args:
            tokens: of the batch.
        """
        if self.wanted == "auto" and self._per_token is not None:
            self._decide(tokens)
        run = [partial(self._run, number, layer.forward, tokens) for number, layer in enumerate(self._layers)]
        with replaced(self._layers, run):
            yield

    def _run(self, number: int, forward: Callable[..., Any], tokens: int, *args: Any, **kwargs: Any) -> Any:
        if self.wanted == "auto" and self._per_token is None and number == min(1, len(self._layers) - 1):
            with _counted_activations() as found:
                out = forward(*args, **kwargs)
            self._per_token = sum(found.values()) / tokens
            self._decide(tokens)
            return out
        if self.used:
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return forward(*args, **kwargs)

    def _decide(self, tokens: int) -> None:
        assert self._per_token is not None
        self.used = self._per_token * tokens * len(self._layers) > ROOM * free_memory(self._device)


def free_memory(device: torch.device) -> int:
    """Bytes that a device has left."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


@contextmanager
def replaced(layers: Iterable[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Call something else than the layers' own forward functions (an instance attribute hides that of the class)."""
    own = [vars(layer).get("forward") for layer in layers]
    try:
        for layer, forward in zip(layers, forwards, strict=True):
            layer.forward = forward
        yield
    finally:
        for layer, function in zip(layers, own, strict=True):
            if function is None:
                del layer.forward
            else:
                layer.forward = function


@contextmanager
def _counted_activations() -> Iterator[dict[int, int]]:
    """Bytes that the graph made inside keeps, by storage; weights not counted."""
    found: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield found
