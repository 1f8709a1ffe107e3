"""No command ends in a traceback or an internal error, whatever is wrong with its files and options.

The damage is generated from fixed seeds; each case is named, so that one can be run alone with `-k`.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from conftest import byte_tokenizer, pico
from helpers import clla
from safetensors.torch import load_file, save_file
from typer.models import OptionInfo
from typer.testing import Result

from clla.cli import COMMANDS

FEW = ["--calibration-tokens", 128, "--sequence-length", 64, "--budget-context", 512, "--kv-budget", "25%",
       "--exact-window", 8, "--no-eval"]  # fmt: skip
ODD: list[Any] = [None, "word", -1, 0, 10**30, 1.5, True, [], {}, [1, "x"], {"a": 1}]


def some(cases: list[Any], count: int) -> list[Any]:
    """So many of the cases, in their order: every kind costs the same few seconds."""
    return [cases[i] for i in sorted(random.Random(4).sample(range(len(cases)), count))]


def told(result: Result, *gone: Path) -> str:
    """What a command wrote, which must be a message in our form where it failed, and nothing else must be there."""
    text = result.stdout + result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (0, 1, 2), text
    assert "Traceback" not in text and "internal error" not in text, text
    if result.exit_code:
        slip = "Usage:" in result.stderr and "Error" in result.stderr  # typer's form
        found = "problem" in result.stdout and "→" in result.stdout  # doctor's
        assert slip or found or ("Error:" in result.stderr and "remedy:" in result.stderr), text
        left = [path for place in gone for path in place.parent.glob(place.name + "*")]
        assert not left, (left, text)
    return text


@pytest.fixture(scope="module")
def originals(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources of some families, and a converted one."""
    folder = tmp_path_factory.mktemp("originals")
    for name in ("llama", "gpt2", "gemma2"):
        pico(name).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    done = clla("convert", folder / "llama", "-o", folder / "converted", "--dataset", text_file, *FEW)
    assert done.exit_code == 0, done.stderr
    done = clla("convert", folder / "llama", "-o", folder / "dry", "--dataset", text_file, *FEW, "--dry-run",
                "--work-dir", folder / "work")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    return folder


@pytest.fixture
def copy(originals: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(originals / name, tmp_path / name))


def converting(model: Path, text: object, *options: object) -> str:
    out = model.parent / "out"
    return told(clla("convert", model, "-o", out, "--dataset", text, *FEW, *options), out)


# Configs of sources


def config_cases() -> list[Any]:
    dice, cases = random.Random(0), []
    for family in ("llama", "gpt2", "gemma2"):
        keys = sorted(pico(family).config.to_dict())
        for key in keys if family == "llama" else dice.sample(keys, 12):
            value = dice.choice(["dropped", *ODD])
            cases.append(pytest.param(family, {key: value}, id=f"{family}-{key}-{value}"))
    listed: dict[str, Any] = {
        "mrope": {"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}},
        "su": {"rope_scaling": {"type": "su", "factor": 4.0}},
        "odd theta": {"rope_parameters": {"rope_type": "default", "rope_theta": "much"}},
        "unknown activation": {"hidden_act": "banana"},
        "no layers": {"num_hidden_layers": 0},
        "tuples": {"return_dict": False},
        "three heads": {"num_attention_heads": 3},
        "three key-value heads": {"num_key_value_heads": 3},
        "odd head dim": {"head_dim": 7},
        "wider": {"hidden_size": 96},
        "deeper": {"num_hidden_layers": 6},
        "fewer words": {"vocab_size": 100},
        "other type": {"model_type": "gpt_neox"},
        "encoder": {"model_type": "bert"},
        "of images": {"model_type": "llava"},
        "quantized": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantized in an unknown way": {"quantization_config": {"quant_method": "banana"}},
        "float64": {"dtype": "float64"},
        "banana dtype": {"dtype": "banana"},
        "own code for the config alone": {"model_type": "my", "auto_map": {"AutoConfig": "my.My"}},
        "own code": {"model_type": "my", "auto_map": {"AutoConfig": "my.My", "AutoModelForCausalLM": "my.Model"}},
        "own code for a known type": {"architectures": ["My"], "auto_map": {"AutoModelForCausalLM": "my.Model"}},
        "eager": {"_attn_implementation": "banana"},
    }
    return some(cases, 24) + [pytest.param("llama", changes, id=name) for name, changes in listed.items()]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "changes"), config_cases())
def test_damaged_configs(family: str, changes: dict[str, Any], copy: Callable[[str], Path], text_file: Path) -> None:
    path = copy(family) / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "dropped"}))
    converting(path.parent, text_file, "--dry-run")


