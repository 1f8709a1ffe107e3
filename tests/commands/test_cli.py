"""The command line as a user meets it: conversions, evaluation, resuming, and what mistakes look like."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import byte_tokenizer, pico
from helpers import clla, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import Result

from clla.modeling.hooks_clla import CACHE
from clla.registration import register
from clla.source.model import open_source
from clla.storage.filenames import CHECKSUMS
from clla.storage.files import read_json

CALIBRATION = ["--calibration-tokens", "2048", "--sequence-length", "256"]
SMALL = [*CALIBRATION, "--budget-context", "512", "--exact-window", "16", "--kv-budget", "25%"]


def ok(*arguments: str | Path) -> Result:
    result = clla(*arguments)
    assert result.exit_code == 0, result.output + result.stderr
    return result


@pytest.fixture(scope="module")
def converted(pico_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico converted with the command line."""
    folder = tmp_path_factory.mktemp("converted") / "pico-clla"
    ok("convert", pico_dir, "-o", folder, "--dataset", text_file, *SMALL)
    return folder


def test_help_answers_without_torch() -> None:
    script = (
        "import sys; sys.argv = ['clla', 'convert', '--help']\n"
        "from clla.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--kv-budget" in done.stdout


def test_checkpoint_is_an_ordinary_directory(converted: Path, pico_dir: Path) -> None:
    names = {path.name for path in converted.iterdir()}
    assert names >= {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md", "clla_recipe.yaml",
        "clla_report.json", "modeling_clla.py", "configuration_clla.py", "cache_clla.py", "quantize_clla.py",
        "rotary_clla.py", "hooks_clla.py", "clla_plan.png", "positions_clla.py", "observe_clla.py",
    }  # fmt: skip
    config = read_json(converted / "config.json")
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_clla.CllaForCausalLM"
    assert config["model_type"] == "clla" and config["text_config"]["model_type"] == "llama"
    assert not list(converted.parent.glob("*.work")) and not list(converted.parent.glob("*.partial"))
    model = AutoModelForCausalLM.from_pretrained(converted)
    source = AutoModelForCausalLM.from_pretrained(pico_dir)
    for name, weight in source.state_dict().items():
        assert torch.equal(model.state_dict()["source." + name], weight), name


def test_report_names_source_int4_and_converted(converted: Path) -> None:
    measured = read_json(converted / "clla_report.json")["measured"]
    assert measured["source"]["perplexity"] > 1 and measured["converted"]["kl"] >= 0
    assert measured["int4"]["bytes_per_token"] < measured["source"]["bytes_per_token"]


@pytest.mark.slow
def test_loads_and_generates_without_clla(converted: Path, tmp_path: Path) -> None:
    """The shipped code alone gives the same logits, and generates in every way."""
    register()
    model = AutoModelForCausalLM.from_pretrained(converted)
    with torch.no_grad():
        torch.save(model(tokens(1, 150)).logits, tmp_path / "expected.pt")
    script = f"""
import sys
sys.modules["clla"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
path = {str(converted)!r}
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
cache = {CACHE!r}
ids = torch.randint(0, 256, (1, 150), generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    torch.testing.assert_close(model(ids).logits, torch.load({str(tmp_path / "expected.pt")!r}))
batch = tokenizer(["a short one", "a much longer line of text, " * 4], return_tensors="pt", padding=True)
for options in ({{}}, {{"do_sample": True}}, {{"num_beams": 3}}, {{"num_beams": 2, "num_return_sequences": 2}}):
    out = model.generate(**batch, max_new_tokens=20, return_dict_in_generate=True, **options)
    assert type(out[cache]).__name__ == "CllaCache", options
    assert out[cache].groups[0].encoded > 64, options
first = model.generate(**tokenizer(["one turn"], return_tensors="pt"), max_new_tokens=30, return_dict_in_generate=True)
more = torch.cat((first.sequences, ids), 1)
second = model.generate(more, max_new_tokens=5, **{{cache: first[cache]}})
assert second.shape[1] <= more.shape[1] + 5
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_codec_only_checkpoint_equals_the_whole_one(
    converted: Path, pico_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    ok("convert", pico_dir, "-o", folder, "--dataset", text_file, *SMALL, "--codec-only", "--no-eval")
    assert not list(folder.glob("model*.safetensors"))
    whole, alone = AutoModelForCausalLM.from_pretrained(converted), AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(alone(tokens(1, 150)).logits, whole(tokens(1, 150)).logits)
    assert read_json(folder / "config.json")["base_model"]["path"] == str(pico_dir)


def test_resolved_recipe_gives_the_same_plan(
    converted: Path, pico_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = ok("convert", pico_dir, "--recipe", converted / "clla_recipe.yaml", "--dry-run", "--json", "-o", "again")
    plan = json.loads(result.stdout)["plan"]
    written = read_json(converted / "clla_report.json")["plan"]
    assert plan["groups"] == written["groups"] and plan["made_from"] == written["made_from"]
    assert read_json(tmp_path / "again-plan.json")["groups"] == written["groups"]
    assert not (tmp_path / "again").exists()


def test_another_budget_replans_without_the_model(
    pico_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["convert", pico_dir, "-o", tmp_path / "out", "--dataset", text_file, *SMALL, "--dry-run", "--json"]
    work = ["--work-dir", tmp_path / "work"]
    first = json.loads(ok(*common, *work).stdout)
    monkeypatch.setattr("clla.source.model.Source.load_model", _refuse)
    second = json.loads(ok(*common, *work, "--kv-budget", "15%").stdout)
    assert second["row_bytes"] < first["row_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--latent-input", "first_layer"],
        ["--planner", "uniform"],
        ["--planner", "cluster"],
        ["--planner", "pyramid"],
        ["--planner", "kvsharer"],
        ["--planner", "kvsharer", "--latent-input", "first_layer"],
        ["--bits", "2,4,8", "--max-layers-per-group", "2"],
    ],
)
def test_planners_and_sources(pico_dir: Path, text_file: Path, tmp_path: Path, options: list[str]) -> None:
    common = ["convert", pico_dir, "-o", tmp_path / "out", "--dataset", text_file, *SMALL, "--no-eval", "--json"]
    done = json.loads(ok(*common, *options).stdout)
    budget = 0.25 * 2 * 2 * 16 * 4 * 4  # 25 % of keys and values, 2 heads of 16, 4 layers, fp32
    assert 0.8 * budget < done["planned_bytes_per_token"] <= budget
    with torch.no_grad():
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens(1, 100)).logits.isfinite().all()


@pytest.mark.parametrize("metric", ["pca", "weights", "asvd"])
def test_baseline_metrics_are_recipes(pico_dir: Path, text_file: Path, tmp_path: Path, metric: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"plan": {"metric": metric}}))
    common = ["--dataset", text_file, *SMALL, "--dry-run", "--json", "-o", tmp_path / "out"]
    assert json.loads(ok("convert", pico_dir, "--recipe", recipe, *common).stdout)["row_bytes"] > 0


def test_sliding_layers_are_left_alone(text_file: Path, tmp_path: Path) -> None:
    model = tmp_path / "sliding"
    pico("qwen2-sliding").save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    common = ["--dataset", text_file, *SMALL, "--no-eval", "--json", "-o", tmp_path / "out"]
    done = json.loads(ok("convert", model, *common).stdout)
    assert done["plan"]["kept_layers"] == [2, 3]
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generate(tokens(1, 60), max_new_tokens=20)
    assert out.shape[1] > 60
    measure = ["--text", text_file, "--num-samples", "1", "--sequence-length", "300", "--no-retrieval", "--json"]
    cache = json.loads(ok("eval", tmp_path / "out", *measure).stdout)["cache"]
    assert cache["bytes_per_token"] == pytest.approx(cache["planned_bytes_per_token"], rel=0.01)


def test_the_model_can_write_its_own_calibration_text(pico_dir: Path, tmp_path: Path) -> None:
    ok("convert", pico_dir, "-o", tmp_path / "out", "--dataset", "self", "--calibration-tokens", "256",
       "--sequence-length", "64", "--budget-context", "512", "--kv-budget", "30%", "--dry-run")  # fmt: skip


@pytest.mark.slow
def test_eval_reports_what_was_measured(converted: Path, text_file: Path) -> None:
    result = ok("eval", converted, "--text", text_file, "--num-samples", "2", "--sequence-length", "512", "--contexts",
                "128,512,900", "--retrieval-context", "400", "--retrieval-trials", "2", "--json")  # fmt: skip
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["source"]["perplexity"] > 1 and found["converted"]["perplexity"] > 1
    assert found["converted"]["kl"] > 0
    assert found["source"]["bytes_per_token"] == 2 * 2 * 16 * 4 * 4
    for row in found["cache"]["by_context"].values():
        assert row["bytes_per_token"] == pytest.approx(row["planned_bytes_per_token"], rel=0.01)
    assert found["cache"]["bytes_per_token"] == found["cache"]["by_context"]["900"]["bytes_per_token"]
    assert set(found["retrieval"]) == {"source", "int4", "converted"}
    tables = ok(
        "eval", converted, "--text", text_file, "--num-samples", "1", "--sequence-length", "256", "--no-retrieval"
    )
    assert "perplexity" in tables.stdout


def test_generate_prints_text(converted: Path) -> None:
    result = ok("generate", converted, "--prompt", "the mill", "--max-new-tokens", "12")
    assert "cache" in result.stderr and result.stdout.strip()


def test_recipes_commands(tmp_path: Path) -> None:
    assert "two-percent" in ok("recipes", "ls").stdout
    shown = yaml.safe_load(ok("recipes", "show", "compact").stdout)
    assert shown["budget"]["kv_budget"] == "3%"
    ok("recipes", "cp", "compact", tmp_path)
    assert (tmp_path / "compact.yaml").is_file()
    assert clla("recipes", "cp", "compact", tmp_path).exit_code == 2
    assert "kv_budget" in ok("recipes", "show", "--schema").stdout


class _Stop(Exception):
    pass


def _refuse(*args: object, **kwargs: object) -> None:
    raise _Stop("this must not run again")


@pytest.mark.parametrize("stage", ["stages.make_codec", "pipeline.write_checkpoint"])
def test_resume_after_an_interruption(
    pico_dir: Path, text_file: Path, converted: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that dies leaves nothing that looks finished; --resume goes on from there to the same bytes."""
    folder = tmp_path / "out"
    command = ["convert", pico_dir, "-o", folder, "--dataset", text_file, *SMALL, "--no-eval"]
    with monkeypatch.context() as patch:
        patch.setattr(f"clla.convert.{stage}", _refuse)
        stopped = clla(*command)
        assert stopped.exit_code == 1 and "this must not run again" in stopped.stderr
        assert f"kept in {folder}.work" in stopped.stderr and "--resume" in stopped.stderr
    assert not folder.exists() and (tmp_path / "out.work").is_dir()
    with monkeypatch.context() as patch:
        patch.setattr("clla.convert.stages.collect", _refuse)
        patch.setattr("clla.convert.stages.make_plan", _refuse)
        ok(*command, "--resume")
    assert (folder / "model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()


def test_a_damaged_stage_is_computed_again(pico_dir: Path, text_file: Path, tmp_path: Path) -> None:
    command = ["convert", pico_dir, "-o", tmp_path / "out", "--dataset", text_file, *SMALL, "--dry-run", "--json"]
    command += ["--work-dir", tmp_path / "work"]
    first = json.loads(ok(*command).stdout)
    for path in (tmp_path / "work").iterdir():
        data = bytearray(path.read_bytes())
        data[-1] ^= 0xFF
        path.write_bytes(data)
    again = ok(*command)
    assert json.loads(again.stdout)["plan"] == first["plan"]
    assert "again" in again.stderr


# Mistakes. Each must say what was got, expected and to be done, and leave nothing behind.


def mistake(code: int, *arguments: str | Path, output: Path | None = None) -> str:
    result = clla(*arguments)
    assert result.exit_code == code, (result.exit_code, result.output, result.stderr, result.exception)
    assert "Error:" in result.stderr and ("expected:" in result.stderr or "remedy:" in result.stderr)
    assert "Traceback" not in result.stderr
    if output is not None:
        assert not output.exists() and not output.with_name(output.name + ".partial").exists()
    return " ".join(result.stderr.split())


def _model_dir(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_unsupported_models_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    out = tmp_path / "out"
    encoder = _model_dir(tmp_path / "bert", model_type="bert", architectures=["BertModel"])
    assert "decoder" in mistake(1, "convert", encoder, "-o", out, output=out)
    t5 = _model_dir(tmp_path / "t5", model_type="t5", architectures=["T5ForConditionalGeneration"])
    assert "encoder-decoder" in mistake(1, "convert", t5, "-o", out, output=out)
    unknown = _model_dir(tmp_path / "new", model_type="no_such_thing")
    assert "no_such_thing" in mistake(1, "convert", unknown, "-o", out, output=out)
    mamba = _model_dir(tmp_path / "mamba", model_type="mamba", architectures=["MambaForCausalLM"])
    assert "llama" in mistake(1, "convert", mamba, "-o", out, output=out)
    assert "no/such-model" in mistake(1, "convert", "no/such-model", "-o", out, output=out)
    assert "gguf" in mistake(1, "convert", tmp_path / "missing.gguf", "-o", out, output=out)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_config_without_dtype_keeps_that_of_the_weights(tmp_path: Path, stored: str) -> None:
    model = pico().to(getattr(torch, stored))
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config.pop("dtype")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert open_source(str(tmp_path / "model")).dtype == getattr(torch, stored)
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.unlink()
    assert open_source(str(tmp_path / "model")).dtype == torch.float32


def test_converting_twice_is_refused(converted: Path, tmp_path: Path) -> None:
    assert "already" in mistake(1, "convert", converted, "-o", tmp_path / "out", output=tmp_path / "out")


def test_datasets_that_do_not_serve(pico_dir: Path, tmp_path: Path) -> None:
    out, empty, short = tmp_path / "out", tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("  \n")
    short.write_text("too short")
    columns = tmp_path / "columns.jsonl"
    columns.write_text('{"number": 1}\n')
    for dataset, word in ((tmp_path / "no.txt", "exist"), (empty, "no text"), (short, "shorter"), (columns, "number")):
        assert word in mistake(1, "convert", pico_dir, "-o", out, "--dataset", dataset, *CALIBRATION, output=out)
    assert not list(tmp_path.glob("*.work"))  # nothing that could be taken up again


@pytest.mark.parametrize("budget", ["0.1%", "150%", "7", "lots", "0"])
def test_budgets_that_do_not_fit(pico_dir: Path, tmp_path: Path, budget: str) -> None:
    out = tmp_path / "out"
    text = mistake(2, "convert", pico_dir, "-o", out, "--kv-budget", budget, "--budget-context", "512", output=out)
    assert "budget" in text


def test_budget_below_the_window_names_the_least_budget(pico_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """The budget that the error names does work."""
    out = tmp_path / "out"
    common = ["convert", pico_dir, "-o", out, "--budget-context", "256", "--exact-window", "64", "--dataset", text_file]
    text = mistake(2, *common, *CALIBRATION, "--kv-budget", "20%", output=out)
    named = float(text.split("more than ")[1].split(" ")[0])
    ok(*common, *CALIBRATION, "--kv-budget", f"{named + 1:.0f}B", "--dry-run")


def test_recipe_mistakes_come_all_at_once(pico_dir: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("colour: red\nbudget: {kv_budgte: 3%}\nplan: {tier_size: 7, latent_input: third}\n")
    text = mistake(2, "convert", pico_dir, "-o", tmp_path / "out", "--recipe", recipe, output=tmp_path / "out")
    for word in ("colour", "budget.kv_budgte", "plan.tier_size", "plan.latent_input", "4 mistakes"):
        assert word in text
    assert "balanced" in mistake(2, "convert", pico_dir, "--recipe", "unheard-of")


def test_output_that_holds_something_is_kept(pico_dir: Path, text_file: Path, converted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    command = ["convert", pico_dir, "-o", out, "--dataset", text_file, *SMALL, "--no-eval"]
    assert "--overwrite" in mistake(2, *command)
    assert "did not write" in mistake(2, *command, "--overwrite")
    assert (out / "precious").read_text() == "x"
    earlier = shutil.copytree(converted, tmp_path / "earlier")
    (earlier / "notes.md").write_text("x")
    assert "did not write: notes.md" in mistake(2, *command[:2], "-o", earlier, *command[4:], "--overwrite")
    assert (earlier / "notes.md").read_text() == "x"
    (earlier / "notes.md").unlink()
    before = (earlier / "model.safetensors").stat().st_ino
    ok(*command[:2], "-o", earlier, *command[4:], "--overwrite")
    assert (earlier / "model.safetensors").stat().st_ino != before


def test_the_source_is_never_overwritten(pico_dir: Path, text_file: Path) -> None:
    common = ["convert", pico_dir, "--dataset", text_file, *SMALL, "--overwrite"]
    for output, how in ((pico_dir, "is"), (pico_dir.parent, "holds")):
        assert f"{how} the source" in mistake(2, *common, "-o", output)
    assert (pico_dir / "model.safetensors").is_file()


def test_missing_weights_are_noticed(pico_dir: Path, converted: Path, text_file: Path, tmp_path: Path) -> None:
    """transformers alone would put random numbers in their place."""
    for folder, run in ((pico_dir, "convert"), (converted, "eval")):
        copy = Path(shutil.copytree(folder, tmp_path / run))
        tensors = load_file(copy / "model.safetensors")
        name = next(name for name in tensors if "down_proj" in name)
        save_file({k: v for k, v in tensors.items() if k != name}, copy / "model.safetensors", {"format": "pt"})
        (copy / CHECKSUMS).unlink(missing_ok=True)
        options = (
            ["-o", tmp_path / "out", "--dataset", text_file, *SMALL] if run == "convert" else ["--num-samples", "1"]
        )
        assert "lacks 1 weights" in mistake(1, run, copy, *options)


def test_models_too_wide_for_memory_are_refused(
    pico_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = namedtuple("memory", "available")
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory(1000))
    assert "--max-layers-per-group" in mistake(1, "convert", pico_dir, "-o", tmp_path / "out", output=tmp_path / "out")


def test_changed_text_is_calibrated_on_again(pico_dir: Path, text_file: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    common = ["convert", pico_dir, "-o", tmp_path / "out", "--dataset", text, *SMALL, "--dry-run", "--json"]
    first = json.loads(ok(*common, "--work-dir", tmp_path / "work").stdout)
    text.write_text(text_file.read_text().replace("cold", "warm"))
    second = json.loads(ok(*common, "--work-dir", tmp_path / "work").stdout)
    assert first["plan"]["made_from"] != second["plan"]["made_from"]


def test_saving_a_loaded_model_again(converted: Path, tmp_path: Path) -> None:
    """Also in another dtype: code, checksum and weights go with it."""
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float16)
    model.save_pretrained(tmp_path / "again")
    byte_tokenizer().save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_clla.py").is_file()
    ok("generate", tmp_path / "again", "--prompt", "x", "--max-new-tokens", "2", "--dtype", "float16")


def test_codec_for_another_base_model_is_refused(pico_dir: Path, text_file: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(pico_dir, tmp_path / "base"))
    folder = tmp_path / "adapter"
    ok("convert", base, "-o", folder, "--dataset", text_file, *SMALL, "--codec-only", "--no-eval")
    again = AutoModelForCausalLM.from_pretrained(folder)
    again.save_pretrained(tmp_path / "whole")
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
        torch.testing.assert_close(whole(tokens(1, 60)).logits, again(tokens(1, 60)).logits)
    pico("gpt_neox").save_pretrained(base)
    assert "gpt_neox" in mistake(1, "generate", folder, "--prompt", "x")
    shutil.rmtree(base)
    assert "base model" in mistake(1, "generate", folder, "--prompt", "x")


def test_full_disk_is_noticed_first(pico_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10, 10))
    assert "free" in mistake(1, "convert", pico_dir, "-o", tmp_path / "out", output=tmp_path / "out")


def test_damaged_checkpoints_are_refused(converted: Path, pico_dir: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(converted, tmp_path / name))

    evaluate = ["--num-samples", "1", "--sequence-length", "64"]
    cut = copy("cut")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    mistake(1, "eval", cut, *evaluate)
    flipped = copy("flipped")
    tensors = load_file(flipped / "model.safetensors")
    tensors["codec.groups.0.encoder"][0, 0] += 1.0
    save_file(tensors, flipped / "model.safetensors", {"format": "pt"})
    assert "model.safetensors" in mistake(1, "eval", flipped, *evaluate)
    (flipped / CHECKSUMS).unlink()  # as in checkpoints of earlier versions: the codec still has its own
    assert "the codec in" in mistake(1, "eval", flipped, *evaluate)
    newer = copy("newer")
    config = read_json(newer / "config.json")
    config["clla"]["schema_version"] = 99
    (newer / "config.json").write_text(json.dumps(config))
    assert "99" in mistake(1, "generate", newer, "--prompt", "x")
    with pytest.raises(ValueError, match="99"):
        AutoModelForCausalLM.from_pretrained(newer)
    broken = copy("broken")
    (broken / "config.json").write_text("{")
    mistake(1, "generate", broken, "--prompt", "x")
    assert "not converted" in mistake(1, "eval", pico_dir, *evaluate)
    mistake(1, "eval", tmp_path / "nowhere", *evaluate)


def test_damaged_codec_file_is_refused(pico_dir: Path, text_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    ok("convert", pico_dir, "-o", folder, "--dataset", text_file, *SMALL, "--codec-only", "--no-eval")
    data = bytearray((folder / "clla_codec.safetensors").read_bytes())
    data[-3] ^= 0xFF
    (folder / "clla_codec.safetensors").write_bytes(data)
    assert "checksum" in mistake(1, "generate", folder, "--prompt", "x")


def test_tokenizer_travels_with_the_checkpoint(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer("Ada")["input_ids"] == byte_tokenizer()("Ada")["input_ids"]
