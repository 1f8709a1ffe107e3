"""What reading an old token costs, counted while it is read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from clla.bench.shapes import ROPE, random_plan, shape_config
from clla.modeling import attention_clla
from clla.modeling.attention_clla import Buckets, LatentRows, rows_in_full
from clla.modeling.hooks_clla import rope_of
from clla.modeling.quantize_clla import RowLayout
from clla.modeling.rotary_clla import Turns, bucket_length


@pytest.mark.usefixtures("usual_rotations")
@pytest.mark.parametrize("count", [8192, 16384])
def test_a_token_of_llama_3_8b_takes_a_million_operations(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer at the recipes' default budget; making every key would take 2·H·d·r of them, ten million."""
    monkeypatch.setattr(attention_clla, "COMPILED", None)  # which counts nothing
    config = shape_config("llama-3-8b")
    plan = random_plan(config, kv_budget="6.25%")
    layout = max((RowLayout(group.tier_bits, plan.tier_size) for group in plan.groups), key=lambda one: one.rank)
    heads, queries, dim = config.num_key_value_heads, config.num_attention_heads, config.hidden_size // 32
    small = {"num_hidden_layers": 1, "vocab_size": 8, "intermediate_size": 8, "bos_token_id": 1, "eos_token_id": 2}
    rope = rope_of(AutoModelForCausalLM.from_config(type(config)(**{**config.to_dict(), **small})), ROPE)
    bucket = bucket_length(rope, dim)
    assert rope is not None and bucket == 64
    codec = SimpleNamespace(decoder=torch.zeros(1, 2 * heads * dim, layout.rank), mean=torch.zeros(1, 2 * heads * dim))
    data = torch.zeros(1, count, layout.row_bytes, dtype=torch.uint8)
    turns = Turns.of(rope(torch.arange(count)[None]))
    buckets = Buckets(bucket, turns.means(bucket, [0]), [0])
    rows = LatentRows(data, layout, codec, torch.tensor([4]), 4, turns, buckets=buckets)
    query, exact = torch.zeros(1, heads, queries // heads, dim), torch.zeros(1, 2 * heads, 4, dim)
    with FlopCounterMode(display=False) as counter:
        how = {"scaling": 0.1, "turned": True, "most": rows_in_full(count)}
        rows.attended(query, exact, torch.zeros(1, 1, 4), 0, **how)
    per_token = counter.get_total_flops() / count
    best = rows_in_full(count)
    assert best is not None
    judged = attention_clla.judging_rank(layout)
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from time_model import Reading

    model = Reading(1, count, layout.rank, layout.row_bytes, judged, best, queries, heads, dim, bucket, 6)
    assert per_token == pytest.approx(model.operations, rel=0.15)
    assert 0.3e6 < per_token < 1.0e6
    assert 2 * heads * dim * layout.rank > 10 * per_token