# Weights and tokenizers of sources


def _change(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Damage that replaces one weight; None leaves it out."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = change(tensors[name])
        kept = {key: value.contiguous() for key, value in tensors.items() if value is not None}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def _poisoned(value: float) -> Callable[[Any], Any]:
    def change(weight: Any) -> Any:
        weight.view(-1)[3] = value
        return weight

    return change


def _index(folder: Path) -> None:
    """Weights in several files, one of which is absent."""
    pico().save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    next(folder.glob("model-*2-of*.safetensors")).unlink()


KEY, NORM = "model.layers.1.self_attn.k_proj.weight", "model.layers.2.input_layernorm.weight"
DAMAGED_WEIGHTS: dict[str, Callable[[Path], None]] = {
    "nan in a matrix": _change(KEY, _poisoned(float("nan"))),
    "inf in a matrix": _change(KEY, _poisoned(float("inf"))),
    "-inf in a norm": _change(NORM, _poisoned(float("-inf"))),
    "nan in the embedding": _change("model.embed_tokens.weight", _poisoned(float("nan"))),
    "missing": _change(KEY, lambda weight: None),
    "cut": _change(KEY, lambda weight: weight[:-1]),
    "a vector": _change(KEY, lambda weight: weight[0]),
    "whole numbers": _change(KEY, lambda weight: weight.int()),
    "float64": _change(KEY, lambda weight: weight.double()),
    "bool": _change(KEY, lambda weight: weight > 0),
    "float8": _change(KEY, lambda weight: weight.to(torch.float8_e4m3fn)),
    "huge": _change(KEY, lambda weight: weight * 1e30),
    "zeros": _change(KEY, lambda weight: weight * 0),
    "no numbers": _change("model.embed_tokens.weight", lambda weight: weight[:0]),
    "absent": lambda folder: (folder / "model.safetensors").unlink(),
    "a shard is absent": _index,
    "a directory": lambda folder: ((folder / "model.safetensors").unlink(), (folder / "model.safetensors").mkdir())[1],
}
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "another type": lambda data: b"\x89PNG\r\n\x1a\n" + data,
    "a list": lambda data: b"[]",
    "no json": lambda data: b'{\n "a": 1,\n "b": }\n',
    "deep": lambda data: b"[" * 100_000,
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGED_WEIGHTS)
def test_damaged_weights(damage: str, copy: Callable[[str], Path], text_file: Path) -> None:
    folder = copy("llama")
    DAMAGED_WEIGHTS[damage](folder)
    text = converting(folder, text_file, "--dry-run")
    if "nan" in damage or "inf" in damage:
        assert "NaN or infinite" in text


def damaged(files: Sequence[str], damages: Sequence[str]) -> list[Any]:
    """Three kinds of damage for every file."""
    dice = random.Random(3)
    return [pytest.param(f, d, id=f"{f}-{d}") for f in files for d in dice.sample(damages, 3)]


FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
OWN_FILES = ("clla_checksums.json", "clla_recipe.yaml", "clla_report.json")


@pytest.mark.parametrize(("name", "damage"), damaged(FILES, list(DAMAGES)))
def test_damaged_files_of_a_source(name: str, damage: str, copy: Callable[[str], Path], text_file: Path) -> None:
    path = copy("llama") / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    converting(path.parent, text_file, "--dry-run")


def _tokenizer(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def _more_tokens(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["the", "lake", "mill"])
    tokenizer.save_pretrained(folder)


DAMAGED_TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "absent": lambda folder: [path.unlink() for path in folder.glob("token*")] and None,
    "the settings alone": lambda folder: (folder / "tokenizer.json").unlink(),
    "no model": _tokenizer(model=None),
    "no words": _tokenizer(model={"type": "BPE", "vocab": {}, "merges": []}),
    "a model of no kind": _tokenizer(model={"type": "banana"}),
    "a pre-tokenizer of no kind": _tokenizer(pre_tokenizer={"type": "banana"}),
    "more tokens than the embedding": _more_tokens,
}


@pytest.mark.parametrize("damage", DAMAGED_TOKENIZERS)
def test_damaged_tokenizers(damage: str, copy: Callable[[str], Path], text_file: Path) -> None:
    folder = copy("llama")
    DAMAGED_TOKENIZERS[damage](folder)
    text = converting(folder, text_file, "--dry-run")
    if "more" in damage:
        assert "embedding has 260 rows" in text


# Data

