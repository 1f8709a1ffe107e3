"""How strong queries are in each rotary pair: what a key loses there counts by it (`decoupled` key).

Shape legend: B sequences, T tokens, H_q query heads, d head dim, L convertible layers, F rotary pairs of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from clla.errors import UnsupportedModelError
from clla.modeling.hooks_clla import rope_of
from clla.modeling.observe_clla import is_observed, observed
from clla.modeling.rotary_clla import Turns


class QueryPower:
    """Accumulates E|q|² of every rotary pair, layer and query head.

    Args:
        model: the source; its attention is observed from now on, which changes nothing else.
        layers: convertible layer indices.
        rope: from `rope_settings`.

    Raises:
        UnsupportedModelError: keys are not rotated, or attention cannot be observed.
    """

    def __init__(self, model: PreTrainedModel, layers: tuple[int, ...], rope: dict[str, Any] | None) -> None:
        if rope is None:
            raise UnsupportedModelError(
                f"the keys of this {model.config.model_type!r} model are not rotated",
                expected="rotary positions, of which a decoupled key keeps some",
                remedy="convert it with plan.key 'reconstruct'",
            )
        own = model.config._attn_implementation
        if not is_observed(own):
            if own not in AttentionInterface():
                raise unobserved(model)
            model.set_attn_implementation(observed(own))
        self.model, self.layers = model, layers
        self.steps, self.channels = rotary_pairs(model, rope)
        self.plain_layers = frozenset(rope["plain_layers"])
        self._sums: list[Tensor | None] = [None] * len(layers)
        self._count = 0

    @torch.no_grad()
    def add(self, number: int, query: Tensor | None, skip: int) -> None:
        """Fold in the queries [B, H_q, T, d] after RoPE of one layer, but for the first `skip` positions.

        Args:
            number: of the layer among the convertible ones.
            query: None if its attention was not seen.
            skip: positions left out.
        """
        if query is None:
            raise unobserved(self.model)
        rows = query[:, :, skip:].float()
        found = rows[..., self.channels.to(rows.device)].square().sum((0, 2, 4))
        before = self._sums[number]
        self._sums[number] = found.double().cpu() if before is None else before + found.double().cpu()
        if number == 0:
            self._count += rows.shape[0] * rows.shape[2]

    def join(self, device: torch.device) -> None:
        """Add up the sums of all processes; `device` talks to the others."""
        heads = self.model.config.get_text_config().num_attention_heads
        like = torch.zeros(heads, len(self.steps), dtype=torch.float64)  # of a process that saw nothing
        for number, total in enumerate(self._sums):
            own = torch.zeros_like(like) if total is None else total
            self._sums[number] = reduce(own.to(device), reduction="sum").cpu()
        self._count = int(reduce(torch.tensor(self._count).to(device), reduction="sum"))

    def tensors(self) -> dict[str, Tensor]:
        """The fields of `Stats` that speak of queries and rotations."""
        frequencies = self.steps.expand(len(self.layers), -1).clone()
        for number, layer in enumerate(self.layers):
            if layer in self.plain_layers:
                frequencies[number] = 0
        sums = [total for total in self._sums if total is not None]
        assert len(sums) == len(self.layers), "every layer was seen"
        return {
            "query_power": (torch.stack(sums) / self._count).float(),
            "frequencies": frequencies,
            "rotary_channels": self.channels,
        }


def rotary_pairs(model: PreTrainedModel, rope: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What one token further turns keys by.

    Args:
        model: the source.
        rope: from `rope_settings`.

    Returns:
        Angles [F] of the rotary pairs in radians, fp64, and the two channels of each pair, [F, 2] int64.
    """
    rotations = rope_of(model, rope, dtype=torch.float32)
    assert rotations is not None
    rotation = rotations(torch.tensor([[1]], device=model.device))
    factors = Turns.of(rotation).factors[0, 0].cpu().to(torch.complex128)
    count = torch.arange(len(factors))
    if rotation.interleaved:
        channels = torch.stack((2 * count, 2 * count + 1), dim=1)
    else:
        channels = torch.stack((count, count + len(factors)), dim=1)
    return factors.angle(), channels


def unobserved(model: PreTrainedModel) -> UnsupportedModelError:
    """What a model is refused with whose attention does not show its queries."""
    return UnsupportedModelError(
        f"{type(model).__name__} computes its attention where its queries cannot be seen",
        expected="a model whose attention goes through transformers' AttentionInterface, loaded with 'sdpa'",
        remedy="convert it with plan.key 'reconstruct'",
    )
