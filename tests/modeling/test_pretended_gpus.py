"""Whole models on GPUs that are only pretended: devices and strides that kernels get, syncs, and copies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from pretended_gpus import CASES

# What transformers asks by itself where something looks at its mask, for the source as well.
OWN = "masking_utils.py"


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, ...], Any]:
    """What each case told, from a process of its own: the device that is pretended would stay."""
    script = Path(__file__).parents[1] / "pretended_gpus.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {tuple(line["case"]): line for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_models_on_pretended_gpus(case: tuple[str, str, str], found: dict[tuple[str, ...], Any]) -> None:
    """No device is mixed up; a pass waits once, a step copies nothing from the host, kernels read."""
    name, told = case[0], found[case]
    assert "error" not in told, told["error"]
    for call in told["calls"]:
        asked = {place: times for place, times in call["syncs"].items() if not place.startswith(OWN)}
        # The first step that reads asks the model's rotation, once, how long neighbours may be.
        first = call["encoded"] == told["calls"][2]["encoded"] and call["tokens"] == 1
        assert sum(asked.values()) <= 1 + first, call
        assert sum(call["syncs"].values()) == 1 or call["tokens"] > 1 or name in ("strict", "sliding") or first, call
    steps = [call for call in told["calls"] if call["tokens"] == 1][1:]  # the first makes tables
    # A block that leaves the window costs neither.
    assert len({step["encoded"] for step in steps}) == (len(steps) if name == "strict" else 2)
    assert not any(step["copies"] for step in steps), steps
    groups = {"sliding": 1, "first": 4, "selected": 6}.get(name, 2)  # of selected rows each layer has its own
    for launches in (step["launches"] for step in steps):
        assert launches.get("unpack_kernel", 0) == groups, launches
    assert sum(step["launches"].get("pack_kernel", 0) > 0 for step in steps) == (
        len(steps) if name in ("strict", "first") else 1
    ), steps
