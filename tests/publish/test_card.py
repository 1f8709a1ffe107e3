"""The model card: what it says is in the report, its code runs, the Hub reads its metadata."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import byte_tokenizer, pico
from helpers import clla, tokens
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from clla.artifacts.plan import Plan
from clla.errors import CllaError
from clla.modeling.cache_clla import kept_tensors
from clla.modeling.hooks_clla import CACHE
from clla.publish.card import render, retargeted
from clla.publish.card_sections import text_of
from clla.publish.origin import origin_of
from clla.source.model import open_source
from clla.storage.files import read_json

SMALL = ["--calibration-tokens", 2048, "--sequence-length", 128, "--exact-window", 8, "--kv-budget", "25%"]
REVISION = "0123456789abcdef0123456789abcdef01234567"
FRONT = {"license": "other", "license_name": "pico-licence", "license_link": "LICENSE", "language": ["en", False]}


def convert(model: object, folder: Path, text: Path, *options: object) -> Path:
    done = clla("convert", model, "-o", folder, "--dataset", text, *SMALL, "--budget-context", 512, *options)
    assert done.exit_code == 0, done.output + done.stderr
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico with a card and a chat template."""
    folder = tmp_path_factory.mktemp("card") / "pico-chat"
    pico().save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(FRONT)}---\n# Pico\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def measured(source: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted from a directory, and measured."""
    return convert(source, tmp_path_factory.mktemp("card") / "measured", text_file)


@pytest.fixture(scope="module")
def healed(measured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "healed"
    options = ["--tokens", 2048, "--sequence-length", 128, "--batch-tokens", 512, "--train", "all"]
    done = clla("heal", measured, "-o", folder, *options)
    assert done.exit_code == 0, done.output + done.stderr
    return folder


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def figures(data: Any) -> set[str]:
    """Numbers of a report in the ways that a card writes them, and those within its strings."""
    if isinstance(data, dict):
        return set().union(*(figures(part) for pair in data.items() for part in pair))
    if isinstance(data, list):
        return set().union(*map(figures, data))
    if isinstance(data, str):
        return set(re.findall(r"\d[\d,.]*\d|\d", data)) | ({f"{int(data):,}"} if data.isdecimal() else set())
    if isinstance(data, bool) or data is None:
        return set()
    return {f"{data:,.0f}", f"{data:.3f}", f"{data:.4f}", f"{100 * data:.0f}"}


def planned_figures(report: dict[str, Any]) -> set[str]:
    """What follows from the plan, by the formulas of docs/how-it-works.md."""
    plan, longest = report["plan"], report["origin"]["longest_context"]
    made = Plan.from_json(plan)
    source, row, window, block = made.source_bytes_per_token, made.row_bytes, plan["window"], plan["flush_block"]
    found = {f"{source:,}", f"{row:,}", f"{100 * row / source:.2f}", str(window + block), f"{made.break_even:,}"}
    found.add(f"{(window + block + plan['sinks']) * source:,}")
    if plan["source"] == "group":  # encoder and decoder [n·G, r] each, and two means, in the cache's dtype
        n, item = 2 * made.kv.num_key_value_heads * made.kv.head_dim, made.kv_itemsize
        ranks = [(len(g["layers"]) * n, len(g["tier_bits"]) * plan["tier_size"]) for g in plan["groups"]]
        weights = sum(2 * width * rank + 2 * width for width, rank in ranks) * item
        found |= {f"{weights / 1e6:,.1f}", f"{made.break_even_beside(weights):,}"}
    contexts = {c for c in (2048, 8192, 32768) if c <= longest} | {longest}
    contexts |= {int(c) for c in (report["measured"] or {"cache": {"by_context": {}}})["cache"]["by_context"]}
    for context in contexts:
        rows = (context - window) // block * block
        kept = made.kept_bytes_at(context)
        planned = ((window + block + plan["sinks"]) * source + rows * row + kept) / context
        whole = source + kept / context
        found |= {f"{context:,}", f"{planned:,.0f}", f"{whole:,.0f}", f"{100 * planned / whole:.2f}"}
    for group in plan["groups"]:
        layout = Plan.from_json({**plan, "groups": [group]})
        share = group["predicted_loss"] / sum(other["predicted_loss"] for other in plan["groups"])
        found |= {f"{layout.row_bytes:,}", f"{100 * share:.1f}", f"{len(group['tier_bits']) * plan['tier_size']:,}"}
        found |= {str(group["tier_bits"].count(b) * plan["tier_size"]) for b in group["tier_bits"]}
    found.add(str(len(plan["groups"])))
    if report["measured"]:
        base = report["measured"]["source"]["perplexity"]
        before = (report["healing"] or {}).get("before") or {}
        for row in (*report["measured"].values(), *before.values()):
            if isinstance(row, dict) and "perplexity" in row:
                share = row["bytes_per_token"] / report["measured"]["source"]["bytes_per_token"]
                found |= {
                    f"{row['perplexity'] / base:.4f}",
                    f"{100 * share:.1f}",
                    f"{abs(100 * (row['perplexity'] / base - 1)):.2f}",
                }
    return found


def check_figures(folder: Path) -> None:
    """Every number of the card's text is in the report, or follows from its plan."""
    report = read_json(folder / "clla_report.json")
    known = figures(report) | planned_figures(report) | {"2410.15252"}
    text = without_code(card_of(folder).text)
    text = re.sub(r"\]\([^)]*\)|`[^`]*`", "", text)  # addresses and names
    said = re.findall(r"\d[\d,.]*\d|\d", text)
    assert len(said) > 20
    assert not [number for number in said if number not in known]


def check_no_path(folder: Path, *paths: Path) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert not [path for path in (folder, *paths) if str(path) in text or str(path.parent) in text]


@pytest.mark.slow
def test_a_conversion_from_a_directory(measured: Path, source: Path, text_file: Path) -> None:
    card = card_of(measured)
    assert card.data.base_model is None and "base_model_relation" not in card.data
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "pico-licence", None)
    assert card.data.language == ["en", "no"]
    assert card.data.tags == ["clla", "kv-cache-compression"] and card.data.library_name == "transformers"
    assert card.data.datasets is None and card.data.eval_results is None
    report = read_json(measured / "clla_report.json")
    assert f"{report['measured']['converted']['perplexity']:.3f}" in card.text
    assert text_file.name in card.text and "![" in card.text and "No licence" not in card.text
    check_figures(measured)
    check_no_path(measured, source, text_file)


