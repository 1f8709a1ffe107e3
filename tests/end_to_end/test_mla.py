"""Recipe `mla` from the command line: conversion, healing, evaluation, export; and its parallel student."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import pico, pico_config, pico_of
from helpers import clla, stats_of, strict_of, tokens
from transformers import PreTrainedModel

from clla.artifacts.stats import Stats
from clla.calibrate.lossless import RawLayout
from clla.heal.attention import view_of
from clla.heal.steps import component_sizes
from clla.heal.student import Distiller, make_student
from clla.heal.targets import group_error, record_targets
from clla.heal.train import enable_checkpointing
from clla.modeling.modeling_clla import CllaForCausalLM

FEW = ["--calibration-tokens", 2048, "--sequence-length", 128, "--device", "cpu"]
SMALL = [
    "--tokens",
    16384,
    "--sequence-length",
    128,
    "--batch-tokens",
    512,
    "--codec-lr",
    "5e-4",
    "--weight-lr",
    "5e-5",
]


@lru_cache(maxsize=8)
def source_and_stats(family: str) -> tuple[PreTrainedModel, Stats]:
    model = pico(family)
    return model, stats_of(model, with_queries=True)


def lossy(family: str = "llama") -> CllaForCausalLM:
    model, stats = source_and_stats(family)
    return strict_of(model, stats, groups=((0, 1), (2, 3)), components=16, bits=4, rope_bits=6, rank=48)[0]


def distiller_of(model: CllaForCausalLM, what: str = "codec") -> Distiller:
    return Distiller(model.source, make_student(model, what))


# --- the student ---


@pytest.mark.parametrize("family", ["llama", "llama-mha", "cohere", "smollm3", "qwen3", "llama-yarn"])
def test_parallel_student_is_the_converted_model(family: str) -> None:
    model, ids = lossy(family), tokens(2, 60)
    distiller = distiller_of(model)
    view = view_of(60, window=0, flush_block=4, sinks=0, chunk=1)
    with torch.no_grad():
        expected, lossless = model(ids).logits, model.source(ids).logits
        found = distiller.student_head(distiller.run_student(ids, {}, view))
    distiller.release()
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    assert (expected - lossless).abs().max() > 0.03


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_tensor_that_is_read(checkpointing: bool) -> None:
    distiller = distiller_of(lossy(), "all")
    if checkpointing:
        enable_checkpointing(distiller.student.source)
        distiller.student.source.train()
    distiller(tokens(2, 60), view=view_of(60, window=0, flush_block=4, sinks=0, chunk=1)).backward()
    distiller.release()
    for name, parameter in distiller.student.named_parameters():
        assert parameter.grad is not None, name
        unread = "k_proj" in name or "v_proj" in name
        assert (float(parameter.grad.abs().max()) > 0) != unread, name
        if name.endswith(".mean"):  # a constant in every key changes nothing
            assert parameter.grad[:, :32].abs().max() < 1e-6 < parameter.grad[:, 32:].abs().max()


def test_steps_are_relative_for_rotary_keys_too() -> None:
    distiller = distiller_of(lossy())
    sizes = {id(tensor): size for tensor, size in component_sizes(distiller)}
    group: Any = distiller.groups[0].codec
    torch.testing.assert_close(sizes[id(group.rope_encoder)][:, 0], group.rope_encoder.square().mean(1).sqrt())
    answers = group.rope_query
    torch.testing.assert_close(sizes[id(answers)][0, 0, :, 0], answers.square().mean((0, 1, 3)).sqrt())


def test_stage_one_sees_the_same_attention() -> None:
    """With everything kept the attention outputs are the source's; with little they are not."""
    model, stats = source_and_stats("llama")
    errors = []
    for converted in (strict_of(model, stats)[0], lossy()):
        distiller, ids = distiller_of(converted), tokens(2, 40)
        targets = record_targets(distiller, ids)
        view = view_of(40, window=0, flush_block=4, sinks=0, chunk=1)
        group = distiller.groups[0]
        error = group_error(group, targets, distiller.rotation(ids), view, first=True)
        errors.append(float(error.detach()))
    assert errors[0] < 1e-6 and errors[1] > 1e-3


# --- the command line ---


