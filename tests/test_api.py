"""The functions of the package: in any order of imports, typed, documented, and the same as the commands."""

from __future__ import annotations

import doctest
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import byte_tokenizer, pico, pico_config, pico_of
from helpers import clla as command
from helpers import tokens
from mypy import api as mypy
from transformers import AutoConfig, AutoModelForImageTextToText
from typer.main import get_command
from vision_models import CONFIGS

import clla
from clla import api, cli
from clla.api import HealChanges, RecipeChanges, RetrievalOptions
from clla.storage.files import read_json

ROOT = Path(__file__).parents[1]
USER = """
import clla
import clla.convert.pipeline
from clla.convert.pipeline import Conversion, Options
from clla.checkpoint.load import Checkpoint

done: Conversion = clla.convert_model("x", kv_budget=0.03, bits=(2, 4))
share: float = clla.evaluate_model(done.output, num_samples=1).quality["converted"]["perplexity"]
model, tokenizer = clla.load_model(done.output)
chunk: int = clla.heal_model("x", train="codec").healing.history[0].tokens
options: Options = Options(done.output)
clla.convert_model("x", kv_budget=[1])
clla.convert_model("x", budget=1)
text: str = clla.convert_model("x")
"""


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    script = "import clla, clla.recipe, sys\n"
    script += "assert not {'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)\n"
    script += "assert set(clla.__all__) <= set(dir(clla)) and 'torch' not in sys.modules\n"
    script += "import clla.convert.pipeline, clla.heal, clla.evaluate\n"
    script += "assert all(callable(getattr(clla, name)) for name in clla.__all__ if name != '__version__')\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        clla.nothing  # noqa: B018
    assert set(clla.__all__) <= set(dir(clla))


@pytest.mark.slow
def test_a_user_file_is_checked(tmp_path: Path) -> None:
    """By mypy, which must know the functions and their results, and the packages of the same names."""
    (tmp_path / "user.py").write_text(USER, encoding="utf-8")
    skipped = ["torch", "transformers", "accelerate", "sklearn", "numpy", "datasets", "matplotlib", "pydantic"]
    settings = "[mypy]\nfollow_imports = silent\nignore_missing_imports = true\n"
    settings += "".join(f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in skipped)
    (tmp_path / "mypy.ini").write_text(f"{settings}", encoding="utf-8")
    options = ["--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", str(tmp_path / "cache")]
    found, problems, _ = mypy.run([*options, "--no-error-summary", str(tmp_path / "user.py")])
    assert not problems
    lines = {int(number): text for number, text in re.findall(r"user\.py:(\d+): error: (.*)", found)}
    first = USER.splitlines().index('clla.convert_model("x", kv_budget=[1])') + 1
    assert sorted(lines) == [first, first + 1, first + 2], found
    assert "kv_budget" in lines[first] and '"budget"' in lines[first + 1] and "Conversion" in lines[first + 2]
    assert (ROOT / "clla" / "py.typed").is_file()


@pytest.mark.parametrize("name", ["convert", "heal", "eval"])
def test_commands_and_functions_have_the_same_options(name: str) -> None:
    function = getattr(api, {"eval": "evaluate"}.get(name, name) + "_model")
    own = set(inspect.signature(function).parameters)
    own = own - {"changes", "planted"} | {
        field
        for kinds in (RecipeChanges, HealChanges, RetrievalOptions)
        if kinds.__name__ in str(inspect.signature(function))
        for field in kinds.__annotations__
    }
    options = {option.name for option in get_command(cli.app).commands[name].params}  # type: ignore[attr-defined]
    assert options - own <= {"as_json", "push_to_hub", "private"}
    assert own <= options


