"""No command ends in a traceback or an internal error, whatever is wrong with its files and options.

The damage is generated from fixed seeds; each case is named, so that one can be run alone with `-k`.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tokenizer, pico
from helpers import clla
from typer.testing import Result

FEW = ["--calibration-tokens", 128, "--sequence-length", 64, "--at-context", 512, "--kv-budget", "25%", "--window", 8,
       "--no-report"]  # fmt: skip
ODD: list[Any] = [None, "word", -1, 0, 10**30, 1.5, True, [], {}, [1, "x"], {"a": 1}]
CONFIG_CASES, BLOCK_CASES = 3, 2  # for each key
TIMES = {"generate": 3, "card": 1, "eval": 1}


def told(result: Result, *gone: Path) -> str:
    """What a command wrote, which must be a message in our form where it failed, and nothing else must be there."""
    text = result.stdout + result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (0, 1, 2), text
    assert "Traceback" not in text and "internal error" not in text, text
    if result.exit_code:
        slip = "Usage:" in result.stderr and "Error" in result.stderr  # typer's form
        assert slip or ("Error:" in result.stderr and "remedy:" in result.stderr), text
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


def config_cases() -> Iterator[Any]:
    dice = random.Random(0)
    for family in ("llama", "gpt2", "gemma2"):
        keys = pico(family).config.to_dict()
        for key in sorted(keys):
            for value in ["dropped", *dice.sample(ODD, CONFIG_CASES if family == "llama" else 1)]:
                yield pytest.param(family, {key: value}, id=f"{family}-{key}-{value}")
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
        "own code": {"model_type": "my", "auto_map": {"AutoConfig": "my.My", "AutoModelForCausalLM": "my.Model"}},
        "own code for a known type": {"architectures": ["My"], "auto_map": {"AutoModelForCausalLM": "my.Model"}},
        "eager": {"_attn_implementation": "banana"},
    }
    for name, changes in listed.items():
        yield pytest.param("llama", changes, id=name)


@pytest.mark.parametrize(("family", "changes"), config_cases())
def test_damaged_configs(family: str, changes: dict[str, Any], copy: Callable[[str], Path], text_file: Path) -> None:
    path = copy(family) / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "dropped"}))
    converting(path.parent, text_file, "--dry-run")
