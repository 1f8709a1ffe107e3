"""Slots, positions and padding of the sequences in a cache.

Shape legend: B sequences, T tokens, p rotary dim.
"""

from typing import Callable, Optional

import torch
from torch import Tensor

from .rotary_clla import Rope, Rotation, Turns


class Timeline:
    """Slots, positions and padding of all sequences, shared by all layer groups.

    Args:
        rope: rotations of the model; None for models without.
    """

    def __init__(self, rope: Optional[Rope]) -> None:
        self.rope = rope
        self.reset()

    def reset(self) -> None:
        self.length = 0  # slots before the current forward pass
        self.incoming = 0  # slots of the current one
        self._padding: Optional[Tensor] = None  # [B] padded slots before the first token
        self.max_padding = 0
        self._segments: list[tuple[int, Tensor]] = []  # (first slot, slot - position [B])
        self._memo: dict[tuple[int, int], Rotation] = {}
        self._turns: dict[int, Turns] = {}

    def begin(self, position_ids: Tensor, attention_mask: Optional[Tensor], *, left_padded: bool = False) -> None:
        """Announce the tokens of the next forward pass.

        Args:
            position_ids: [B, T].
            attention_mask: [B, length + T] of zeros and ones, or None for no padding.
            left_padded: refuse a mask that hides anything but the front.

        Raises:
            ValueError: positions jump inside the chunk, or the mask hides more than it may.
        """
        if left_padded and attention_mask is not None and bool((attention_mask.diff(dim=1) < 0).any()):
            raise ValueError("with eviction only padding on the left can be masked")
        batch, count = position_ids.shape
        self.incoming = count
        self._forget()
        slots = torch.arange(self.length, self.length + count, device=position_ids.device)
        offset = slots[-1] - position_ids[:, -1]
        if count > 1:
            expected = slots - offset[:, None]
            real = expected >= 0 if attention_mask is None else attention_mask[:, self.length :].bool()
            if bool(((expected != position_ids) & real).any()):
                raise ValueError(
                    "position_ids jump inside one call; tokens of one call must stand next to each other: "
                    "pad on the left, or pass the parts in calls of their own"
                )
        if not self._segments or not torch.equal(self._segments[-1][1], offset):
            self._segments.append((self.length, offset))
        if self._padding is None:
            self._padding = torch.zeros(batch, dtype=torch.long, device=position_ids.device)
        if attention_mask is not None and self.max_padding >= self.length:  # some saw nothing but padding yet
            leading = (attention_mask.cumsum(-1) == 0).sum(-1)
            self._padding = torch.where(self._padding >= self.length, leading, self._padding)
            self.max_padding = int(self._padding.max())

    def end(self) -> None:
        """After the forward pass: nothing but bookkeeping is kept."""
        self.length, self.incoming = self.length + self.incoming, 0
        self._forget()

    def _forget(self) -> None:
        self._memo, self._turns = {}, {}

    @property
    def padding(self) -> Tensor:
        """[B] padded slots before each sequence's first token."""
        assert self._padding is not None, "begin() announces the tokens first"
        return self._padding

    def rotation(self, start: int, stop: int) -> Optional[Rotation]:
        """The rotation to a range of slots, with angles [B or 1, stop - start, p]."""
        if self.rope is None:
            return None
        if (start, stop) not in self._memo:
            self._memo[start, stop] = self.rope(self.positions(start, stop))
        return self._memo[start, stop]

    def turns(self, count: int) -> "Optional[Turns]":
        """The rotation to the first `count` slots, as queries that read latents take it."""
        if self.rope is None or not count:
            return None
        if count not in self._turns:
            self._turns[count] = Turns.of(self.rope(self.positions(0, count)))
        return self._turns[count]

    @property
    def plain_layers(self) -> "frozenset[int]":
        """Layers whose keys are not rotated."""
        return frozenset() if self.rope is None else self.rope.plain_layers

    def rotation_at(self, positions: Tensor) -> Optional[Rotation]:
        """The rotation to positions [B, K]."""
        return None if self.rope is None else self.rope(positions.long())

    def positions(self, start: int, stop: int) -> Tensor:
        """[B or 1, stop - start] of a range of slots; 0 at padding."""
        parts = []
        ends = [first for first, _ in self._segments[1:]] + [stop]
        for (first, offset), end in zip(self._segments, ends, strict=True):
            low, high = max(first, start), min(end, stop)
            if low < high:
                shared = offset[:1] if bool((offset == offset[0]).all()) else offset
                parts.append(torch.arange(low, high, device=offset.device) - shared[:, None])
        rows = max(part.shape[0] for part in parts)
        return torch.cat([part.expand(rows, -1) for part in parts], dim=1).clamp_(min=0)

    def crop(self, length: int) -> None:
        self.length, self.incoming = length, 0
        self._forget()
        self._segments = [s for s in self._segments if s[0] < length]

    def rebatch(self, select: Callable[[Tensor], Tensor]) -> None:
        self._forget()
        self._segments = [(first, select(offset)) for first, offset in self._segments]
        if self._padding is not None:
            self._padding = select(self._padding)

    def tensors(self) -> "list[Tensor]":
        return [offset for _, offset in self._segments] + ([self._padding] if self._padding is not None else [])