def test_the_function_does_what_the_command_does(pico_dir: Path, text_file: Path, tmp_path: Path) -> None:
    options = {"calibration_tokens": 2048, "sequence_length": 128, "exact_window": 8, "budget_context": 0}
    done = clla.convert_model(
        str(pico_dir),
        output=tmp_path / "a",
        dataset=str(text_file),
        kv_budget=0.1,
        bits=(2, 4),
        evaluate=False,
        **options,
    )
    flags = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)]
    flags += ["--dataset", text_file, "--kv-budget", "0.1", "--bits", "2,4", "--no-eval"]
    assert command("convert", pico_dir, "-o", tmp_path / "b", *flags).exit_code == 0
    for name in ("clla_recipe.yaml", "config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert (
        done.output == tmp_path / "a" and done.plan.to_json() == read_json(tmp_path / "b" / "clla_report.json")["plan"]
    )
    model, tokenizer = clla.load_model(tmp_path / "b")
    assert done.model is not None
    with torch.no_grad():
        torch.testing.assert_close(model(tokens(1, 60)).logits, done.model(tokens(1, 60)).logits)
    assert tokenizer("a")["input_ids"]
    options = {"text": str(text_file), "num_samples": 1, "sequence_length": 128, "contexts": "64", "retrieval": False}
    report = clla.evaluate_model(tmp_path / "a", **{**options, "contexts": [64]})
    flags = [
        "--text",
        text_file,
        "--num-samples",
        1,
        "--sequence-length",
        128,
        "--contexts",
        64,
        "--no-retrieval",
        "--json",
    ]
    assert json.loads(command("eval", tmp_path / "b", *flags).stdout) == report.to_json()


@pytest.mark.slow
def test_the_examples_of_the_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as they stand, on a model in the directory `MODEL`."""
    pico_of(pico_config("llama", max_position_embeddings=32_768)).save_pretrained(tmp_path / "MODEL")
    byte_tokenizer().save_pretrained(tmp_path / "MODEL")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python-api.md").read_text("utf-8"), flags=re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "python-api.md", "exec"), names)
    assert len(blocks) == 6 and {"done", "report", "healed", "tokenizer"} <= names.keys()
    assert (tmp_path / "MODEL-clla-healed" / "README.md").is_file()


@pytest.mark.slow
def test_the_examples_of_the_docstrings_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every public function has one; they run in the order of a conversion, in the directory of the models."""
    pico_of(pico_config("llama", max_position_embeddings=32_768)).save_pretrained(tmp_path / "MODEL")
    whole = AutoConfig.for_model("gemma3", **CONFIGS["gemma3"])
    AutoModelForImageTextToText.from_config(whole).save_pretrained(tmp_path / "VISION-MODEL")
    for name in ("MODEL", "VISION-MODEL"):
        byte_tokenizer().save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    order = ("convert_model", "load_model", "evaluate_model", "heal_model", "register", "extract_language_model")
    assert set(order) == {name for name in clla.__all__ if inspect.isfunction(getattr(clla, name))}
    for name in order:
        text = inspect.getdoc(getattr(clla, name)) or ""
        assert all(part in text for part in ("Args:", "Returns:", "Raises:")) or name == "register"
        examples = doctest.DocTestParser().get_examples(text)
        assert examples
        names = {"clla": clla, "transformers": transformers}
        for example in examples:
            exec(example.source, names)


def test_the_returned_model_is_not_changed_by_saving(text_file: Path, tmp_path: Path) -> None:
    """It computes in fp32; what is written has the source's bf16, and loads with its checksums."""
    pico().to(torch.bfloat16).save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    quick: dict[str, Any] = {"dataset": str(text_file), "calibration_tokens": 1024, "sequence_length": 128}
    quick |= {"exact_window": 8, "budget_context": 0, "kv_budget": "20%", "evaluate": False, "dtype": "float32"}
    made = clla.convert_model(tmp_path / "source", output=tmp_path / "out", **quick).model
    assert made is not None and {p.dtype for p in made.parameters()} == {torch.float32}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    loaded, _ = clla.load_model(tmp_path / "out", dtype="float32")
    stored, _ = clla.load_model(tmp_path / "out", dtype="bfloat16")
    assert stored.dtype == torch.bfloat16
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, made(ids).logits)
