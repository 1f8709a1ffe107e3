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
        assert list(asked.values()) == [1], call
        assert sum(call["syncs"].values()) == 1 or call["tokens"] > 1 or name in ("strict", "sliding"), call
    steps = [call for call in told["calls"] if call["tokens"] == 1][1:]  # the first makes tables
    # A block that leaves the window costs neither.
    assert len({step["encoded"] for step in steps}) == (len(steps) if name == "strict" else 2)
    assert not any(step["copies"] for step in steps), steps
    layers = 2 if name == "sliding" else 4
    for launches in (step["launches"] for step in steps):
        logits = {"strict": 0, "selected": 2 * layers}.get(name, layers)
        assert launches.get("logits_kernel", 0) == logits, launches
        # Of selected rows all components, of the others the first.
        assert launches.get("sums_kernel", 0) == (2 * layers if name == "selected" else layers), launches
        assert launches.get("absorbed_kernel", 0) == (layers if name == "strict" else 0), launches
    assert sum(step["launches"].get("pack_kernel", 0) > 0 for step in steps) == (
        len(steps) if name in ("strict", "first") else 1
    ), steps
