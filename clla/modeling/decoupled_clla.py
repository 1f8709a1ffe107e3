"""What one layer group keeps of its tokens where keys are decoupled: latents and rotary keys in one row, nothing exact.

The model's own keys and values are not looked at. Its attention is replaced by one over the rows (`absorbed_clla.py`),
so it must run through a function that the cache observes.

Shape legend: B sequences, T tokens, K rows, H_q query heads, d head dim, r rank, p components of the rotary key.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from .absorbed_clla import (
    AbsorbedRows,
    absorbed_query,
    decoded_rows,
    decoded_sums,
    rotary_key,
    split_query,
    with_unread,
)
from .group_clla import LatentGroup
from .observe_clla import Attention
from .rotary_clla import Rotation
from .rows_clla import Workspace, reading_mode
from .spec_clla import GroupSpec
from .unpack_triton_clla import unpacked


class DecoupledGroup(LatentGroup):
    """Storage of one layer group with decoupled keys; arguments as of `LatentGroup`."""

    def __init__(self, group: GroupSpec, *args: Any) -> None:
        self.pairs, self.rank = group.rope_pairs, group.rank
        super().__init__(group, *args)

    def forget(self) -> None:
        super().forget()
        # Rows as the layers of one forward pass read them, decoded [B, K, r + p] or absorbed.
        self._read: Optional[Tensor] = None
        self._absorbed: Optional[AbsorbedRows] = None
        self._attended: set[int] = set()  # layers that have
        self._holes = False  # the mask hides more than the padding before each sequence
        self._workspace: Optional[Workspace] = None

    def expect(self, holes: bool, workspace: Workspace) -> None:
        """Announce a forward pass.

        Args:
            holes: its mask hides more than the padding before each sequence.
            workspace: of the cache.
        """
        self._holes, self._workspace = holes, workspace

    def update(self, keys: Tensor, values: Tensor, layer: int) -> "tuple[Tensor, Tensor]":
        """Hand the model its keys and values back, only to see whether they reach its attention."""
        self._storage(keys)
        return self._hand_out(keys, values)

    def attend_decoupled(
        self, layer: int, query: Tensor, unread: "tuple[Tensor, Tensor]", plain: Attention, scaling: float, most: int
    ) -> Tensor:
        """Attention [B, T, H_q, d] of queries [B, H_q, T, d] after RoPE to all rows.

        Args:
            layer: of the model.
            query: its queries.
            unread: its own keys and values, which nothing is made of.
            plain: the attention that the model would compute.
            scaling: of the logits.
            most: up to this number of queries are absorbed, where attention is ordinary and no gradient is wanted.
        """
        index, home, tokens = self.layers.index(layer), query.device, query.shape[2]
        like = self._turn(tokens)
        self._attended.add(layer)
        turn = None if layer in like.plain_layers else like
        still, rotary = split_query(query.to(self.codec.decoder.device), self.codec, index, self.pairs, turn, like)
        if torch.is_grad_enabled() or tokens > most or self._holes or not plain.ordinary:
            rows = self._rows_read()
            keys, values = decoded_rows(rows, self.codec, index, self.heads, self.rank, query.dtype)
            both = torch.cat((still, rotary), dim=-1)
            out = plain.over(keys.to(home), values.to(home), query=both.to(home), scaling=scaling)
            out = with_unread(out[..., : self.head_dim], *unread)
        else:
            with reading_mode():
                out = self._attend_absorbed(index, still, rotary, scaling).to(home, query.dtype)
        if layer == self.layers[-1]:
            self._read = self._absorbed = None
        return out

    def _attend_absorbed(self, index: int, still: Tensor, rotary: Tensor, scaling: float) -> Tensor:
        """Attention [B, T, H_q, d] of the two parts of queries, which read packed rows."""
        (for_keys, for_values), mean = self.codec.decoder[index].chunk(2), self.codec.mean[index].chunk(2)[1]
        if self._absorbed is None:
            assert self.held is not None
            data, dtype = self.held.rows[:, : self.encoded], self.codec.decoder.dtype
            rows = AbsorbedRows(data, self.layout, dtype, self._padding, workspace=self._workspace)
            self._absorbed = rows
        sums = self._absorbed.sums(absorbed_query(still, rotary, for_keys), scaling)
        return decoded_sums(sums, for_values, mean, self.heads)

    def settle(self) -> None:
        """After a forward pass, as of `LatentGroup`.

        Raises:
            ValueError: the attention that should have read the rows was not seen.
        """
        if self._attended != set(self.layers):
            raise ValueError(
                "this model computes its attention where it cannot be observed: convert with plan.key 'reconstruct', "
                "or load with attn_implementation 'sdpa'"
            )
        super().settle()

    def _encode(self, hidden: Tensor) -> Tensor:
        rotation = self._turn(hidden.shape[1])
        return torch.cat((super()._encode(hidden), rotary_key(hidden, self.codec, self.pairs, rotation)), dim=-1)

    def _rows_read(self) -> Tensor:
        if self._read is None:
            assert self.held is not None
            self._read = unpacked(self.held.rows[:, : self.encoded], self.layout, self.codec.decoder.dtype)
        return self._read

    def _turn(self, count: int) -> Rotation:
        """The rotation to the `count` newest slots."""
        found = self.timeline.rotation(self.timeline.length, self.timeline.length + count)
        assert found is not None, "keys are rotated"
        return found