@pytest.mark.slow
def test_a_healed_checkpoint_shows_before_and_after(healed: Path, measured: Path) -> None:
    card, report = card_of(healed), read_json(healed / "clla_report.json")
    assert report["healing"]["verdict"] in card.text and "clla_healing.png" in card.text
    for row in (report["healing"]["before"]["converted"], report["measured"]["converted"]):
        assert f"{row['perplexity']:.3f}" in card.text
    assert report["measured"]["retrieval"] and "planted in the text" in card.text
    assert report["origin"] == read_json(measured / "clla_report.json")["origin"] and card.data.license == "other"
    assert 'from_pretrained("healed"' in card.text and "trained briefly" in card.text
    check_figures(healed)
    check_no_path(healed, measured)


@pytest.mark.slow
def test_the_code_of_the_card_runs_without_clla(
    measured: Path, source: Path, pico_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """Of a chat model, of one without a template, and of a codec alone: in one process, from the folder above."""
    plain = convert(pico_dir, tmp_path / "plain", text_file, "--no-eval")
    adapter = convert(source, tmp_path / "adapter", text_file, "--no-eval", "--codec-only")
    script = "import os, sys\nsys.modules['clla'] = None  # any import of it fails\n"
    for folder in (measured, plain, adapter):
        text = card_of(folder).text
        assert ("apply_chat_template" in text) == (folder != plain)
        assert ("codec alone" in text and "base_model.path" in text) == (folder == adapter)
        code = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)
        assert code is not None
        script += f"os.chdir({str(folder.parent)!r})\n{code[1]}print('<end>')\n"
    own = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=own)
    assert done.returncode == 0, done.stderr[-3000:]
    prompts = ["Why is the sky blue?", "The cache of a language model is", "Why is the sky blue?"]
    for said, prompt in zip(done.stdout.split("<end>\n"), prompts, strict=False):
        assert said.startswith(prompt) and len(said) > len(prompt) + 1
    assert done.stdout.count("<end>") == 3


def test_without_a_report_nothing_is_claimed(pico_dir: Path, text_file: Path, tmp_path: Path) -> None:
    folder = convert(pico_dir, tmp_path / "bare", text_file, "--no-eval")
    card = card_of(folder)
    assert "clla eval bare" in card.text and "perplexity" not in card.text.lower()
    assert "No licence was found" in card.text and card.data.license is None and card.data.language is None
    check_figures(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, words",
    [
        ("qwen2-sliding", "bounded by a window of 24 tokens"),
        ("bamba", "bounded by a state of {state:,} bytes; it is counted"),
    ],
)
def test_kept_layers_are_told(family: str, words: str, text_file: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    pico(family).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    folder = convert(model, tmp_path / "out", text_file)
    assert words.format(state=state_bytes(pico(family))) in card_of(folder).text
    check_figures(folder)


def state_bytes(model: PreTrainedModel) -> int:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(1, 9), use_cache=True, **{CACHE: cache})
    found = [part for layer in cache.layers for part in kept_tensors(layer)]
    return sum(state.nbytes for name, state in found if name.endswith("_states"))


