"""Steps of the codec relative to the sizes of its components.

Shape legend: r rank of a group, m its inputs, G layers of a group, n values per layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from clla.heal.sharding import cut_like, whole
from clla.heal.student import Distiller


def component_sizes(distiller: Distiller) -> list[tuple[Tensor, Tensor]]:
    """The codec's encoders [r, m] and decoders [G, n, r], with the root mean square of each component's part.

    Likewise of rotary keys: their encoders [p, m], and what answers them, [G, H, p/2, 2].
    """
    found: list[tuple[Tensor, Tensor]] = []
    for group in distiller.groups:
        parts = [(group.codec.encoder, (1,)), (group.codec.decoder, (0, 1))]
        if group.rope_pairs:
            parts += [(group.codec.rope_encoder, (1,)), (group.codec.rope_query, (0, 1, 3))]
        for tensor, others in parts:
            size = whole(tensor.detach()).square().mean(others, keepdim=True).sqrt()
            found.append((tensor, cut_like(size, tensor)))
    return found


@contextmanager
def relative_steps(sizes: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Within it an optimizer's steps of these tensors are relative to their sizes (as Adafactor's, arXiv 1804.04235).

    Latents have unit variance, so encoder rows and decoder columns of different components differ by orders of
    magnitude; one absolute step would ruin the smallest of them and leave the largest alone.
    """
    before = [tensor.detach().clone() for tensor, _ in sizes]
    yield
    with torch.no_grad():
        for (tensor, size), old in zip(sizes, before, strict=True):
            tensor.copy_(old + (tensor - old) * size.to(tensor.device))
