"""The real demo model, end to end: the claims of the README at a small scale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clla.cli import app


@pytest.mark.slow
def test_demo_model_keeps_its_quality_at_a_sixteenth_of_the_cache(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    command = ["convert", "demo", "-o", str(folder), "--calibration-tokens", "2048", "--no-eval", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["planned_bytes_per_token"] <= 0.0625 * 23040
    command = ["eval", str(folder), "--num-samples", "1", "--sequence-length", "512", "--contexts", "512"]
    result = CliRunner().invoke(app, [*command, "--no-retrieval", "--json"])
    assert result.exit_code == 0, result.stderr
    measured = json.loads(result.stdout)
    assert measured["converted"]["perplexity"] < 1.05 * measured["source"]["perplexity"]
    assert measured["cache"]["bytes_per_token"] == pytest.approx(measured["cache"]["planned_bytes_per_token"], rel=0.01)
    again = CliRunner().invoke(app, ["generate", str(folder), "--prompt", "Name a colour.", "--max-new-tokens", "8"])
    assert again.exit_code == 0 and again.stdout.strip()
