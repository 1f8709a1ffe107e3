"""Palu: whitened SVD by head groups, as an ordinary plan and codec without a window."""

from __future__ import annotations

import pytest
import torch
from conftest import pico
from helpers import stats_of, tokens
from torch import Tensor

from clla.baselines.palu import factor_projection, head_groups, palu
from clla.checkpoint.assemble import attach, clla_block
from clla.errors import UsageError

LLAMA_ROPE = {"form": "halves", "plain_layers": []}


def samples(count: int, width: int, seed: int = 0) -> Tensor:
    """Correlated inputs [count, width], not centred."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mix + 0.5


def test_factors_lose_what_the_discarded_singular_values_hold() -> None:
    """No rank-r product does better on the outputs themselves (Eckart and Young, 1936)."""
    x, weight = samples(200, 12), samples(12, 10, seed=1)
    y = x @ weight
    a, b = factor_projection(weight, x.mT @ x / len(x), 4)
    error = (y - x @ a @ b).square().sum() / len(x)
    torch.testing.assert_close(error, torch.linalg.svdvals(y)[4:].square().sum() / len(x))
    latents = x @ a
    torch.testing.assert_close(latents.mT @ latents / len(x), torch.eye(4, dtype=torch.float64))


def test_head_groups_are_of_four_or_of_all() -> None:
    assert [head_groups(heads) for heads in (1, 2, 3, 4, 8, 32)] == [1, 1, 1, 1, 2, 8]
    assert head_groups(8, 2) == 4
    with pytest.raises(UsageError, match="head groups of 3"):
        head_groups(8, 3)


@pytest.mark.parametrize("group_heads", (1, 2))
def test_each_head_group_is_factored_alone(group_heads: int) -> None:
    """Latents of one head group rebuild no other."""
    stats = stats_of(pico())
    heads = stats.kv.num_key_value_heads
    _, codec = palu(stats, share=0.5, kv_itemsize=2, group_heads=group_heads)
    width = group_heads * 16
    rank = width // 2
    decoder = codec.groups[0].decoder[0]
    for i in range(2 * heads // group_heads):
        block = decoder[i * width : (i + 1) * width]
        others = torch.cat((block[:, : i * rank], block[:, (i + 1) * rank :]), dim=1)
        assert float(others.abs().max()) == 0 if others.numel() else True
        assert float(block[:, i * rank : (i + 1) * rank].abs().max()) > 0


@pytest.mark.parametrize("name", ("llama", "qwen2", "gpt_neox"))
def test_full_share_reproduces_the_source(name: str) -> None:
    model = pico(name)
    stats = stats_of(model)
    plan, codec = palu(stats, share=1.0, kv_itemsize=4)
    block = clla_block(plan, rope=LLAMA_ROPE, kv_dtype=torch.float32, prefill_chunk=24)
    converted = attach(model, codec, block)
    ids = tokens(2, 70)
    torch.testing.assert_close(converted(ids).logits, model(ids).logits, atol=0.05, rtol=0.05)
    cache = converted.new_cache()
    converted(ids, past_key_values=cache)
    assert cache.nbytes == 2 * 70 * plan.row_bytes + sum(t.nbytes for t in cache.timeline.tensors())


@pytest.mark.parametrize(("bits", "scale"), ((16, 1), (4, 1)))
def test_bytes_are_those_of_rank_and_bits(bits: int, scale: int) -> None:
    model = pico()
    plan, _ = palu(stats_of(model), share=0.5, kv_itemsize=4, bits=bits)
    layers, values = 4, 2 * 2 * 16
    assert plan.row_bytes == layers * (values // 2 * bits // 8 + scale)


def test_a_rotation_spreads_the_latents_for_four_bits() -> None:
    """Without it the first component would take the whole range; with it the error falls."""
    model = pico()
    stats, ids = stats_of(model), tokens(1, 70)
    source = model(ids).logits.log_softmax(-1)

    def kl(bits: int) -> float:
        plan, codec = palu(stats, share=1.0, kv_itemsize=4, bits=bits)
        block = clla_block(plan, rope=LLAMA_ROPE, kv_dtype=torch.float32, prefill_chunk=24)
        logits = attach(model, codec, block)(ids).logits.log_softmax(-1)
        return float((source.exp() * (source - logits)).sum(-1).mean())

    assert 0 < kl(8) < kl(4) < kl(2)


def test_a_share_without_rank_is_refused() -> None:
    with pytest.raises(UsageError, match="leaves no rank"):
        palu(stats_of(pico()), share=0.05, kv_itemsize=4)
