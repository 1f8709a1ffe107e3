"""Attention with decoupled keys: a position-free part decoded from the latent, and a rotary key beside it.

A query head of a layer meets an old token in

    scaling · (qᵀ D_k z + Re(q'ᴴ c)),  q' = w* q_rot

with q the query before its rotation, D_k the layer's decoder of position-free keys, z the latent, q_rot the rotary
pairs of the query as complex numbers, w how the layer's key answers the components c of the rotary key, which is cached
rotated. So each token caches one row [z ; c], for all layers and heads of its group. *Absorbed*, queries go through
the decoder instead of the latents, [D_kᵀ q ; q'], meet the rows as one head of r + p channels (as in multi-head latent
attention, DeepSeek-V2, arXiv 2405.04434), and the latents they sum up are decoded to values once. *Decoded*, each
token's keys and values are made, which is cheaper for many queries; both are the same sum in another order.

Shape legend: B sequences, T queries, K tokens, H_q query heads, H key-value heads, M query heads a key-value head,
d head dim, r rank, p components of the rotary key.
"""

from typing import Any, Optional

import torch
from torch import Tensor, nn

from .rotary_clla import Rotation, rotate
from .rows_clla import PackedRows, full_product


def rotary_key(hidden: Tensor, codec: Any, pairs: "tuple[int, ...]", rotation: Rotation) -> Tensor:
    """The rotary key [B, T, p] of attention inputs [B, T, h], rotated to their positions.

    Args:
        hidden: of the group's first layer.
        codec: with `offset`, `rope_encoder` and `rope_mean`.
        pairs: which rotary pair of a head each pair of the key turns like.
        rotation: to the positions.
    """
    centred = (hidden.float() - codec.offset.float()).to(codec.rope_encoder.dtype)
    key = nn.functional.linear(centred, codec.rope_encoder, codec.rope_mean)
    cos, sin = (x.repeat_interleave(2, dim=-1) for x in rotation.pairs(pairs))
    return rotate(key.float()[:, None], cos, sin, interleaved=True)[:, 0].to(key.dtype)


def split_query(
    query: Tensor, codec: Any, index: int, pairs: "tuple[int, ...]", rotation: "Optional[Rotation]", like: Rotation
) -> "tuple[Tensor, Tensor]":
    """Position-free part [B, H_q, T, d] and rotary part [B, H_q, T, p] of queries.

    Args:
        query: [B, H_q, T, d] after RoPE.
        codec: with `rope_query`.
        index: of the layer in its group.
        pairs: as in `rotary_key`.
        rotation: of these queries; None where the layer rotates nothing.
        like: any rotation of the model, which tells how pairs lie in a head.
    """
    answer = codec.rope_query[index]  # [H, P, 2]
    real, imaginary = like.channels(query, pairs)
    grouped = [x.unflatten(1, (len(answer), -1)) for x in (real, imaginary)]  # [B, H, M, T, P]
    w_real, w_imaginary = (x[:, None, None].to(query.dtype) for x in answer.unbind(-1))
    rotary = torch.stack(
        (
            w_real * grouped[0] + w_imaginary * grouped[1],
            w_real * grouped[1] - w_imaginary * grouped[0],
        ),
        dim=-1,
    )
    rotary = rotary.flatten(-2).flatten(1, 2)
    if rotation is None:
        return query, rotary
    # Undo RoPE. YaRN also scales the rotated vectors; the squared scale remains, as in any logit.
    still = rotate(query.float(), rotation.cos.float(), -rotation.sin.float(), interleaved=rotation.interleaved)
    return still.to(query.dtype), rotary


def absorbed_query(still: Tensor, rotary: Tensor, decoder: Tensor) -> Tensor:
    """Queries [B, H_q, T, r + p] that meet rows [z ; c].

    Args:
        still: [B, H_q, T, d], position-free.
        rotary: [B, H_q, T, p].
        decoder: [H·d, r] of position-free keys.
    """
    heads = decoder.unflatten(0, (-1, still.shape[-1]))  # [H, d, r]
    grouped = still.unflatten(1, (len(heads), -1)).to(decoder.dtype)  # [B, H, M, T, d]
    return torch.cat(((grouped @ heads[:, None]).flatten(1, 2), rotary.to(decoder.dtype)), dim=-1)


