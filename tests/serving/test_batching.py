"""Sequences that are read side by side give what each gives alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from clla.modeling.hooks_clla import rope_of
from clla.modeling.modeling_clla import CllaForCausalLM
from clla.serving.attention import GroupReader
from clla.serving.batching import NEAR, PADDING, sides
from clla.serving.model import readers
from clla.serving.pages import Batch

from .conftest import FORMS

SIZE = 16  # tokens per page
TOTALS = (23, 70, 66, 2, 131, 133, 18, 129, 40)
COUNTS = (1, 1, 1, 1, 1, 2, 18, 2, 1)  # the seventh is a prompt
SCALING = 1e-5  # scales of random bytes are large, and logits in the millions would show nothing but rounding


def batch_of(totals: tuple[int, ...], counts: tuple[int, ...], table: Tensor) -> Batch:
    """A step of sequences with so many tokens, the last `counts` of them new."""
    positions = torch.cat([torch.arange(t - c, t) for t, c in zip(totals, counts, strict=True)])
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    slots = table[owner, positions // SIZE].long() * SIZE + positions % SIZE
    return Batch([0, *itertools.accumulate(counts)], list(totals), table, slots, positions)


def part(batch: Batch, i: int) -> Batch:
    """One sequence of it."""
    new = slice(batch.starts[i], batch.starts[i + 1])
    count = new.stop - new.start
    return Batch([0, count], [batch.lengths[i]], batch.table[i : i + 1], batch.slots[new], batch.positions[new])


def readers_of(model: CllaForCausalLM, heads: list[int], most_rows: int) -> list[GroupReader]:
    """Its groups, for some of its key-value heads."""
    text, spec = model.config.text_config, model.config.spec
    per_head = text.num_attention_heads // text.num_key_value_heads
    found = readers(spec, model.codec, rope_of(model.source, spec.rope), heads, per_head * len(heads))
    for group in found:
        group.most_rows = most_rows
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("heads", "most_rows"), [([0, 1], 10_000), ([1], 10_000), ([0, 1], 1)])
def test_side_by_side_and_alone(form: str, heads: list[int], most_rows: int) -> None:
    model = FORMS[form]()
    random = torch.Generator().manual_seed(1)
    blocks = -(-max(TOTALS) // SIZE)
    table = torch.randperm(len(TOTALS) * blocks, generator=random).int().unflatten(0, (-1, blocks))
    batch, *_ = step = [batch_of(TOTALS, COUNTS, table) for _ in range(2)]
    groups = readers_of(model, heads, most_rows)
    pages = torch.randint(0, 256, (table.numel(), 1, SIZE, groups[-1].stop), dtype=torch.uint8, generator=random)
    exact = torch.randn(table.numel(), len(heads), SIZE, 2 * groups[0].head_dim, generator=random)
    for group in groups:
        query = torch.randn(sum(COUNTS), 2 * len(heads), group.head_dim, generator=random)
        for layer in group.layers:
            together, alone = (torch.full_like(query, torch.nan) for _ in range(2))
            group.attend(layer, query, (step[1], exact), (batch, pages), SCALING, together)
            for i, (start, stop) in enumerate(itertools.pairwise(batch.starts)):
                own = part(batch, i)
                group.attend(layer, query[start:stop], (own, exact), (own, pages), SCALING, alone[start:stop])
            torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))
        assert not [key for key in batch.memo if key[0] == group.first]  # rows are let go


def test_who_is_read_together() -> None:
    table = torch.zeros(6, 100, dtype=torch.int32)
    old = [1000, 10, 990, 60, 5, 800]
    batch = batch_of((1001, 11, 991, 61, 7, 1000), (1, 1, 1, 1, 2, 200), table)
    found = sides(old, batch, 4, 10_000, None)
    assert [side.sequences for side in found] == [[0, 2], [3, 1], [4], [5]]
    assert all(side.rows - o <= max(NEAR, side.rows // PADDING) for side in found for o in side.old)
    assert [side.sequences for side in sides(old, batch, 4, 1999, None)] == [[0], [2], [3, 1], [4], [5]]
    assert [side.sequences for side in sides(old, batch, 0, 10_000, None)] == [[0], [2], [3], [1], [4], [5]]


def test_sequences_without_new_tokens_are_left_out() -> None:
    batch = batch_of((5, 5), (0, 1), torch.zeros(2, 1, dtype=torch.int32))
    assert [side.sequences for side in sides([4, 4], batch, 4, 100, None)] == [[1]]
