"""Whole models on GPUs that are only pretended: devices and strides that kernels get, syncs, and copies."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

pytest.skip("the answers to `tolist` are not counted as one yet, see `Answers`", allow_module_level=True)

from pretended_gpus import DTYPES, FORMS, HOMES  # noqa: E402


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, ...], Any]:
    """What each case told, from a process of its own: the device that is pretended would stay."""
    script = Path(__file__).with_name("pretended_gpus.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {tuple(line["case"]): line for line in lines}


@pytest.mark.parametrize(("name", "dtype", "homes"), product(FORMS, DTYPES, HOMES))
def test_models_on_pretended_gpus(name: str, dtype: str, homes: str, found: dict[tuple[str, ...], Any]) -> None:
    """No device is mixed up; a pass waits once, a step copies nothing from the host, kernels read."""
    told = found[name, dtype, homes]
    assert "error" not in told, told["error"]
    assert all(sum(call["syncs"].values()) == 1 for call in told["calls"]), told["calls"][-1]
    steps = [call for call in told["calls"] if call["tokens"] == 1][1:]  # the first makes tables
    assert len(steps) == 11 and not any(call["copies"] for call in steps), steps
    for launches in (call["launches"] for call in steps):
        logits = {"evict": 0, "strict": 0, "sliding": 0, "selected": 8}.get(name, 4)
        assert launches.get("logits_kernel", 0) == logits, launches
        assert launches.get("sums_kernel", 0) == (0 if name in ("evict", "sliding") else 4), launches
        assert launches.get("absorbed_kernel", 0) == (4 if name == "strict" else 0), launches
