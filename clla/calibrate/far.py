"""Gradients of keys and values as far queries alone read them.

A converted model keeps the newest W tokens exact, so that an error in a key or value costs only what queries at least
W tokens away make of it: g is the gradient at the far copy if attention sees two copies of its keys and values in one
softmax over [q·K_near | q·K_far]. Nothing is doubled for it: with p and dO as usual,

    dV_s = Σ_{t-s≥W} p_ts dO_t,    dK_s = scaling·Σ_{t-s≥W} p_ts (dO_t·V_s - dO_t·O_t) q_t,

and the same sums over the near queries are what lacks of the gradients that are passed down. During calibration the
model's attention is one of our own, which computes what its own would, and this on the way back.

Shape legend: B sequences, T tokens, H key-value heads, M query heads per key-value head, d head dim, t rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

NAME = "clla_far"
BLOCK_BYTES = {"cpu": 2**22, "cuda": 2**28}  # of the logits of one block of queries
Note = Callable[[Tensor, Tensor], None]
_owners: ContextVar[Callable[[Tensor, Tensor], Note | None] | None] = ContextVar("clla_far", default=None)
_window: ContextVar[int] = ContextVar("clla_far_window", default=0)


@contextmanager
def far_attention(
    model: PreTrainedModel, window: int, owner: Callable[[Tensor, Tensor], Note | None]
) -> Iterator[None]:
    """Within it, backward passes of the model tell the far gradients of the keys and values that attention reads.

    Args:
        model: one whose attention goes through transformers' `AttentionInterface`.
        window: W.
        owner: called with the keys and values [B, H, T, d] of each attention; gives a function that is called in the
            backward pass with the gradients at their far copies, in fp32, or None where nobody asks.
    """
    own: Any = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    tokens = _owners.set(owner), _window.set(window)
    try:
        yield
    finally:
        _owners.reset(tokens[0])
        _window.reset(tokens[1])
        model.set_attn_implementation(own)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as `AttentionInterface` wants it; output [B, T, H_q, d]."""
    owner = _owners.get()
    note = None if owner is None else owner(key, value)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    bias = attention_mask if position_bias is None else _joined(position_bias, attention_mask)
    out = _Attention.apply(query, key, value, bias, s_aux, scaling, softcap, _window.get(), note)
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])


