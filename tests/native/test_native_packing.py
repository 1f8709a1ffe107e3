"""Rows packed by compiled code: those of PyTorch, but where fp32 cannot tell two scales apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clla.modeling.quantize_clla import JoinedLayout, RowLayout
from clla.native import reading

pytestmark = pytest.mark.skipif(reading.compiler() is None, reason="there is no C compiler")
EVERY_WIDTH = (16, 8, 8, 8, 7, 6, 5, 4, 3, 2, 1)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Latents of sizes that differ by token and by component."""
    random = torch.Generator().manual_seed(seed)
    sizes = torch.rand(shape[:-1], generator=random)[..., None] * 4
    return torch.randn(shape, generator=random) * sizes / torch.arange(1, shape[-1] + 1) ** 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 200)], ids=str)
@pytest.mark.parametrize("tiers", [EVERY_WIDTH, (4,), (8, 8, 8, 8, 2, 1, 1)], ids=str)
def test_rows_are_those_of_pytorch(tiers: tuple[int, ...], shape: tuple[int, int], dtype: torch.dtype) -> None:
    layout = RowLayout(tiers, 24)
    latents = drawn(*shape, layout.rank).to(dtype)
    found, expected = reading.packed(latents, layout), layout.pack(latents)
    assert found is not None and found.shape == expected.shape and found.dtype == torch.uint8
    same = (found == expected).all(-1)
    assert same.float().mean() > 0.97 or same.sum() >= same.numel() - 1
    errors = [(layout.unpack(rows) - latents.float()).square().sum(-1) for rows in (found, expected)]
    torch.testing.assert_close(*errors, rtol=1e-3, atol=1e-6)  # what differs is as good


def test_zeros_and_what_no_scale_reaches() -> None:
    layout = RowLayout((8, 4, 1), 8)
    latents = torch.zeros(4, 24)
    latents[1] = 1e30
    latents[2] = -1e-30
    latents[3, :8] = torch.tensor([1e8, -1e-8, 0, 1, -1, 5, 1e-3, -1e4])
    found = reading.packed(latents, layout)
    assert found is not None and torch.equal(found, layout.pack(latents))


def test_latents_may_lie_anyhow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    layout = RowLayout((5, 2), 16)
    latents = drawn(2, 130, 64)
    for some in (latents[..., 7:39], latents[:, ::2, 3:35], latents[..., ::2], latents.mT[:, :, :32]):
        found = reading.packed(some, layout)
        assert found is not None and (found == layout.pack(some)).all(-1).float().mean() > 0.97


def test_rotary_keys_lie_behind() -> None:
    layout = JoinedLayout(RowLayout((5, 2), 16), RowLayout((6, 6), 8))
    latents = drawn(2, 50, 48)
    found = reading.packed(latents, layout)
    assert found is not None and (found == layout.pack(latents)).all(-1).float().mean() > 0.97


def test_without_components_nothing_is_packed() -> None:
    assert reading.packed(torch.zeros(2, 3, 0), RowLayout((), 8)) is None
