"""The model card."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from clla.artifacts import KVShape, LayerGroup, Plan
from clla.card import write_card
from clla.evaluate.report import Report
from clla.recipe import Recipe

PLAN = Plan(
    groups=(LayerGroup((0, 1), (4, 2)),),
    kv=KVShape(2, 16),
    kv_itemsize=2,
    tier_size=8,
    window=16,
    sinks=4,
    flush_block=16,
    source="group",
    budget_bytes=20.0,
    at_context=4096,
    made_from="test",
)


def test_card_names_base_model_tags_and_figures(tmp_path: Path) -> None:
    quality = {
        "source": {"perplexity": 10.0, "bytes_per_token": 256.0},
        "converted": {"perplexity": 10.1, "kl": 0.01, "bytes_per_token": 20.0},
    }
    report = Report(quality=quality, context=2048, windows=2, chunk=16)
    write_card(tmp_path, "maker/model-1b", PLAN, Recipe(), report, tokens=1000)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "maker/model-1b" and card.data.base_model_relation == "quantized"
    assert {"clla", "kv-cache-compression"} <= set(card.data.tags)
    assert "10.100" in card.text and "256" in card.text
    write_card(tmp_path, str(tmp_path), PLAN, Recipe(), None, tokens=1000)
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None