def _joined(bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        tokens = torch.arange(bias.shape[-1], device=bias.device)
        mask = tokens <= tokens[:, None]
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask


class _Attention(torch.autograd.Function):
    """Attention [B, H_q, T, d] of a whole sequence to itself; `bias` None is causal."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        s_aux: Tensor | None,
        scaling: float,
        softcap: float | None,
        window: int,
        note: Note | None,
    ) -> Tensor:
        ctx.settings = Settings(bias, s_aux, scaling, softcap)
        if softcap is None and s_aux is None:
            out = nn.functional.scaled_dot_product_attention(
                query,
                key,
                value,
                bias,
                is_causal=bias is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        else:
            out = ctx.settings.attended(query, key, value)
        ctx.window, ctx.note = window, note
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, out = ctx.saved_tensors
        return (*gradients(query, key, value, out, grads[0], ctx.settings, ctx.window, ctx.note), *[None] * 6)


class Settings:
    """What makes probabilities of logits."""

    def __init__(self, bias: Tensor | None, s_aux: Tensor | None, scaling: float, softcap: float | None) -> None:
        self.bias, self.s_aux, self.scaling, self.softcap = bias, s_aux, scaling, softcap

    def probabilities(self, query: Tensor, key: Tensor, start: int) -> tuple[Tensor, Tensor | None]:
        """What queries give keys, and the slope of the soft cap, [B, H, M, t, s] each.

        Args:
            query: [B, H, M, t, d], of the tokens from `start` on.
            key: [B, H, s, d], of the first tokens.
            start: first of the queries' tokens.
        """
        per_head, rows, stop = query.shape[2], query.shape[3], key.shape[2]
        logits = (query.flatten(2, 3) @ key.mT).unflatten(2, (per_head, rows)).mul_(self.scaling)
        slope = None
        if self.softcap is not None:
            curved = logits.div_(self.softcap).tanh_()
            slope = 1 - curved.square()
            logits = curved * self.softcap
        if self.bias is None:
            tokens = torch.arange(stop, device=key.device)
            first = max(0, start + 1)
            logits[..., first:].masked_fill_(tokens[first:] > tokens[start : start + rows, None], float("-inf"))
        else:
            bias = self.bias[..., start : start + rows, :stop]
            bias = (
                bias.expand(-1, query.shape[1] * per_head, -1, -1).unflatten(1, (-1, per_head))
                if bias.shape[1] > 1
                else bias[:, :, None]
            )
            logits = logits.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else logits + bias
        if self.s_aux is not None:
            sink = self.s_aux.to(logits.dtype).view(1, -1, per_head, 1, 1).expand(len(logits), -1, -1, rows, 1)
            return torch.cat((logits, sink), dim=-1).softmax(-1)[..., :-1], slope
        return logits.softmax(-1), slope

    def attended(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The attention itself, [B, H_q, T, d]."""
        wide, length = accurate(query.dtype), query.shape[2]
        q, k, v = query.to(wide).unflatten(1, (key.shape[1], -1)), key.to(wide), value.to(wide)
        out = q.new_empty(*q.shape[:4], v.shape[-1])
        for start, stop in blocks(query):
            reach = stop if self.bias is None else length
            p, _ = self.probabilities(q[:, :, :, start:stop], k[:, :, :reach], start)
            out[:, :, :, start:stop] = (p.flatten(2, 3) @ v[:, :, :reach]).unflatten(2, (q.shape[2], -1))
        return out.flatten(1, 2).to(query.dtype)


def accurate(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: fp32 or better."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def blocks(query: Tensor) -> Iterator[tuple[int, int]]:
    """First and last + 1 of the queries [B, H_q, T, d] whose logits are formed at once."""
    batch, heads, length, _ = query.shape
    room = BLOCK_BYTES.get(query.device.type, BLOCK_BYTES["cuda"])
    step = max(16, room // (4 * batch * heads * length))
    return ((start, min(start + step, length)) for start in range(0, length, step))


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    top: Tensor,
    settings: Settings,
    window: int,
    note: Note | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries [B, H_q, T, d], keys and values [B, H, T, d] from that of the output; tells the far ones.

    Args:
        query, key, value, out: of the attention.
        top: gradient of the output, [B, H_q, T, d].
        settings: of the attention.
        window: W.
        note: told the gradients at the far copies of keys and values; None if nobody asks.
    """
    heads, length, dtype = key.shape[1], key.shape[2], query.dtype
    wide = accurate(dtype)
    q, o, g = (x.to(wide).unflatten(1, (heads, -1)) for x in (query, out, top))  # [B, H, M, T, d]
    k, v = key.to(wide), value.to(wide)
    dots = (g * o).sum(-1, keepdim=True)
    dq = torch.empty_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    far_k, far_v = (dk, dv) if note is None else (torch.zeros_like(k), torch.zeros_like(v))
    for start, stop in blocks(query):
        reach = stop if settings.bias is None else length
        rows = q[:, :, :, start:stop]
        p, slope = settings.probabilities(rows, k[:, :, :reach], start)
        own, above = rows.flatten(2, 3), g[:, :, :, start:stop].flatten(2, 3)
        ds = (above @ v[:, :, :reach].mT).unflatten(2, (q.shape[2], -1)).sub_(dots[:, :, :, start:stop]).mul_(p)
        if slope is not None:
            ds *= slope
        p, ds = p.flatten(2, 3), ds.mul_(settings.scaling).flatten(2, 3)  # [B, H, M·t, s]
        dq[:, :, :, start:stop] = (ds @ k[:, :, :reach]).unflatten(2, (q.shape[2], -1))
        begin, end = (0, 0) if note is None else (max(0, start - window + 1), max(0, stop - window))
        if end > 0:
            tokens = torch.arange(length, device=k.device)
            far = (tokens[start:stop, None] - tokens[begin:end] >= window).repeat(q.shape[2], 1)  # [M·t, …]
            if end > begin:  # keys that some of these queries read exactly
                mixed_p, mixed_ds = p[..., begin:end].clone(), ds[..., begin:end].clone()
                p[..., begin:end] *= far
                ds[..., begin:end] *= far
            far_v[:, :, :end] += p[..., :end].mT @ above
            far_k[:, :, :end] += ds[..., :end].mT @ own
            if end > begin:
                p[..., begin:end] = mixed_p.mul_(~far)
                ds[..., begin:end] = mixed_ds.mul_(~far)
        dv[:, :, begin:reach] += p[..., begin:].mT @ above
        dk[:, :, begin:reach] += ds[..., begin:].mT @ own
    if note is not None:
        note(far_k, far_v)
        dk += far_k
        dv += far_v
    return dq.flatten(1, 2).to(dtype), dk.to(dtype), dv.to(dtype)
