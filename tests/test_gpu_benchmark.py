"""What is run where a GPU is at hand runs dry without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "on_gpu.py"


@pytest.mark.slow
def test_a_dry_run_ends_in_a_table_and_goes_on_where_it_was(tmp_path: Path) -> None:
    """A step that has ended is not run again, and one that was not run says so."""
    command = [sys.executable, str(SCRIPT), "--dry-run", "--output", str(tmp_path), "--steps", "kernels,planning"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert found["errors"]["tiny"]["float32"]["full"] < 1e-4 and found["seconds"] > 0
    assert "kernels: done" in done.stdout and "| planning | rank |" in done.stdout
    again = subprocess.run([*command, "--minutes", "0"], capture_output=True, text=True, check=True, env=environment)
    assert "kernels: done" not in again.stdout and again.stdout in done.stdout
    (tmp_path / "planning.json").unlink()
    (tmp_path / "planning.log").unlink()
    left = subprocess.run([*command, "--minutes", "0"], capture_output=True, text=True, check=True, env=environment)
    assert "| planning | not ended | not run |" in left.stdout
