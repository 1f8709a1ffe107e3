"""Slots, positions and padding of the sequences in a cache.

Shape legend: B sequences, T tokens, p rotary dim.
"""

from functools import wraps
from typing import Any, Callable, NamedTuple, Optional

import torch
from torch import Tensor

from .rotary_clla import Rope, Rotation, Turns


def keeping(function: "Callable[..., Any]") -> "Callable[..., Any]":
    """Make a function whose tensors are kept: without gradients, and not of the inference mode of one call.

    A tensor made under `torch.inference_mode` could not be written to outside of it, nor be read for gradients.
    """

    @wraps(function)
    def ordinary(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return ordinary


class Segment(NamedTuple):
    """Slots whose positions follow each other.

    Attributes:
        first: slot.
        offset: [B], slot minus position; between forward passes None where it is 0 for all.
        values: the same on the host.
    """

    first: int
    offset: Optional[Tensor]
    values: "list[int]"


class Timeline:
    """Slots, positions and padding of all sequences, shared by all layer groups.

    What decides about the flow of a program is held on the host, and read from the device once for each forward pass.

    Args:
        rope: rotations of the model; None for models without.
    """

    def __init__(self, rope: Optional[Rope]) -> None:
        self.rope = rope
        self.reset()

    def reset(self) -> None:
        self.length = 0  # slots before the current forward pass
        self.incoming = 0  # slots of the current one
        self.holes = False  # whether its mask hides more than the padding before each sequence
        # [B] padded slots before the first token; between forward passes None where there are none.
        self._padding: Optional[Tensor] = None
        self._front: list[int] = []  # the same on the host
        self._device: Optional[torch.device] = None
        self._segments: list[Segment] = []
        self._forget()

    @property
    def batch(self) -> Optional[int]:
        """Sequences; None before the first token."""
        return len(self._front) or None

    @property
    def max_padding(self) -> int:
        """Most padded slots before the first token of a sequence."""
        return max(self._front, default=0)

    @keeping
    def begin(self, position_ids: Tensor, attention_mask: Optional[Tensor]) -> None:
        """Announce the tokens of the next forward pass.

        Args:
            position_ids: [B, T].
            attention_mask: [B, length + T] of zeros and ones of any dtype, or None for no padding.

        Raises:
            ValueError: positions jump inside the chunk, or the mask is none of zeros and ones. Nothing has changed
                then.
        """
        batch, count = position_ids.shape
        device, stop = position_ids.device, self.length + count
        slots = torch.arange(self.length, stop, device=device)
        offset = slots[-1] - position_ids[:, -1]
        mask = None if attention_mask is None else attention_mask.to(device).bool()
        asked = {"offset": offset}
        if count > 1:
            expected = slots - offset[:, None]
            real = expected >= 0 if mask is None else mask[:, self.length :]
            asked["jumps"] = ((expected != position_ids) & real).sum(-1)
        if mask is not None:
            asked["seen"] = mask.sum(-1)
            if self.max_padding >= self.length:  # some saw nothing but padding yet
                asked["leading"] = (mask.cumsum(-1) == 0).sum(-1)
        if attention_mask is not None and mask is not None and attention_mask.is_floating_point():
            asked["other"] = attention_mask.to(device).ne(mask).sum(-1)
        # One answer from the device for all that is asked of it.
        told = dict(zip(asked, torch.stack(list(asked.values())).tolist(), strict=True))
        front, padding = self._front or [0] * batch, self._padding
        if padding is None:
            padding = torch.zeros(batch, dtype=torch.long, device=device)
        if "leading" in told:
            padding = torch.where(padding >= self.length, asked["leading"].to(padding.device), padding)
            pairs = zip(front, told["leading"], strict=True)
            front = [new if old >= self.length else old for old, new in pairs]
        holes = mask is not None and told["seen"] != [stop - padded for padded in front]
        if any(told.get("other", ())):
            raise ValueError("attention_mask holds other numbers than 0 and 1; pass 1 for tokens and 0 for padding")
        if any(told.get("jumps", ())):
            raise ValueError(
                "position_ids jump inside one call; tokens of one call must stand next to each other: "
                "pad on the left, or pass the parts in calls of their own"
            )
        self.incoming, self.holes, self._padding, self._front, self._device = count, holes, padding, front, device
        self._forget()
        if not self._segments or self._segments[-1].values != told["offset"]:
            self._segments = [*self._segments, Segment(self.length, offset, told["offset"])]

    def end(self) -> None:
        """After the forward pass: nothing but bookkeeping is kept, and no zeros."""
        self.length, self.incoming = self.length + self.incoming, 0
        self._forget()
        self._drop_zeros()

    def _drop_zeros(self) -> None:
        self._padding = self._padding if any(self._front) else None
        self._segments = [s if any(s.values) else s._replace(offset=None) for s in self._segments]

    def state(self) -> Any:
        """What `restore` takes."""
        return self.length, self._padding, self._front, self._segments

    def restore(self, state: Any) -> None:
        """Be as when `state` was called."""
        self.length, self._padding, self._front, self._segments = state
        self.incoming = 0
        self._forget()

    def _forget(self) -> None:
        self._memo: dict[tuple[int, int], Rotation] = {}
        self._turns: dict[tuple[int, int], tuple[Turns, Optional[Turns]]] = {}

    @property
    def padding(self) -> Tensor:
        """[B] padded slots before each sequence's first token."""
        assert self._front, "begin() announces the tokens first"
        if self._padding is None:
            return torch.zeros(len(self._front), dtype=torch.long, device=self._device)
        return self._padding

    def unpadded(self, count: int, device: torch.device) -> Optional[Tensor]:
        """Mask [B, length + count] of `count` more tokens that hides the padding so far; None where there is none."""
        if not self.max_padding:
            return None
        return (torch.arange(self.length + count, device=device) >= self.padding.to(device)[:, None]).long()

    def rotation(self, start: int, stop: int) -> Optional[Rotation]:
        """The rotation to a range of slots, with angles [B or 1, stop - start, p]."""
        if self.rope is None:
            return None
        if (start, stop) not in self._memo:
            self._memo[start, stop] = self.rope(self.positions(start, stop))
        return self._memo[start, stop]

    def turns(self, count: int, bucket: int) -> "tuple[Optional[Turns], Optional[Turns]]":
        """Rotations for queries that read latents: to the first `count` slots, and means over buckets of tokens."""
        if self.rope is None or not count:
            return None, None
        if (count, bucket) not in self._turns:
            turns = Turns.of(self.rope(self.positions(0, count + bucket if bucket > 1 else count)))
            means = turns.means(bucket, self._front) if bucket > 1 else None
            self._turns[count, bucket] = turns.part(0, count), means
        return self._turns[count, bucket]

    @property
    def fronts(self) -> "list[int]":
        """[B] slots before each sequence's first token."""
        return self._front

    @property
    def plain_layers(self) -> "frozenset[int]":
        """Layers whose keys are not rotated."""
        return frozenset() if self.rope is None else self.rope.plain_layers

    def positions(self, start: int, stop: int) -> Tensor:
        """[B or 1, stop - start] of a range of slots; 0 at padding."""
        parts = []
        ends = [segment.first for segment in self._segments[1:]] + [stop]
        for (first, offset, values), end in zip(self._segments, ends, strict=True):
            low, high = max(first, start), min(end, stop)
            if low < high:
                slots = torch.arange(low, high, device=self._device)[None]
                if offset is not None:
                    slots = slots - (offset[:1] if len(set(values)) == 1 else offset)[:, None]
                parts.append(slots)
        rows = max(part.shape[0] for part in parts)
        return torch.cat([part.expand(rows, -1) for part in parts], dim=1).clamp_(min=0)

    @keeping
    def crop(self, length: int) -> None:
        """Keep the first `length` slots; of a sequence that then has none but padding, what comes may be padding."""
        self.length, self.incoming = length, 0
        self._forget()
        self._segments = [segment for segment in self._segments if segment.first < length]
        if self._padding is not None:
            self._padding, self._front = self._padding.clamp(max=length), [min(p, length) for p in self._front]

    @keeping
    def rebatch(self, select: Callable[[Tensor], Tensor]) -> None:
        """Take other sequences, as `select` does with a tensor whose first dimension they are."""
        self._forget()
        if not self._front:
            return
        zeros = self.padding.new_zeros(len(self._front))
        self._segments = [
            Segment(s.first, *_selected(select, zeros if s.offset is None else s.offset, s.values))
            for s in self._segments
        ]
        self._padding, self._front = _selected(select, self.padding, self._front)
        self._drop_zeros()

    def tensors(self) -> "list[Tensor]":
        """What is kept on the device."""
        kept = [self._padding, *(segment.offset for segment in self._segments)]
        return [tensor for tensor in kept if tensor is not None]


def _selected(select: "Callable[[Tensor], Tensor]", tensor: Tensor, values: "list[int]") -> "tuple[Tensor, list[int]]":
    found = select(tensor)
    return found, values[:1] * len(found) if len(set(values)) == 1 else found.tolist()
