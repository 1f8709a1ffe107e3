"""Spectra and the loss at other budgets, as conversions save them for reports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import pico
from helpers import clla, stats_of

from clla.artifacts.codec import Codec
from clla.artifacts.plan import Plan
from clla.artifacts.stats import Stats
from clla.plan.allocation import candidate, solve
from clla.plan.budget import Budget
from clla.plan.frontier import POINTS, make_outlook
from clla.plan.make import make_plan
from clla.plan.spectra import Spectra
from clla.recipe import PlanConfig

CONFIG = PlanConfig(max_layers_per_group=6)


@pytest.fixture(scope="module")
def stats() -> Stats:
    return stats_of(pico(), with_inputs=False)


def planned(stats: Stats, spectra: Spectra, budget: float) -> Plan:
    return make_plan(
        stats, CONFIG, budget=Budget(budget, None, 16, 4), kv_itemsize=4, kept_layers=(), kept_window=0,
        made_from="test", spectra=spectra,
    )  # fmt: skip


def test_spectra_are_those_of_the_groups(stats: Stats) -> None:
    spectra = Spectra(stats)
    plan = planned(stats, spectra, 64)
    found = make_outlook(spectra, plan, CONFIG.bits)["spectra"]
    assert len(found) == len(plan.groups)
    for group, spectrum in zip(plan.groups, found, strict=True):
        start, size = group.layers[0], len(group.layers)
        values = spectra.eigenvalues(start, size)
        assert spectrum["components"] == len(values) == size * stats.kv.values
        assert spectrum["component"][0] == 0 and spectrum["component"][-1] == len(values) - 1
        assert len(spectrum["component"]) <= POINTS and spectrum["component"] == sorted(set(spectrum["component"]))
        picked = values[spectrum["component"]]
        torch.testing.assert_close(torch.tensor(spectrum["worth"], dtype=torch.float64), picked, rtol=1e-3, atol=0)
        assert spectrum["energy"] == pytest.approx(float(values.sum()), rel=1e-3)


def test_the_frontier_is_what_the_planner_finds(stats: Stats) -> None:
    """Loss falls with bytes, is the plan's own at its bytes, and that of a new plan for the same groups at others."""
    spectra = Spectra(stats)
    plan = planned(stats, spectra, 64)
    frontier = make_outlook(spectra, plan, CONFIG.bits)["frontier"]
    row_bytes, loss = frontier["row_bytes"], frontier["loss"]
    assert row_bytes == sorted(row_bytes) and loss == sorted(loss, reverse=True) and len(loss) > 8
    segments = [(group.layers[0], len(group.layers)) for group in plan.groups]
    options = {s: candidate(spectra.eigenvalues(*s), spectra.energy(*s), plan.tier_size) for s in segments}
    for budget in (plan.row_bytes, plan.row_bytes // 2, plan.row_bytes * 2):
        solved = solve(options, num_layers=4, budget_bits=8 * budget, widths=CONFIG.bits, tier_size=plan.tier_size)
        wanted = sum(choice.loss for choice in solved.values()) / plan.predicted_loss
        spent = sum(choice.total_bits for choice in solved.values()) / 8
        nearest = min(range(len(loss)), key=lambda i: abs(row_bytes[i] - spent))
        assert loss[nearest] == pytest.approx(wanted, rel=0.25), budget


def test_an_empty_spectrum_has_no_frontier(stats: Stats) -> None:
    """Layers that hold nothing: no division by zero."""
    still = replace(stats, covariance=torch.zeros_like(stats.covariance))
    spectra = Spectra(still)
    plan = replace(planned(stats, Spectra(stats), 64), made_from="still")
    found = make_outlook(spectra, plan, CONFIG.bits)
    assert found["frontier"] == {"row_bytes": [], "loss": []}


@pytest.mark.slow
def test_the_codec_keeps_the_outlook_and_an_older_one_gets_it(pico_dir: Path, text_file: Path, tmp_path: Path) -> None:
    options = ["--dataset", text_file, "--calibration-tokens", 1024, "--sequence-length", 128, "--no-eval"]
    options += ["--exact-window", 8, "--budget-context", 0, "--kv-budget", "3%", "--work-dir", tmp_path / "work"]

    def outlook(folder: str) -> dict[str, object]:
        done = clla("convert", pico_dir, "-o", tmp_path / folder, *options)
        assert done.exit_code == 0, done.output + done.stderr
        return json.loads((tmp_path / folder / "clla_report.json").read_text())["outlook"]

    first = outlook("first")
    assert first["spectra"] and first["frontier"]
    (path,) = (tmp_path / "work").glob("codec-*.safetensors")
    codec = Codec.load(path)
    assert codec.outlook == first
    replace(codec, outlook={}).save(path)
    assert outlook("second") == first and Codec.load(path).outlook == first
