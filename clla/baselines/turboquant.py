"""TurboQuant: keys rotated at random and quantized coordinate by coordinate, in the forms that vLLM serves.

https://arxiv.org/abs/2504.19874

After a random rotation the coordinates of a unit vector are nearly Gaussian whatever the model, so one table of levels
(Lloyd-Max, that of least squared error) serves all of them without calibration. Kept are the codes and the key's norm,
so corrected that what is decoded has the norm of the key. Values are min-max quantized per token and head.

Forms by the names of vLLM's `--kv-cache-dtype turboquant_…`: `k8v4` (keys in fp8), `4bit_nc`, `k3v4_nc`, `3bit_nc`. As
there, the first and last two layers stay exact by default. Against vLLM: a norm takes 2 bytes instead of the 4 that its
slots have, and the past is decoded for each forward pass.

Shape legend: B sequences, H key-value heads, T tokens, d head dim, b bits.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from clla.baselines.settings import check_at_least, check_one_of
from clla.errors import UsageError
from clla.evaluate.measured_cache import MeasuredCache
from clla.evaluate.source_cache import EncodedLayer, Fp8Tensor, MinMax, StoredLayer
from clla.modeling.quantize_clla import pack_bits, unpack_bits
from clla.source.families import kv_shape, split_layers

FORMS = {"k8v4": (8, 4), "4bit_nc": (4, 4), "k3v4_nc": (3, 4), "3bit_nc": (3, 3)}  # bits of keys and values
EXACT_LAYERS = 2  # at both ends


@cache
def lloyd_max(bits: int) -> tuple[float, ...]:
    """The 2^b levels that leave a unit Gaussian the least squared error (Lloyd 1982; Max 1960), ascending."""

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def below(x: float) -> float:
        return (1 + math.erf(x / math.sqrt(2))) / 2

    count = 1 << bits
    levels = [4.0 * (i + 0.5) / count - 2.0 for i in range(count)]
    for _ in range(4000):
        ends = [-math.inf, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
        levels = [(density(a) - density(b)) / (below(b) - below(a)) for a, b in pairwise(ends)]
    return tuple(levels)


def random_rotation(size: int, seed: int = 0) -> Tensor:
    """A rotation [d, d]: a Hadamard matrix with random signs, or a random one where d is no power of two."""
    generator = torch.Generator().manual_seed(seed)
    if size & (size - 1):
        drawn = torch.randn(size, size, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(drawn).Q.float()
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    signs = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1.0
    return matrix * signs / math.sqrt(size)


class Rotated:
    """Keys: b bits per coordinate after a rotation, and a corrected norm in fp16.

    Args:
        bits: b.
        rotation: [d, d].
    """

    nbytes = 0  # the rotation is made from a seed

    def __init__(self, bits: int, rotation: Tensor) -> None:
        self.bits, self.rotation = bits, rotation
        self.levels = torch.tensor(lloyd_max(bits))

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Codes [B, H, T, d·b/8] and norms [B, H, T, 1] of [B, H, T, d]."""
        x, levels = x.float(), self.levels.to(x.device)
        norm = x.norm(dim=-1, keepdim=True)
        size = x.shape[-1]
        turned = (x / norm.clamp_min(torch.finfo(torch.float32).tiny)) @ self.rotation.to(x.device).mT * math.sqrt(size)
        codes = torch.bucketize(turned.contiguous(), (levels[1:] + levels[:-1]) / 2)
        kept = norm / (levels[codes].norm(dim=-1, keepdim=True) / math.sqrt(size))
        return pack_bits(codes, self.bits), kept.half()

    def decode(self, *parts: Tensor) -> Tensor:
        """Inverse of `encode`, fp32."""
        codes, norm = parts
        turned = self.levels.to(codes.device)[unpack_bits(codes, self.bits)]
        return turned @ self.rotation.to(codes.device) * (norm.float() / math.sqrt(len(self.rotation)))


class TurboQuantCache(MeasuredCache):
    """A model's cache in one of TurboQuant's forms.

    Args:
        config: the model's config.
        form: one of `FORMS`.
        exact_layers: at both ends of the model that stay as they are.

    Raises:
        UsageError: another form, or a head dim whose codes do not fill whole bytes.
    """

    def __init__(self, config: Any, *, form: str, exact_layers: int = EXACT_LAYERS) -> None:
        check_one_of(tuple(FORMS), form=form)
        check_at_least(0, exact_layers=exact_layers)
        size, (full, _), dtype = kv_shape(config).head_dim, split_layers(config), config.dtype or torch.bfloat16
        if size % 8:
            raise UsageError(
                f"head_dim is {size}", expected="a multiple of 8", remedy="TurboQuant is not for this model"
            )
        for_keys, for_values = FORMS[form]
        rotation = random_rotation(size)
        ends = set(full[:exact_layers]) | set(full[len(full) - exact_layers :])
        super().__init__(
            config,
            {
                i: StoredLayer(dtype)
                if i in ends
                else EncodedLayer(Fp8Tensor() if for_keys == 8 else Rotated(for_keys, rotation), MinMax(for_values))
                for i in full
            },
        )
