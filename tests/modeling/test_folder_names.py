"""Checkpoints bring their code along, whatever their folders are called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import pico
from helpers import converted_of, plan_of, stats_of, strict_of, tokens

FOLDERS = ("out-6.25%", "my model (1)", "模型")
SCRIPT = """
import json, sys
sys.modules["clla"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM
ids, options, *folders = map(json.loads, sys.argv[1:])
models = [AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) for folder in folders]
print(json.dumps([model.generate(torch.tensor(ids), **options).tolist() for model in models]))
names = [sys.modules[type(model).__module__.replace("modeling_clla", "unpack_triton_clla")] for model in models]
assert len({module.NAMESPACE for module in names}) == len(folders), names
"""


@pytest.mark.slow
def test_folders_of_any_name_load_side_by_side(tmp_path: Path) -> None:
    """In one process, without the package; what each registers by name does not get into another's way."""
    model = pico()
    stats, ids = stats_of(model, with_queries=True, batches=1), tokens(1, 30)
    small: dict[str, Any] = {"groups": ((0, 1), (2, 3)), "bits": 4, "rank": 48}
    kinds = (
        converted_of(model, plan_of(stats, model, **small, window=8), stats),
        strict_of(model, stats, components=16, rope_bits=6, **small)[0],
    )
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 258}
    expected = []
    for i, folder in enumerate(FOLDERS):
        kinds[i % 2].save_pretrained(tmp_path / folder)
        expected.append(kinds[i % 2].generate(ids, **options).tolist())
    arguments = [json.dumps(x) for x in (ids.tolist(), options, *(str(tmp_path / folder) for folder in FOLDERS))]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == expected
