"""Apply and undo rotary position embedding (RoPE, arXiv 2104.09864) on cached keys.

Shape legend: B batch, H key-value heads, T tokens, d head dim, p rotary dim (p <= d).
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Callable, NamedTuple, Optional

import torch
from torch import Tensor, nn


class RopeForm(NamedTuple):
    """How a family lays out rotary pairs, and what its rotary embedding returns for them.

    Attributes:
        full: cosines or sines [..., p] as `rotate` takes them, from what the model's rotary embedding returns.
        interleaved: pairs are neighbouring channels, not the two halves.
    """

    full: "Callable[[Tensor], Tensor]"
    interleaved: bool


ROPE_FORMS: "dict[str, RopeForm]" = {
    "halves": RopeForm(lambda x: x, False),  # Llama and most others
    "halves_once": RopeForm(lambda x: torch.cat((x, x), dim=-1), False),  # each angle once: gpt-oss
    "pairs": RopeForm(lambda x: x, True),  # Cohere
    "pairs_of_halves": RopeForm(lambda x: x.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1), True),  # GLM, Helium
}


class Rope:
    """Rotations of a model's keys.

    Args:
        angles: cosines and sines of positions [B, T], as the model's rotary embedding makes them.
        form: a key of `ROPE_FORMS`.
        plain_layers: indices of the layers whose keys are not rotated.
    """

    def __init__(
        self, angles: "Callable[[Tensor], tuple[Tensor, Tensor]]", form: str, plain_layers: "tuple[int, ...]" = ()
    ) -> None:
        self.angles, self.form, self.plain_layers = angles, form, frozenset(plain_layers)

    def __call__(self, positions: Tensor) -> "Rotation":
        """The rotation to positions [B, T]."""
        cos, sin = self.angles(positions)
        full, interleaved = ROPE_FORMS[self.form]
        return Rotation(full(cos), full(sin), interleaved, self.plain_layers)


class Rotation(NamedTuple):
    """Attributes: cos and sin [B or 1, T, p]; interleaved: see `RopeForm`; plain_layers: see `Rope`."""

    cos: Tensor
    sin: Tensor
    interleaved: bool = False
    plain_layers: "frozenset[int]" = frozenset()

    def part(self, start: int, stop: int) -> "Rotation":
        """Of the tokens [start, stop) alone."""
        return self._replace(cos=self.cos[:, start:stop], sin=self.sin[:, start:stop])

    def pairs(self, index: "tuple[int, ...]") -> "tuple[Tensor, Tensor]":
        """Cosines and sines [B or 1, T, P] of some of the rotary pairs of a head."""
        places = _places(index, 2 if self.interleaved else 1, 0, self.cos.device)
        return self.cos.index_select(-1, places), self.sin.index_select(-1, places)

    def channels(self, x: Tensor, index: "tuple[int, ...]") -> "tuple[Tensor, Tensor]":
        """Both channels [..., P] of some of the rotary pairs of heads [..., d]."""
        step, other = (2, 1) if self.interleaved else (1, self.cos.shape[-1] // 2)
        first, second = (_places(index, step, start, x.device) for start in (0, other))
        return x.index_select(-1, first), x.index_select(-1, second)

    def rotate(self, keys: Tensor, layer: "Optional[int]" = None) -> Tensor:
        """Keys [B, H, T, d] of a layer, rotated."""
        if layer in self.plain_layers:
            return keys
        return rotate(keys, self.cos, self.sin, interleaved=self.interleaved)

    def unrotate(self, keys: Tensor, layer: "Optional[int]" = None) -> Tensor:
        """Keys [B, H, T, d] of a layer, before their rotation."""
        if layer in self.plain_layers:
            return keys
        return unrotate(keys, self.cos, self.sin, interleaved=self.interleaved)


@dataclass(frozen=True)
class Turns:
    """A rotation as complex factors.

    Attributes: factors [B or 1, T, p/2] complex64; interleaved: whether pairs are neighbouring channels.
    """

    factors: Tensor
    interleaved: bool

    @classmethod
    def of(cls, rotation: Rotation) -> "Turns":
        """Of any rotation."""
        half = rotation.cos.shape[-1] // 2
        every = slice(None, None, 2) if rotation.interleaved else slice(half)
        factors = torch.complex(rotation.cos[..., every].float(), rotation.sin[..., every].float())
        return cls(factors, rotation.interleaved)

    def to(self, device: torch.device) -> "Turns":
        """On another device."""
        return self if self.factors.device == device else replace(self, factors=self.factors.to(device))

    def at(self, index: Tensor) -> "Turns":
        """Only the tokens `index` [B, T']."""
        factors = self.factors.expand(len(index), -1, -1)
        return replace(self, factors=factors.gather(1, index[:, :, None].expand(-1, -1, factors.shape[2])))

    def means(self, size: int, fronts: "list[int]") -> "Turns":
        """Means over buckets of `size` neighbouring tokens, [B or 1, C, p/2].

        A mean stands for all of its bucket: its argument is the angle in the middle, and pairs that turn fast are
        shorter by what they have in common, on average over the bucket. Buckets begin with a sequence's first token
        and are whole, also where the last ones of their tokens are still to come, so that they are the same whatever
        is beside them.

        Args:
            size: tokens per bucket.
            fronts: [B], slots before each sequence's first token; after the last token there are `size` more.
        """
        count = max(self.factors.shape[1] - min(fronts), 0) // size
        if len(set(fronts)) == 1:
            found = self.factors[:, fronts[0] : fronts[0] + count * size]
        else:
            every = self.factors.expand(len(fronts), -1, -1)  # by slices: an index would be copied to the device
            parts = [own[front : front + count * size] for own, front in zip(every, fronts, strict=True)]
            found = torch.stack([nn.functional.pad(own, (0, 0, 0, count * size - len(own))) for own in parts])
        return replace(self, factors=found.unflatten(1, (count, size)).mean(2))

    def part(self, start: int, stop: int) -> "Turns":
        """Of the tokens [start, stop) alone."""
        return replace(self, factors=self.factors[:, start:stop])

    def turned(self, keys: Tensor) -> Tensor:
        """Keys [B, H, T, d] of these tokens, rotated."""
        factors = self.factors[:, None].to(keys.device)  # [B or 1, 1, T, p/2]
        return self._rotated(keys, factors.real, factors.imag)

    def asked_of(self, query: Tensor) -> Tensor:
        """Queries [B, H, M, T, d] that meet keys before their rotation, of queries [B, H, M, d].

        Their products are those of the queries and the rotated keys, by the transpose of the rotation.
        """
        factors = self.factors[:, None, None].to(query.device)  # [B or 1, 1, 1, T, p/2]
        return self._rotated(query[..., None, :], factors.real, -factors.imag)

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Channels [..., d] of heads, their first pairs rotated."""
        width = 2 * cos.shape[-1]
        a, b = x[..., :width].unflatten(-1, (-1, 2)).unbind(-1) if self.interleaved else x[..., :width].chunk(2, dim=-1)
        first, second = a * cos - b * sin, a * sin + b * cos
        rest = x[..., width:].expand(*first.shape[:-1], -1)
        if self.interleaved:
            return torch.cat((torch.stack((first, second), dim=-1).flatten(-2), rest), dim=-1)
        return torch.cat((first, second, rest), dim=-1)


LONGEST_BUCKET = 64  # neighbouring rows that queries meet with one rotation; 1 for each its own
# Share of the rotated channels' energy that a bucket's mean may lose: with about as much, reading SmolLM2 at a 16th
# of the cache added a quarter to a half of what the codec itself changes (docs/lab-notes.md).
LOST = 0.26


def bucket_length(rope: "Optional[Rope]", head_dim: int) -> int:
    """How many neighbouring rows are met with one rotation: the longest bucket whose mean keeps enough of each.

    A mean over b positions shortens the pair that turns by ω a position to sin(ω b/2) / (b sin(ω/2)) of its length;
    what is lost is its square's distance to 1, on average over all channels of a head, of which partial rotations turn
    only some.

    Args:
        rope: rotations of the model; None without.
        head_dim: channels of a head.
    """
    if rope is None or LONGEST_BUCKET == 1:
        return LONGEST_BUCKET
    turns = Turns.of(rope(torch.arange(LONGEST_BUCKET)[None]))
    factors = turns.factors[0] / turns.factors[0, :1].abs()
    length = LONGEST_BUCKET
    while length > 1:
        lost = (1 - factors[:length].mean(0).abs().square()).mean() * 2 * factors.shape[1] / head_dim
        if lost <= LOST:
            break
        length //= 2
    return length


@lru_cache(maxsize=None)  # made once: lists would be copied to the device in every call
def _places(index: "tuple[int, ...]", step: int, start: int, device: torch.device) -> Tensor:
    """`index` times `step` from `start` on."""
    with torch.inference_mode(False):
        return torch.tensor([step * i + start for i in index], device=device)


def _swap(x: Tensor, interleaved: bool) -> Tensor:
    """Quarter turn of every rotary pair: (a, b) -> (-b, a)."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate(keys: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate keys to their positions, as the source model does.

    Args:
        keys: [B, H, T, d] before RoPE.
        cos: [B or 1, T, p] cosines, as the model's rotary embedding returns them.
        sin: [B or 1, T, p] sines.
        interleaved: pairs are neighbouring channels instead of the two halves.

    Returns:
        [B, H, T, d]; channels beyond p pass through (partial rotary).
    """
    p = cos.shape[-1]
    cos, sin = cos.unsqueeze(1).to(keys.device), sin.unsqueeze(1).to(keys.device)
    rotary, rest = keys[..., :p], keys[..., p:]
    turned = rotary * cos + _swap(rotary, interleaved) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def unrotate(keys: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Inverse of `rotate`, in fp32 inside: exact for scaled rotations (yarn) and rounded cos and sin.

    Args and shapes as `rotate`, with keys after RoPE.
    """
    p = cos.shape[-1]
    cos, sin = cos.unsqueeze(1).to(keys.device).float(), sin.unsqueeze(1).to(keys.device).float()
    rotary, rest = keys[..., :p].float(), keys[..., p:]
    turned = (rotary * cos - _swap(rotary, interleaved) * sin) / (cos.square() + sin.square())
    turned = turned.to(keys.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