class AbsorbedRows(PackedRows):
    """Rows [z ; c] of one layer group, which absorbed queries meet as one head.

    Arguments are those of `PackedRows`: a `JoinedLayout` of r and p components, and the dtype of the queries.
    """

    @property
    def rank(self) -> int:
        """r."""
        return self.layout.parts[0].rank

    def sums(self, query: Tensor, scaling: float) -> Tensor:
        """Σ p·z [B, H_q, T, r] in fp32; of queries that may see nothing, zeros.

        The queries are those of the T newest rows, in their order: each sees its own row and those before.

        Args:
            query: [B, H_q, T, r + p] from `absorbed_query`.
            scaling: of the logits.
        """
        heads, tokens = query.shape[1:3]
        ends = self._ends(tokens)
        logits = self._logits(query.flatten(1, 2), ends).mul_(scaling)
        sums = self._sums(logits.softmax(-1))[..., : self.rank]  # a slice of the rows would be copied
        blind = ends <= self.hidden[:, None]  # [B, T]: padding, whose softmax is over nothing
        return sums.unflatten(1, (heads, tokens)).masked_fill(blind[:, None, :, None], 0.0)

    def _ends(self, tokens: int) -> Tensor:
        """[T], behind the last row that each query sees."""
        newest = torch.arange(1 - tokens, 1, device=self.data.device)
        return newest + (self.count if self.used is None else self.used)

    def _logits(self, query: Tensor, ends: Tensor) -> Tensor:
        """Products [B, H_q·T, K] in fp32 of queries [B, H_q·T, r + p] and rows; -inf where a row is masked."""
        logits = torch.empty(*query.shape[:2], self.count, dtype=torch.float32, device=query.device)
        for start, rows in self.blocks():
            products = full_product(rows, query.mT)  # CPUs take far longer over `query @ rows.mT`
            logits[..., start : start + rows.shape[1]] = products.mT
        places = torch.arange(self.count, device=query.device)
        seen = (places >= self.hidden[:, None])[:, None] & (places < ends[:, None])  # [B, T, K]
        return logits.unflatten(1, (-1, len(ends))).masked_fill_(~seen[:, None], float("-inf")).flatten(1, 2)


def decoded_sums(sums: Tensor, decoder: Tensor, mean: Tensor, heads: int) -> Tensor:
    """Values [B, T, H_q, d] of sums of latents whose weights add up to 1.

    Args:
        sums: [B, H_q, T, r].
        decoder: [H·d, r] of values.
        mean: [H·d] of values.
        heads: H.
    """
    own = decoder.unflatten(0, (heads, -1))  # [H, d, r]
    grouped = sums.unflatten(1, (heads, -1)).to(decoder.dtype)  # [B, H, M, T, r]
    values = grouped @ own.mT[:, None] + mean.unflatten(0, (heads, 1, 1, -1))
    return values.flatten(1, 2).transpose(1, 2)


def decoded_rows(
    rows: Tensor, codec: Any, index: int, heads: int, rank: int, dtype: torch.dtype
) -> "tuple[Tensor, Tensor]":
    """Keys [B, H, K, d + p] of one layer, position-free part and rotary key, and values, zeros behind them.

    Args:
        rows: [B, K, r + p].
        codec: with `decoder` and `mean`.
        index: of the layer in its group.
        heads: H.
        rank: r.
        dtype: of the result.
    """
    flat = nn.functional.linear(rows[..., :rank], codec.decoder[index], codec.mean[index])
    both = flat.to(dtype).unflatten(-1, (2 * heads, -1)).transpose(1, 2)  # [B, 2H, K, d]
    turned = rows[:, None, :, rank:].to(dtype).expand(-1, heads, -1, -1)
    keys = torch.cat((both[:, :heads], turned), dim=-1)
    return keys, nn.functional.pad(both[:, heads:], (0, turned.shape[-1]))  # kernels want them as wide as the keys


def with_unread(out: Tensor, *tensors: Tensor) -> Tensor:
    """The same output, with gradients of zero for what it does not need: data-parallel training waits for all."""
    unread = [tensor for tensor in tensors if tensor.requires_grad]
    return out + 0.0 * sum(tensor.sum() for tensor in unread) if unread else out
