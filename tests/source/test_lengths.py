"""How many tokens a model takes: defaults keep to it, what is asked for beyond it is refused or told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, pico_config, pico_of
from helpers import clla, converted_of, plan_of, stats_of, tokens
from transformers import PreTrainedModel

from clla.errors import UnsupportedModelError, UsageError
from clla.modeling.modeling_clla import CllaForCausalLM
from clla.source.lengths import Reach, reach_of

OPT = {"ffn_dim": 96, "word_embed_proj_dim": 64, "do_layer_norm_before": True}
POSITIONS = 160  # of the models below: enough for a planted code of bytes, and less than any default
NO_SIZES = ("num_key_value_heads", "max_position_embeddings")


def gpt2(positions: int = POSITIONS) -> PreTrainedModel:
    return pico_of(pico_config("gpt2", n_positions=positions, without=NO_SIZES))


@pytest.mark.parametrize(
    ("config", "reach"),
    [
        (lambda: pico_config("gpt2", n_positions=256, without=NO_SIZES), Reach(256, 256)),
        (lambda: pico_config("opt", **OPT, max_position_embeddings=96), Reach(96, 96)),  # the table has two more
        (lambda: pico_config("biogpt", max_position_embeddings=96), Reach(96, 96)),
        (lambda: pico_config("gpt_bigcode", n_positions=96, without=NO_SIZES), Reach(96, 96)),
        (lambda: pico_config("mpt", max_seq_len=96, without=NO_SIZES), Reach(96, None)),  # a table of biases
        (lambda: pico_config("bloom"), Reach(None, None)),
        (lambda: pico_config("falcon", alibi=True), Reach(None, None)),
        (lambda: pico_config("falcon", alibi=False, max_position_embeddings=96), Reach(None, 96)),
        (lambda: pico_config("xglm", ffn_dim=96, max_position_embeddings=96), Reach(None, 96)),  # sinusoidal
        (lambda: pico_config("llama", max_position_embeddings=96), Reach(None, 96)),
        (lambda: pico_config("mistral", sliding_window=24, max_position_embeddings=96), Reach(None, 96)),
    ],
)
def test_reach_of_a_config(config: Any, reach: Reach) -> None:
    assert reach_of(config()) == reach


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_bigcode", "mpt"])
def test_one_position_more_is_an_error_of_the_source(kind: str) -> None:
    """So the limit is neither too low nor too high."""
    extra = {"mpt": {"max_seq_len": 48}, "opt": {**OPT, "max_position_embeddings": 48}}.get(kind, {"n_positions": 48})
    without = ("num_key_value_heads",) if kind == "opt" else NO_SIZES
    model = pico_of(pico_config(kind, **extra, without=without))
    assert reach_of(model.config).positions == 48
    model(tokens(1, 48))
    with pytest.raises((IndexError, RuntimeError)):
        model(tokens(1, 49))


def test_fit_and_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert Reach().fit(2048) == 2048 and Reach(None, 256).fit(2048) == 256 and Reach(100, 256).fit(2048) == 100
    assert Reach(100, 100).fit(2048, new_tokens=30) == 70 and Reach(100, 100).fit(2048, new_tokens=300) == 1
    Reach(100, 100).check_option("--context", 100)
    Reach(100, 100).check_option("--context", None)
    Reach().check_option("--context", 10**9)
    assert capsys.readouterr().err == ""
    with pytest.raises(UsageError, match=r"--context 101\. at most 100 tokens, for which .* lower --context"):
        Reach(100, 100).check_option("--context", 101)
    Reach(None, 100).check_option("--context", 101)
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("Warning: --context 101: beyond the 100 positions")


@pytest.fixture(scope="module")
def short() -> CllaForCausalLM:
    model = gpt2(64)
    stats = stats_of(model)
    return converted_of(model, plan_of(stats, model), stats)


@torch.no_grad()
def test_the_model_says_what_it_has_no_positions_for(short: CllaForCausalLM) -> None:
    """Before anything runs: what was cached stays usable."""
    model: Any = short
    cache = model.new_cache()
    model(tokens(1, 60), past_key_values=cache)
    with pytest.raises(ValueError, match=r"66 tokens, .* the 64 that this model has positions for"):
        model(tokens(1, 6), past_key_values=cache)
    rest = model(tokens(1, 64)[:, 60:], past_key_values=cache).logits
    torch.testing.assert_close(rest, model(torch.cat((tokens(1, 60), tokens(1, 64)[:, 60:]), 1)).logits[:, 60:])
    for more in ({"max_new_tokens": 5}, {"max_length": 65}, {"max_new_tokens": 5, "use_cache": False}):
        with pytest.raises(ValueError, match="65 tokens"):
            model.generate(tokens(1, 60), **more)
    assert model.generate(tokens(1, 60), max_new_tokens=4, eos_token_id=None).shape == (1, 64)


@torch.no_grad()
def test_padding_takes_no_position(short: CllaForCausalLM) -> None:
    model: Any = short
    ids, mask = torch.cat((torch.full((1, 20), 258), tokens(1, 50)), 1), torch.ones(1, 70, dtype=torch.long)
    mask[:, :20] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = model(ids, attention_mask=mask, position_ids=positions).logits[:, 20:]
    torch.testing.assert_close(found, model(tokens(1, 50)).logits, rtol=1e-4, atol=1e-4)
    answer = model.generate(ids, attention_mask=mask, max_new_tokens=14, eos_token_id=None, pad_token_id=258)
    assert answer.shape == (1, 84)
    with pytest.raises(ValueError, match="65 tokens"):
        model.generate(ids, attention_mask=mask, max_new_tokens=15, eos_token_id=None, pad_token_id=258)


@torch.no_grad()
def test_padding_takes_a_position_in_a_table_of_biases() -> None:
    source = pico_of(pico_config("mpt", max_seq_len=64, without=NO_SIZES))
    stats = stats_of(source)
    model: Any = converted_of(source, plan_of(stats, source), stats)
    ids, mask = torch.cat((torch.full((1, 20), 258), tokens(1, 40)), 1), torch.ones(1, 60, dtype=torch.long)
    mask[:, :20] = 0
    assert model.generate(ids, attention_mask=mask, max_new_tokens=4, eos_token_id=None).shape == (1, 64)
    with pytest.raises(ValueError, match="65 tokens"):
        model.generate(ids, attention_mask=mask, max_new_tokens=5, eos_token_id=None)
    with pytest.raises(ValueError, match="65 tokens"):
        model(tokens(1, 65), position_ids=torch.arange(65)[None].clamp(max=40))


def test_models_for_less_than_a_sequence_are_refused() -> None:
    assert Reach(40, 40).fit_sequence(1024, 32) == 40 and Reach().fit_sequence(1024, 32) == 1024
    with pytest.raises(UnsupportedModelError, match=r"takes 16 tokens.* at least 32"):
        Reach(None, 16).fit_sequence(1024, 32)


@pytest.fixture(scope="module")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lengths") / "gpt2"
    gpt2().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(gpt2_dir: Path) -> Path:
    """With every length by default."""
    out = gpt2_dir.with_name("converted")
    options = ["--calibration-tokens", 640, "--kv-budget", "50%", "--exact-window", 32]
    done = clla("convert", gpt2_dir, "-o", out, *options, "--json")
    assert done.exit_code == 0, done.output + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["measured"]["context"] == POSITIONS and found["plan"]["at_context"] == POSITIONS
    return out


@pytest.mark.slow
def test_defaults_keep_to_the_positions(converted: Path) -> None:
    found = clla("eval", converted, "--num-samples", 1, "--retrieval-trials", 1, "--json")
    assert found.exit_code == 0, found.output + found.stderr
    measured = json.loads(found.stdout.splitlines()[-1])
    assert measured["context"] == POSITIONS and measured["cache"]["by_context"].keys() == {str(POSITIONS)}
    assert measured["retrieval"]["source"]["nll"] > 0
    page = clla("report", converted, "--num-samples", 1, "--num-prompts", 1, "--max-new-tokens", 100, "--json")
    assert page.exit_code == 0, page.output + page.stderr
    samples = json.loads(page.stdout.splitlines()[-1])["samples"]
    assert samples and all(sample["prompt_tokens"] < POSITIONS for sample in samples)
    speed = clla("bench", converted, "--repeats", 1, "--new-tokens", 4, "--json")
    assert speed.exit_code == 0, speed.output + speed.stderr
    assert json.loads(speed.stdout.splitlines()[-1])["settings"]["contexts"] == [POSITIONS - 4]
    written = clla("generate", converted, "--prompt", "x" * 100)
    assert written.exit_code == 0 and "tokens: cache" in written.stderr, written.output + written.stderr
    heal = ["--tokens", 2 * POSITIONS, "--batch-tokens", POSITIONS, "--evaluations", 1, "--no-eval", "--json"]
    done = clla("heal", converted, "-o", converted.with_name("healed"), *heal)
    assert done.exit_code == 0, done.output + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["healing"]["config"]["sequence_length"] == POSITIONS


@pytest.mark.parametrize(
    "command",
    [
        "convert SOURCE --sequence-length 161",
        "convert SOURCE --budget-context 161 --kv-budget 50%",
        "compare SOURCE --sequence-length 161",
        "compare SOURCE --long-context 161",
        "eval CONVERTED --sequence-length 161",
        "eval CONVERTED --contexts 64,161",
        "eval CONVERTED --retrieval-context 161",
        "report CONVERTED --sequence-length 161",
        "bench CONVERTED --contexts 129",
        "heal CONVERTED --sequence-length 161",
        "generate CONVERTED --max-new-tokens 155 --prompt abcdef",
        "generate CONVERTED --prompt " + "x" * 161,
        "report CONVERTED --num-samples 0 --num-prompts 0 --prompt " + "x" * 161,
    ],
)
def test_lengths_beyond_the_positions_are_refused(
    command: str, gpt2_dir: Path, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the limit and the option, before weights are read (a prompt is only known with the tokenizer)."""
    monkeypatch.chdir(gpt2_dir.parent)
    if "--prompt" not in command:
        forbidden = lambda *args, **options: pytest.fail("weights were read")  # noqa: E731
        monkeypatch.setattr(PreTrainedModel, "from_pretrained", forbidden)
    words = [{"SOURCE": str(gpt2_dir), "CONVERTED": str(converted)}.get(word, word) for word in command.split()]
    done = clla(*words)
    option = next((word for word in words if word.startswith("--") and word != "--kv-budget"), "")
    assert done.exit_code == 2, done.output + done.stderr
    assert (
        f"at most {POSITIONS} tokens" in done.stderr
        and ("--max-new-tokens" if "--prompt" in words else option) in done.stderr
    )


