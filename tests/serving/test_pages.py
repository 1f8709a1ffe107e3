"""Keys and values of slots, out of pages that lie in memory in any way."""

from __future__ import annotations

import itertools

import pytest
import torch

from clla.serving.pages import read_exact


@pytest.mark.parametrize("padding", [0, 8, 3], ids=["whole", "padded by lines", "padded"])
@pytest.mark.parametrize("shape", [(5, 9), (4,), (1, 0), (0,)], ids=str)
@pytest.mark.parametrize("heads", [1, 3])
def test_every_key_and_value_is_found(heads: int, shape: tuple[int, ...], padding: int) -> None:
    count, block, dim = 7, 16, 8
    memory = torch.randn(count, heads * block * 2 * dim + padding)
    strides = (memory.shape[1], block * 2 * dim, 2 * dim, 1)
    pages, slots = memory.as_strided((count, heads, block, 2 * dim), strides), torch.randint(0, count * block, shape)
    found = read_exact(pages, slots)
    assert found.shape == (*shape[:-1], 2 * heads, shape[-1], dim)
    for *before, token in itertools.product(*map(range, shape)):
        slot = int(slots[(*before, token)])
        lines = pages[slot // block, :, slot % block]  # [H, 2d]
        assert torch.equal(found[(*before, slice(None), token)], torch.cat(lines.chunk(2, dim=-1)))