def test_a_source_from_the_hub_is_named_and_its_licence_carried_over(
    source: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it lies in the cache of the Hub's client, without a network."""
    place = tmp_path / "hub" / "models--maker--pico-1b"
    shutil.copytree(source, place / "snapshots" / REVISION)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(REVISION)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = convert("maker/pico-1b", tmp_path / "out", text_file, "--no-eval", "--codec-only")
    card = card_of(folder)
    assert card.data.base_model == "maker/pico-1b" and card.data.base_model_relation == "quantized"
    assert card.data.license_link == "https://huggingface.co/maker/pico-1b/blob/main/LICENSE"
    assert read_json(folder / "config.json")["base_model"]["hub_revision"] == REVISION
    assert AutoModelForCausalLM.from_pretrained(folder).generate(tokens(1, 20), max_new_tokens=4).shape[1] > 20
    assert "[maker/pico-1b](https://huggingface.co/maker/pico-1b)" in card.text
    (place / "snapshots" / REVISION / "README.md").unlink()
    assert origin_of(open_source("maker/pico-1b")).license is None


@pytest.mark.slow
def test_results_on_a_hub_data_set_come_back_from_the_metadata(healed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    report = read_json(healed / "clla_report.json")
    report["recipe"]["calibration"]["dataset"] = "maker/texts:validation"
    report["healing"]["config"]["dataset"] = "maker/other"
    report["origin"]["hub_id"] = "maker/pico-1b"
    report["measured"] |= {"text": "maker/texts:validation", "unseen": True}
    (folder / "config.json").write_text("{}")
    (folder / "clla_report.json").write_text(json.dumps(report))
    data = ModelCard(render(folder, "me/pico")).data
    assert data.datasets == ["maker/texts", "maker/other"] and data.base_model_relation == "finetune"
    own, base = data.eval_results
    for result, name in ((own, "converted"), (base, "source")):
        assert (result.dataset_type, result.dataset_split) == ("maker/texts", "validation")
        assert result.metric_type == "perplexity"
        assert result.metric_value == report["measured"][name]["perplexity"]
    measured = report["measured"]
    assert own.dataset_args == {
        "samples": measured["windows"],
        "context": measured["context"],
        "chunk": measured["chunk"],
    }
    report["measured"]["unseen"] = False
    (folder / "clla_report.json").write_text(json.dumps(report))
    card = ModelCard(render(folder, "me/pico"))
    assert card.data.eval_results is None and "calibration had read too" in card.text


@pytest.mark.slow
def test_another_place_is_named_and_edits_stay(measured: Path) -> None:
    before = (measured / "README.md").read_text() + '\nmeasured by me, "measured" twice; see measured-not.\n'
    after = retargeted(before, "me/pico-clla")
    for line in ('AutoModelForCausalLM.from_pretrained("me/pico-clla"', 'AutoTokenizer.from_pretrained("me/pico-clla"'):
        assert line in after
    assert "vllm serve me/pico-clla\n" in after and 'measured by me, "measured" twice; see measured-not.' in after
    assert retargeted(after, "measured") == before
    assert retargeted("# My own card\n", "me/pico-clla") == "# My own card\n"


@pytest.mark.slow
def test_the_command_prints_or_writes(measured: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(measured, tmp_path / "measured")
    done = clla("card", folder)
    assert done.exit_code == 0 and done.stdout == (measured / "README.md").read_text()
    (folder / "README.md").write_text("spoilt")
    assert clla("card", folder, "--write", "--repo-id", "me/it").exit_code == 0
    assert (folder / "README.md").read_text() == render(measured, "me/it")
    refused = clla("card", tmp_path)
    assert refused.exit_code == 1 and "clla_report.json" in refused.stderr
    (folder / "clla_report.json").write_text('{"plan": 1}')
    with pytest.raises(CllaError, match="no valid report"):
        render(folder, "x")


@pytest.mark.slow
def test_a_report_of_an_earlier_version_gives_a_card(measured: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(measured, tmp_path / "measured")
    report = read_json(folder / "clla_report.json")
    del report["origin"], report["calibration_tokens"], report["measured"]["text"]
    (folder / "clla_report.json").write_text(json.dumps(report))
    text = render(folder, "x")
    assert text.startswith("---\n") and "pico-chat" in text and str(folder.parent) not in text


def test_texts_are_named_without_their_place() -> None:
    assert text_of("/home/someone/private/notes.txt") == "a local file, `notes.txt`"
    assert text_of("~/x/notes.jsonl.xz").endswith("`notes.jsonl.xz`")
    assert "huggingface.co/datasets/maker/texts" in text_of("maker/texts:test") and "`test`" in text_of(
        "maker/texts:test"
    )
    assert "/" not in text_of("bundled").replace("`clla`", "") and "itself" in text_of("self")
