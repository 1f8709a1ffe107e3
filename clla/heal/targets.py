"""Stage 1: each layer group's codec learns to give the attention outputs of the unchanged model.

The model runs once a batch, without gradient, and its queries, keys, values and attention outputs are noted. Every
group is then trained on its own against them; no gradient passes through the model.

Shape legend: B sequences, T tokens, H_q query heads, H key-value heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from clla.heal.attention import View, drawn_view
from clla.heal.steps import component_sizes, relative_steps
from clla.heal.student import Distiller, GroupOnSequence, hidden_states
from clla.modeling.observe_clla import listen
from clla.modeling.rotary_clla import Rotation
from clla.source.recording import RecordingCache


class TargetCache(RecordingCache):
    """Notes what attention read and gave: `kv` by layer, `queries` [B, H_q, T, d], `outputs` [B, T, H_q, d].

    Attributes:
        inputs: attention inputs [B, T, h] of the groups' first layers (`first` source).
        scaling: of the logits, by layer.
    """

    def __init__(self, config: Any, layers: set[int]) -> None:
        super().__init__(config, layers)
        self.queries: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.inputs: dict[int, Tensor] = {}
        self.scaling: dict[int, float] = {}

    def observe(self, layer: int, hidden: Tensor) -> None:
        self.inputs[layer] = hidden

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, plain: Callable[[], Tensor]
    ) -> Tensor:
        output = plain()
        if layer_idx in self.wanted:
            self.queries[layer_idx], self.outputs[layer_idx], self.scaling[layer_idx] = query, output, scaling
        return output


@torch.no_grad()
def record_targets(distiller: Distiller, input_ids: Tensor) -> TargetCache:
    """What the student's model, not yet trained, reads and gives over sequences [B, T] without any latents."""
    cache = TargetCache(distiller.teacher.config, distiller.layers)
    listen(distiller.attention.values(), cache)
    hidden_states(distiller.student.source, input_ids, cache)
    distiller.release()
    return cache


def group_error(
    group: GroupOnSequence, targets: TargetCache, rotation: Rotation | None, view: View, *, first: bool
) -> Tensor:
    """Mean squared error of the group's attention outputs relative to their mean square, averaged over its layers."""
    if first:
        latents = group.encode(targets.inputs[group.layers[0]], rotation)
    else:
        latents = group.encode_kv(targets.kv, rotation)
    errors = []
    for layer in group.layers:
        query, wanted = targets.queries[layer], targets.outputs[layer].float()
        found = group.attend(latents, layer, query, targets.kv[layer], rotation, view, targets.scaling[layer])
        errors.append((found.float() - wanted).square().mean() / wanted.square().mean().clamp_min(1e-12))
    return torch.stack(errors).mean()


def fit_codec(
    distiller: Distiller,
    sequences: Tensor,
    *,
    steps: int,
    batch: int,
    lr: float,
    accelerator: Accelerator,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """Train every group's codec; the mean error of each step.

    Args:
        distiller: with the student as it was made.
        sequences: token ids [N, T], read in order and again from the start.
        steps: batches.
        batch: B.
        lr: highest learning rate, falling to zero along a cosine.
        accelerator: for device and precision.
        seed: of the views.
        on_step: called with the number of tokens after each step.
    """
    optimizer = torch.optim.Adam(distiller.student.codec.parameters(), lr=lr)
    paces = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    sizes = component_sizes(distiller)
    spec, length = distiller.student.config.spec, sequences.shape[1]
    history = []
    for step in range(steps):
        rows = torch.arange(step * batch, (step + 1) * batch) % len(sequences)
        ids = sequences[rows].long().to(accelerator.device)
        view = drawn_view(spec, length, seed=seed, step=step)
        total = 0.0
        with accelerator.autocast():
            targets = distiller.gathered(partial(record_targets, distiller, ids))
            rotation = distiller.rotation(ids)
        for group in distiller.groups:
            with accelerator.autocast():
                compute = partial(group_error, group, targets, rotation, view, first=distiller.first)
                error = distiller.gathered(compute)
            error.backward()
            total += float(error.detach())
        with relative_steps(sizes):
            optimizer.step()
        paces.step()
        optimizer.zero_grad()
        history.append(total / len(distiller.groups))
        on_step(ids.numel())
    return history