@pytest.fixture(scope="module")
def converted(pico_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("strict") / "out"
    done = clla("convert", pico_dir, "-o", folder, "--recipe", "mla", "--dataset", text_file, *FEW,
                "--kv-budget", "6%", "--no-eval")  # fmt: skip
    assert done.exit_code == 0, done.output + done.stderr
    return folder, done


def test_converting_says_that_healing_is_needed(converted: tuple[Path, Any]) -> None:
    folder, done = converted
    said = " ".join(done.stderr.split())
    assert "NEED HEALING" in said and "clla heal" in said and "--heal" in said
    assert "of no use before" in (folder / "README.md").read_text()
    config = json.loads((folder / "config.json").read_text())["clla"]
    assert config["window"] == config["sinks"] == 0 and config["rope_bits"] == 6
    assert all(len(group["rope_pairs"]) == 8 for group in config["groups"])  # a head of 16


@pytest.mark.slow
def test_healing_and_measuring(converted: tuple[Path, Any], text_file: Path, tmp_path: Path) -> None:
    folder, _ = converted
    out = tmp_path / "healed"
    done = clla("heal", folder, "-o", out, *SMALL, "--no-eval", "--json", "--device", "cpu")
    assert done.exit_code == 0, done.output + done.stderr
    told = json.loads(done.stdout)["healing"]
    assert told["config"]["train"] == "all"  # whatever the budget
    assert told["history"][-1]["held_out"] < told["history"][0]["held_out"]
    assert "of no use before" not in (out / "README.md").read_text()
    options = ["--text", text_file, "--num-samples", 1, "--sequence-length", 128, "--contexts", "128", "--no-retrieval"]
    found = json.loads(clla("eval", out, *options, "--json").stdout)
    cache = found["cache"]["by_context"]["128"]
    assert cache["bytes_per_token"] == pytest.approx(cache["planned_bytes_per_token"], abs=0.5)
    before = json.loads(clla("eval", folder, *options, "--json").stdout)["converted"]["kl"]
    assert found["converted"]["kl"] < 1.2 * before  # a few steps on other windows; held out it falls (above)


def test_convert_heals_at_once(pico_dir: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"budget: {{kv_budget: 12%, exact_window: 0, num_sinks: 0}}\n"
        f"calibration: {{dataset: {text_file}, tokens: 2048, sequence_length: 128}}\n"
        f"plan: {{latent_input: first_layer, key: decoupled}}\n"
        f"heal: {{sequence_length: 128, batch_tokens: 512, tokens: 2048, codec_share: 0.25}}\n"
    )
    done = clla("convert", pico_dir, "-o", tmp_path / "out", "--recipe", recipe, "--json", "--no-eval")
    assert done.exit_code == 0, done.output + done.stderr
    told = json.loads(done.stdout)
    assert told["needs_healing"] is False and told["healing"]["history"][-1]["tokens"] == 2048
    assert "NEED HEALING" not in done.stderr


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--exact-window", "64"], "budget.exact_window 64"),
        (["--num-sinks", "4"], "budget.num_sinks 4"),
        (["--latent-input", "all_layers"], "plan.latent_input 'all_layers'"),
        (["--kv-budget", "1%"], "rotary keys"),
    ],
)
def test_what_a_decoupled_key_cannot_have_is_refused(
    pico_dir: Path, text_file: Path, tmp_path: Path, options: list[str], word: str
) -> None:
    done = clla("convert", pico_dir, "-o", tmp_path / "out", "--recipe", "mla", "--dataset", text_file, *FEW, *options)
    assert done.exit_code == 2 and word in " ".join(done.stderr.split()), done.stderr
    assert not (tmp_path / "out").exists()


def test_dry_runs_show_rotary_keys(pico_dir: Path, text_file: Path, tmp_path: Path) -> None:
    done = clla("convert", pico_dir, "-o", tmp_path / "out", "--recipe", "mla", "--dataset", text_file, *FEW,
                "--kv-budget", "30%", "--dry-run")  # fmt: skip
    assert done.exit_code == 0 and "rotary keys" in done.stdout and "NEED HEALING" not in done.stderr


