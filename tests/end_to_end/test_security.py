"""The code that travels with checkpoints: what it may import and call, and which files a checkpoint may hold."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, pico
from helpers import converted_of, plan_of, stats_of

import clla
from clla.checkpoint.write import finished_directory, write_checkpoint
from clla.modeling.modeling_clla import CODEC_FILE

FILES = sorted((Path(clla.__file__).parent / "modeling").glob("*.py"))
PACKAGES = {"torch", "transformers", "safetensors", "accelerate"}
STANDARD = {
    "__future__", "contextlib", "contextvars", "copy", "dataclasses", "functools", "hashlib", "inspect", "math",
    "re", "types", "typing",
}  # fmt: skip
# Kernels are compiled from shipped source; nothing else of Triton is needed, as it runs compilers and reads files.
KERNELS = {"triton", "triton.language"}
TRITON = {"jit", "cdiv", "next_power_of_2"}
# What tells a compiler that the user runs what it may leave alone; it compiles nothing.
MARKS = {"torch.compiler.disable", "torch.compiler.is_compiling", "torch._dynamo.mark_static_address"}
CALLS = {"eval", "exec", "compile", "__import__", "open", "input", "breakpoint", "globals", "locals", "delattr"}
# Parts of the packages that load pickles, fetch or run code.
PARTS = {
    "load", "save", "hub", "jit", "package", "serialization", "cpp_extension", "compiler", "_dynamo", "classes", "ops",
    "dynamic_module_utils", "multiprocessing", "distributed", "rpc",
}  # fmt: skip
SUFFIXES = {".safetensors", ".json", ".py", ".jinja", ".txt", ".model", ".yaml", ".md", ".png"}


def offences(source: str) -> list[str]:
    """What a module does that shipped code must not do, with line numbers."""
    found: list[str] = []
    nodes = list(ast.walk(ast.parse(source)))
    marks = [node for node in nodes if isinstance(node, ast.Attribute) and ".".join(_chain(node)) in MARKS]
    within_marks = [node.value for node in marks]
    for node in nodes:
        said: list[str] = []
        if isinstance(node, ast.Import):
            said += [f"import {alias.name}" for alias in node.names if not _is_allowed(alias.name)]
        elif isinstance(node, ast.ImportFrom):
            if node.level > 1 or (node.level == 0 and not _is_allowed(node.module or "")):
                said.append(f"from {'.' * node.level}{node.module or ''}")
            if node.level == 0 and node.module in KERNELS:
                said.append(f"from {node.module}")
            elif node.level == 0:
                said += [f"from {node.module} import {a.name}" for a in node.names if {a.name} & (PARTS | {"*"})]
        elif node in marks or node in within_marks:
            continue
        elif isinstance(node, ast.Attribute):
            chain = _chain(node)
            if chain and chain[0] in PACKAGES and PARTS & set(chain[1:]):
                said.append(".".join(chain))
            if chain and chain[0] == "triton" and chain[1] not in TRITON:
                said.append(".".join(chain))
            if node.attr.startswith("__") and node.attr not in ("__init__", "__name__", "__dict__"):
                said.append(f".{node.attr}")
        elif isinstance(node, ast.Name) and node.id in CALLS:
            said.append(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            said += [word for word in ("__subclasses__", "__globals__", "__builtins__") if word in node.value]
        elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "weights_only"):
            said.append(node.arg)
        found += [f"{getattr(node, 'lineno', 0)}: {what}" for what in said]
    return found


def _is_allowed(module: str) -> bool:
    top, *rest = module.split(".")
    return top in STANDARD or module in KERNELS or (top in PACKAGES and not PARTS & set(rest))


def _chain(node: ast.expr) -> list[str]:
    """`torch.hub.load` as its names; empty where it does not begin with a name."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *names[::-1]] if isinstance(node, ast.Name) else []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_shipped_code_keeps_to_what_it_needs(path: Path) -> None:
    assert offences(path.read_text(encoding="utf-8")) == []


def test_all_shipped_files_are_looked_at() -> None:
    assert {path.stem for path in FILES} >= {"modeling_clla", "cache_clla", "configuration_clla", "hooks_clla"}
    assert set(sys.stdlib_module_names) >= STANDARD


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import os; os.system('x')",
        "from os import system",
        "import subprocess",
        "import socket",
        "import urllib.request",
        "import importlib",
        "import numpy",
        "from clla import console",
        "from ..artifacts import Plan",
        "def f():\n    import shutil",
        "import torch.hub",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.jit.load('x')",
        "import torch\ntorch.ops.load_library('x')",
        "import torch\nc = torch.compiler",
        "import torch\ntorch.compiler.load_cache_artifacts(b'')",
        "import torch\ntorch._dynamo.config",
        "from torch import load",
        "from torch.serialization import load",
        "from torch import *",
        "import transformers.dynamic_module_utils",
        "from transformers.dynamic_module_utils import get_class_from_dynamic_module",
        "import transformers\ntransformers.AutoModel.from_pretrained('x', trust_remote_code=True)",
        "eval('1')",
        "f = exec",
        "compile('1', '', 'eval')",
        "__import__('os')",
        "open('x', 'w')",
        "().__class__.__base__",
        "getattr((), '__subclasses__')",
        "f.__globals__",
        "import triton.runtime",
        "from triton import compile",
        "from triton.compiler import ASTSource",
        "import triton\ntriton.compile('x')",
        "import triton\ntriton.runtime.driver.active",
    ],
)
def test_offences_are_found(source: str) -> None:
    assert offences(source)


@pytest.mark.parametrize("alone", [False, True], ids=["whole", "codec alone"])
def test_checkpoints_hold_no_pickles(alone: bool, tmp_path: Path) -> None:
    model = pico()
    stats = stats_of(model, batches=1)
    converted = converted_of(model, plan_of(stats, model, bits=4, rank=32), stats)
    base = {"path": str(tmp_path), "gguf_file": None, "hub_revision": None} if alone else None
    with finished_directory(tmp_path / "out") as folder:
        write_checkpoint(folder, converted, byte_tokenizer(), base_model=base)
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.suffix for path in written} <= SUFFIXES
    assert any(path.name == (CODEC_FILE if alone else "model.safetensors") for path in written)
    for path in written:
        head = path.read_bytes()[:4]
        assert not head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")), path.name
    code = {path.name for path in written if path.suffix == ".py"}
    assert code == {path.name for path in FILES if path.name.endswith("_clla.py")}
    for name in code:
        assert (tmp_path / "out" / name).read_text() == next(p for p in FILES if p.name == name).read_text()


def test_loading_a_checkpoint_runs_nothing_of_it(tmp_path: Path) -> None:
    """Without trust_remote_code the shipped files are text: the package's own code is what runs."""
    from transformers import AutoModelForCausalLM

    clla.register()
    model = pico()
    stats = stats_of(model, batches=1)
    converted = converted_of(model, plan_of(stats, model, bits=4, rank=32), stats)
    with finished_directory(tmp_path / "out") as folder:
        write_checkpoint(folder, converted, byte_tokenizer(), base_model=None)
    for path in (tmp_path / "out").glob("*.py"):
        path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit('ran')\n")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(converted) and not (tmp_path / "ran").exists()
    with torch.no_grad():
        assert loaded(torch.arange(50)[None]).logits.isfinite().all()