DATA: dict[str, bytes] = {
    "empty.txt": b"",
    "blank.txt": b" \n\n ",
    "short.txt": b"too short",
    "latin.txt": "Gr\u00fc\u00dfe ".encode("latin-1") * 500,
    "nul.txt": b"\0" * 5000,
    "picture.txt": b"\x89PNG\r\n\x1a\n" * 900,
    "empty.jsonl": b"",
    "broken.jsonl": b'{"text": "a"}\n{"text": \n',
    "numbers.jsonl": b'{"text": 5}\n' * 50,
    "null.jsonl": b'{"text": null}\n' * 50,
    "list.jsonl": b"[1, 2]\n" * 50,
    "chat.jsonl": b'{"messages": [{"role": "user", "content": "hi"}]}\n' * 50,
    "columns.jsonl": b'{"number": 1}\n' * 50,
    "empty.parquet": b"",
    "broken.parquet": b"PAR1" + b"x" * 100 + b"PAR1",
    "broken.txt.gz": b"\x1f\x8b\x08\0",
    "broken.txt.xz": b"\xfd7zXZ\0" + b"x" * 50,
    "table.csv": b"a,b\n1,2\n",
}


@pytest.mark.parametrize("name", [*DATA, "absent.txt", ".", "no/such", "a b", "x" * 300, "text\nitself", "bundled:x"])
def test_damaged_data(name: str, originals: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    if name in DATA:
        path.write_bytes(DATA[name])
    dataset = path if name in DATA or name in ("absent.txt", ".") else name
    told(clla("convert", originals / "llama", "-o", tmp_path / "out", "--dataset", dataset, *FEW, "--dry-run"),
         tmp_path / "out")  # fmt: skip
    if name in DATA and "txt" not in name:
        return  # read in the same way
    told(clla("eval", originals / "converted", "--text", dataset, "--num-samples", 1, "--sequence-length", 64,
              "--contexts", 64, "--no-retrieval"))  # fmt: skip


# Converted checkpoints

QUICK: dict[str, list[object]] = {
    "generate": ["--prompt", "the mill", "--max-new-tokens", 3],
    "eval": ["--text", "TEXT", "--num-samples", 1, "--sequence-length", 64, "--contexts", 64, "--no-retrieval"],
    "card": [],
    "doctor": [],
}


def run(name: str, checkpoint: Path, text: Path, *options: object) -> str:
    quick = [text if option == "TEXT" else option for option in QUICK[name]]
    return told(clla(name, checkpoint, *quick, *options))


@pytest.mark.parametrize(("name", "damage"), damaged([*FILES, *OWN_FILES], [*DAMAGES, "absent"]))
def test_damaged_files_of_a_checkpoint(name: str, damage: str, copy: Callable[[str], Path], text_file: Path) -> None:
    """With checksums, which find all of it, and without."""
    folder = copy("converted")
    path = folder / name
    if damage == "absent":
        path.unlink()
    else:
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    dice = random.Random(f"{name} {damage}")
    run(dice.choice(list(QUICK)), folder, text_file)
    if name != "clla_checksums.json":
        (folder / "clla_checksums.json").unlink()
    run(dice.choice(list(QUICK)), folder, text_file)


def block_cases() -> list[Any]:
    dice, cases = random.Random(1), []
    for key in BLOCK:
        for value in ("dropped", dice.choice(ODD)):
            cases.append(pytest.param(key, value, dice.choice(list(QUICK)), id=f"{key}-{value}"))
    return some(cases, 24)


BLOCK = ("schema_version", "groups", "kv", "kv_itemsize", "tier_size", "window", "sinks", "flush_block", "source",
         "budget_bytes", "at_context", "made_from", "kept_layers", "kept_window", "rope_bits", "rope",
         "kv_dtype", "prefill_chunk", "codec_sha256", "kept_state_bytes", "kept_slot_bytes")  # fmt: skip


def test_the_keys_are_those_of_a_checkpoint(originals: Path) -> None:
    found = json.loads((originals / "converted" / "config.json").read_text())["clla"]
    assert set(found) == set(BLOCK)


@pytest.mark.parametrize(("key", "value", "command"), block_cases())
def test_damaged_plans_of_a_checkpoint(
    key: str, value: Any, command: str, copy: Callable[[str], Path], text_file: Path
) -> None:
    folder = copy("converted")
    (folder / "clla_checksums.json").unlink()  # as someone does who edits the config
    config = json.loads((folder / "config.json").read_text())
    config["clla"][key] = value
    if value == "dropped":
        del config["clla"][key]
    (folder / "config.json").write_text(json.dumps(config))
    run(command, folder, text_file)


@pytest.mark.parametrize("command", ["eval", "generate", "heal", "report", "export", "push", "bench"])
def test_a_source_is_no_checkpoint(command: str, originals: Path, tmp_path: Path) -> None:
    options = {"export": ["-o", tmp_path / "out"], "generate": ["--prompt", "x"], "push": ["a/b"]}.get(command, [])
    result = clla(command, originals / "llama", *options)
    told(result, tmp_path / "out")
    assert result.exit_code == 1 and "not converted" in result.stderr


# Options

WRONG: dict[type, list[str]] = {
    int: ["-1", "0", "x", "1e99", str(10**30)],
    float: ["nan", "inf", "-1", "x"],
    str: ["", "banana", "[/red]"],
    Path: ["", "/proc/no/such"],
}
TOGETHER = (
    ("convert", "--private"),
    ("convert", "--push-to-hub me/model"),
    ("convert", "--codec-only --max-shard-size 1GB"),
    ("convert", "--max-shard-size 500"),
    ("convert", "--max-shard-size 5XB"),
    ("convert", "--max-shard-size=-5GB"),
    ("convert", "--kv-budget 1B --budget-context 0"),
    ("convert", "--heal-tokens 64"),
    ("convert", "--heal --heal-tokens 10"),
    ("convert", "--bits 9"),
    ("convert", "--dtype float64"),
    ("convert", "--device cuda:99"),
    ("convert", "--device meta"),
    ("convert", "--placement spread"),
    ("heal", "--tokens 512 --batch-tokens 1024"),
    ("heal", "--gradient-checkpointing"),
    ("eval", "--contexts 0"),
    ("eval", "--contexts ,"),
    ("eval", "--sequence-length 1"),
    ("eval", "--dtype float64"),
    ("eval", "--text absent.txt"),
    ("compare", "--budgets nan%"),
    ("compare", "--methods banana"),
    ("bench", "--shape tiny"),
    ("bench", "--largest-batch"),
    ("bench", "--memory-limit 500"),
    ("generate", "--temperature nan"),
    ("generate", "--temperature 1e-320"),
    ("generate", "--max-new-tokens 0"),
    ("plan", "--sweep --kv-budget 3%"),
    ("plan", "--budgets 3%"),
    ("recipes", "show banana"),
    ("recipes", "cp banana"),
    ("nothing", "--at-all"),
)


def option_cases() -> list[Any]:
    """Options of all commands with wrong values, and what cannot be together."""
    dice, cases = random.Random(2), []
    for name, file in COMMANDS.items():
        found = getattr(import_module(f"clla.commands.{file}"), file)
        for argument, hint in get_type_hints(found, include_extras=True).items() if name != "recipes" else ():
            info = next((part for part in getattr(hint, "__metadata__", ()) if isinstance(part, OptionInfo)), None)
            if info is None:
                continue
            option = (info.param_decls or [f"--{argument.replace('_', '-')}"])[0]
            kinds = {part for part in (hint.__origin__, *get_args(hint.__origin__)) if part in (*WRONG, bool)}
            if bool not in kinds:
                value = dice.choice(WRONG[kinds.pop() if kinds else str])
                cases.append(pytest.param(name, [option, value], id=f"{name}-{option}-{value}"))
    return some(cases, 40) + [pytest.param(name, line.split(), id=f"{name} {line}") for name, line in TOGETHER]


@pytest.mark.parametrize(("name", "words"), option_cases())
def test_wrong_options(
    name: str, words: list[str], originals: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint, out = originals / "converted", tmp_path / "out"
    base: dict[str, list[object]] = {
        "convert": [originals / "llama", "-o", out, "--dataset", text_file, *FEW, "--dry-run"],
        "plan": [originals / "work"],
        "heal": [checkpoint, "-o", out, "--tokens", 128, "--sequence-length", 64, "--dataset", text_file, "--no-eval",
                 "--evaluations", 1],
        "eval": [checkpoint, *QUICK["eval"]],
        "compare": [originals / "llama", "--quick", "--methods", "int4", "--sequence-length", 64, "--long-context", 64,
                    "--num-samples", 1, "--text", text_file, "--dataset", text_file, "--calibration-tokens", 128,
                    "--retrieval-trials", 0, "-o", out],
        "bench": [checkpoint, "--contexts", 16, "--new-tokens", 2, "--repeats", 1],
        "generate": [checkpoint, *QUICK["generate"]],
        "card": [checkpoint],
        "report": [checkpoint, "--output", out, "--num-prompts", 0, "--num-samples", 0, "--max-new-tokens", 2],
        "push": [checkpoint, "me/model", "--dry-run"],
        "doctor": [originals / "llama"],
        "export": [checkpoint, "-o", out],
    }  # fmt: skip
    options = [text_file if word == "TEXT" else word for word in base.get(name, [])]
    told(clla(name, *options, *words), out)