def test_a_model_that_was_trained_for_less_is_measured_within_that(text_file: Path, tmp_path: Path) -> None:
    """Rotary positions: the defaults keep to the trained length, and more is measured with a note."""
    pico_of(pico_config("llama", max_position_embeddings=80)).save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    options = ["--dataset", text_file, "--calibration-tokens", 640, "--kv-budget", "50%", "--exact-window", 16]
    done = clla("convert", tmp_path / "llama", "-o", tmp_path / "out", *options, "--json")
    assert done.exit_code == 0 and "Warning" not in done.stderr, done.output + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["measured"]["context"] == 80
    found = clla("eval", tmp_path / "out", "--num-samples", 1, "--text", text_file, "--json")
    assert found.exit_code == 0 and "No codes are planted" in found.stderr, found.output + found.stderr
    assert "Warning" not in found.stderr and json.loads(found.stdout.splitlines()[-1])["context"] == 80
    more = ["--num-samples", 1, "--text", text_file, "--sequence-length", 128, "--no-retrieval", "--json"]
    found = clla("eval", tmp_path / "out", *more)
    assert found.exit_code == 0 and "beyond the 80 positions" in " ".join(found.stderr.split())
    assert json.loads(found.stdout.splitlines()[-1])["context"] == 128
    written = clla("generate", tmp_path / "out", "--prompt", "x" * 78, "--max-new-tokens", 10)
    assert written.exit_code == 0 and "beyond the 80 positions" in " ".join(written.stderr.split())
