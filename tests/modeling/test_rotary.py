"""Rotary embedding against transformers' own, and its inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere_rotary
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as gpt_neox_rotary
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary

from clla.modeling.rotary_clla import rotate, unrotate

B, H, T, D = 2, 3, 11, 16


def angles(dim: int, *, interleaved: bool = False, batch: int = B, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin [batch, T, dim] at positions that differ between sequences."""
    positions = torch.arange(T, dtype=torch.float64) + 1000 * torch.arange(batch, dtype=torch.float64)[:, None]
    frequencies = 1e4 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    half = positions[..., None] * frequencies
    full = half.repeat_interleave(2, dim=-1) if interleaved else torch.cat((half, half), dim=-1)
    return (full.cos() * scale).float(), (full.sin() * scale).float()


def keys(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, H, T, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_rotate_is_llamas(dtype: torch.dtype) -> None:
    cos, sin = (x.to(dtype) for x in angles(D))
    k = keys(dtype=dtype)
    assert torch.equal(rotate(k, cos, sin), llama_rotary(k, k, cos, sin)[1])


def test_rotate_is_gpt_neox_partial_rotary() -> None:
    cos, sin = angles(D // 4)
    k = keys()
    assert torch.equal(rotate(k, cos, sin), gpt_neox_rotary(k, k, cos, sin)[1])


def test_rotate_is_coheres_interleaved_rotary() -> None:
    cos, sin = angles(D, interleaved=True)
    k = keys()
    torch.testing.assert_close(rotate(k, cos, sin, interleaved=True), cohere_rotary(k, k, cos, sin)[1])


@pytest.mark.parametrize("interleaved", (False, True))
def test_rotate_turns_every_pair_by_its_angle(interleaved: bool) -> None:
    """Complex multiplication, pair by pair."""
    dim = 12
    cos, sin = angles(dim, interleaved=interleaved)
    k = keys()
    turned = rotate(k, cos, sin, interleaved=interleaved)
    for pair in range(dim // 2):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + dim // 2)
        before = torch.complex(k[..., a], k[..., b])
        after = before * torch.complex(cos[..., a], sin[..., a])[:, None]
        torch.testing.assert_close(turned[..., a], after.real)
        torch.testing.assert_close(turned[..., b], after.imag)
    assert torch.equal(turned[..., dim:], k[..., dim:])


@given(
    seed=st.integers(0, 1000),
    dim=st.sampled_from((2, 4, 8, 12, 16)),
    interleaved=st.booleans(),
    scale=st.sampled_from((0.25, 1.0, 1.27, 4.0)),
    batch=st.sampled_from((1, B)),
    rounded=st.booleans(),
)
@settings(deadline=None, max_examples=50)
def test_unrotate_inverts_rotate(
    seed: int, dim: int, interleaved: bool, scale: float, batch: int, rounded: bool
) -> None:
    """Full and partial rotary, both pairings, attention factors, cos and sin rounded to bf16."""
    cos, sin = angles(dim, interleaved=interleaved, batch=batch, scale=scale)
    if rounded:
        cos, sin = cos.bfloat16().float(), sin.bfloat16().float()
    k = keys(seed)
    turned = rotate(k, cos, sin, interleaved=interleaved)
    assert not torch.allclose(turned, k, atol=1e-2)
    torch.testing.assert_close(unrotate(turned, cos, sin, interleaved=interleaved), k, rtol=1e-4, atol=1e-5)
    back = unrotate(k, cos, sin, interleaved=interleaved)
    torch.testing.assert_close(rotate(back, cos, sin, interleaved=interleaved), k, rtol=1e-4, atol=1e-5)


def test_half_precision_keys_come_back_to_their_rounding() -> None:
    """The inverse is exact in fp32: what is left is the rounding of the rotated keys themselves."""
    cos, sin = (x.bfloat16() for x in angles(D, scale=1.3))
    k = keys(dtype=torch.bfloat16)
    turned = rotate(k.float(), cos.float(), sin.float()).bfloat16()
    back = unrotate(turned, cos, sin)
    assert back.dtype == torch.bfloat16
    relative = (back.float() - k.float()).norm() / k.float().norm()
    assert 0 < float(relative) < 4e-3


def test_rotation_keeps_the_norm_and_depends_on_distance_only() -> None:
    cos, sin = angles(D, batch=1)
    k, q = keys(1)[:1, :, :1].expand(1, H, T, D), keys(2)[:1, :, :1].expand(1, H, T, D)
    turned_k, turned_q = rotate(k, cos, sin), rotate(q, cos, sin)
    torch.testing.assert_close(turned_k.norm(dim=-1), k.norm(dim=-1))
    scores = torch.einsum("bhtd,bhsd->bhts", turned_q, turned_k)
    for offset in range(1, T):
        band = scores.diagonal(offset, dim1=-2, dim2=-1)
        torch.testing.assert_close(band, band[..., :1].expand_as(band), rtol=1e-4, atol=1e-4)