# --- export ---


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama pico with heads of 64, tied embeddings and another epsilon."""
    from conftest import byte_tokenizer

    folder = tmp_path_factory.mktemp("wide") / "pico"
    model = pico_of(pico_config("llama", head_dim=64, tie_word_embeddings=True, rms_norm_eps=1e-5))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_exported_models_run_as_deepseek_v3(wide_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """Their logits are those of the strict model on its latents as they are, from a directory without code of ours."""
    from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

    strict, out, recipe = tmp_path / "strict", tmp_path / "exported", tmp_path / "recipe.yaml"
    recipe.write_text(
        f"budget: {{kv_budget: 100%, exact_window: 0, num_sinks: 0}}\n"
        f"calibration: {{dataset: {text_file}, tokens: 2048, sequence_length: 128}}\n"
        f"plan: {{latent_input: first_layer, key: decoupled, layout: deepseek, max_layers_per_group: 1, bits: [16], "
        f"rope_bits: 16}}\n"
    )
    done = clla("convert", wide_dir, "-o", strict, "--recipe", recipe, "--no-eval", "--dtype", "float32")
    assert done.exit_code == 0, done.output + done.stderr
    done = clla("export", strict, "--format", "deepseek", "-o", out, "--json")
    assert done.exit_code == 0, done.output + done.stderr
    told = json.loads(done.stdout)
    assert told["kl_to_checkpoint"] < 1e-6 and told["healed"] is False
    exported = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert type(exported) is DeepseekV3ForCausalLM
    config = exported.config
    assert (config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim) == (
        512,
        64,
        64,
        128,
    )
    assert config.rms_norm_eps == 1e-6 and not config.tie_word_embeddings
    ids = tokens(2, 60)
    with torch.no_grad():
        model = CllaForCausalLM.from_pretrained(strict, dtype=torch.float32).eval()
        cache, found = model.new_cache(), exported(ids).logits
        for group in cache.groups:
            group.layout = RawLayout(*(part.rank for part in group.layout.parts))
        expected, stored = model(ids, past_key_values=cache).logits, model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, stored, rtol=0.2, atol=0.2)  # 16 bits, of latents that calibration did not see
    assert expected.std() > 0.1
    assert exported.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (2, 64)
    again = clla("export", strict, "-o", out)
    assert again.exit_code == 2 and "--overwrite" in again.stderr
    assert clla("export", strict, "-o", out, "--overwrite").exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("rank", [32, 64])
def test_exported_weights_give_the_same_logits(heads: int, rank: int) -> None:
    from clla.export.deepseek import as_deepseek, check_expressible
    from clla.export.write import WRONG, difference

    model = pico_of(pico_config("llama", head_dim=64, num_key_value_heads=heads, rms_norm_eps=1e-4))
    stats = stats_of(model, band=1, with_queries=True)
    converted, plan = strict_of(model, stats, components=64, rank=rank, layout=True)
    check_expressible(converted, plan)
    exported, ids = as_deepseek(converted, torch.float32), tokens(2, 70)
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, converted(ids).logits, rtol=1e-3, atol=1e-3)
        assert (converted(ids).logits - model(ids).logits).abs().max() > 0.05
    assert difference(converted, exported) < WRONG  # few queries or many: as many as heads are wide are absorbed


def test_what_deepseek_cannot_express_is_refused(converted: tuple[Path, Any], checkpoint: Path, tmp_path: Path) -> None:
    """Every reason at once, with what helps."""
    said = " ".join(clla("export", converted[0], "-o", tmp_path / "out").stderr.split())
    for reason in ("latents have an offset", "not 64 components", "--recipe deepseek"):
        assert reason in said
    refused = clla("export", checkpoint, "-o", tmp_path / "out")
    assert refused.exit_code == 1 and "decoded whole" in refused.stderr
    unknown = clla("export", checkpoint, "-o", tmp_path / "out", "--format", "gguf")
    assert unknown.exit_code == 2 and "deepseek" in unknown.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "word"),
    [("llama-llama3", "scaled (llama3)"), ("llama-mha", "biases"), ("qwen3", "'qwen3'"), ("qwen2", "'qwen2'")],
)
def test_models_that_deepseek_is_not_are_refused(family: str, word: str) -> None:
    from clla.errors import CllaError
    from clla.export.deepseek import check_expressible

    model, stats = source_and_stats(family)
    converted, plan = strict_of(model, stats, groups=((0, 1), (2,), (3,)), components=16)
    with pytest.raises(CllaError) as error:
        check_expressible(converted, plan)
    assert word in error.value.got and "layers share latents" in error.value.got


def test_deepseek_layouts_are_of_single_layers(pico_dir: Path, text_file: Path, tmp_path: Path) -> None:
    options = ["--dataset", text_file, *FEW, "-o", tmp_path / "out"]
    refused = clla("convert", pico_dir, "--recipe", "deepseek", "--max-layers-per-group", 2, *options)
    assert refused.exit_code == 2 and "--max-layers-per-group 1" in refused.stderr
    narrow = clla("convert", pico_dir, "--recipe", "deepseek", *options)
    assert narrow.exit_code == 2 and "qk_rope_head_dim" in narrow.stderr  # heads of 16 have 8 frequencies, not 32
