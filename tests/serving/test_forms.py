"""Every form of a converted checkpoint answers in the engine what it answers in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clla.modeling.quantize_clla import layout_of

from .conftest import FORMS, Run, greedy, greedy_of_source, prompt, saved

LENGTHS = (40, 133, 77, 260, 21, 300)
SHARED = 128


@pytest.mark.parametrize("form", [form for form in FORMS if form != "group"])
def test_tokens_and_pages(form: str, tmp_path: Path, run_engine: Run) -> None:
    """Many prompts at once, then two that share their beginning; without a window also cut into pieces."""
    model = saved(tmp_path, FORMS[form]())
    spec = model.config.spec
    prompts = [[prompt(length, seed) for seed, length in enumerate(LENGTHS)]]
    prompts += [[prompt(length, seed, shared=SHARED)] for seed, length in ((1, 150), (2, 230))]
    engine: dict[str, Any] = {"model": str(tmp_path), "max_model_len": 512}
    if not spec.window:
        engine["max_num_batched_tokens"] = 64  # where cuts make no difference
    found = run_engine(engine, prompts, own_process=False, pages=True)

    many, (first,), (second,) = found["rounds"]
    want = [greedy(model, ids) for ids in prompts[0]]
    assert [answer["tokens"] for answer in many] == want
    assert want != [greedy_of_source(model, ids) for ids in prompts[0]]  # else latents were not read
    block = found["pages"]["groups"][-1]["block"]
    assert first["cached"] == 0 and second["cached"] == SHARED // block * block  # whole blocks of latents
    cuts = (second["cached"],) if spec.window and second["cached"] else ()
    assert first["tokens"] == greedy(model, prompts[1][0])
    assert second["tokens"] == greedy(model, prompts[2][0], cuts=cuts)

    *windows, latents = found["pages"]["groups"]
    row = sum(layout_of(group).row_bytes for group in spec.groups)
    assert latents["kind"] == "FullAttentionSpec" and latents["page"] == latents["block"] * row
    assert found["pages"]["bytes"] == found["pages"]["blocks"] * latents["page"]
    exact = model.config.text_config.num_hidden_layers if spec.window or spec.sinks else 0
    assert sum(group["layers"] for group in windows) == exact
    if not exact:  # a token costs its latents and nothing else, and the engine says so
        assert f"KV cache size: {found['pages']['bytes'] // row:,} tokens" in found["log"]


def test_decoupled_keys_on_two_ranks(tmp_path: Path, run_engine: Run) -> None:
    model = saved(tmp_path, FORMS["decoupled"]())
    prompts = [prompt(length, seed) for seed, length in enumerate((40, 133, 300))]
    found = run_engine(
        {"model": str(tmp_path), "max_model_len": 512, "tensor_parallel_size": 2}, [prompts], own_process=False
    )
    assert [answer["tokens"] for answer in found["rounds"][0]] == [greedy(model, ids) for ids in prompts]
