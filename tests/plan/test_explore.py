"""Plans from kept statistics, against those of a conversion."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import clla
from random_stats import sampled

from clla.artifacts.plan import Plan
from clla.errors import CorruptArtifactError, UsageError
from clla.plan import kept_spectra, planners
from clla.plan.explore import Explorer, find_kept
from clla.plan.kept_spectra import KeptSpectra, load_spectra, prepare, save_spectra, shapes_of
from clla.plan.planners import PLANNERS, Room
from clla.plan.spectra import Spectra
from clla.recipe import PlanConfig, Recipe

LAYERS, BAND = 8, 4


@pytest.fixture(scope="module")
def work(pico_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work directory of a dry run."""
    folder = tmp_path_factory.mktemp("explored")
    dry(pico_dir, text_file, folder, "--kv-budget", "25%", "--budget-context", "512", "--exact-window", "16")
    return folder


def dry(model: Path, text: Path, work: Path, *options: str) -> Plan:
    """The plan of `clla convert --dry-run`."""
    small = ["--calibration-tokens", "2048", "--sequence-length", "256", "--dataset", str(text)]
    output = work.parent / "dry"
    done = clla("convert", model, "-o", output, "--work-dir", work, "--dry-run", *small, *options)
    assert done.exit_code == 0, done.output + done.stderr
    return Plan.load(output.with_name("dry-plan.json"))


@pytest.mark.parametrize(
    "options",
    (
        ("--kv-budget", "12.5%"),
        ("--kv-budget", "30%", "--num-sinks", "0"),
        ("--kv-budget", "90B", "--budget-context", "0"),
        ("--kv-budget", "25%", "--planner", "uniform", "--bits", "2,4"),
        ("--kv-budget", "25%", "--planner", "cluster"),
    ),
)
def test_plans_are_those_of_a_dry_run(
    work: Path, pico_dir: Path, text_file: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    options = options if "--budget-context" in options else (*options, "--budget-context", "512")
    options = options if "--exact-window" in options else (*options, "--exact-window", "16")
    done = clla("plan", work, *options, "--save", tmp_path / "plan.json", "--json")
    assert done.exit_code == 0, done.output + done.stderr
    assert Plan.load(tmp_path / "plan.json") == dry(pico_dir, text_file, work, *options)
    assert json.loads(done.stdout)["plan"] == Plan.load(tmp_path / "plan.json").to_json()


def test_kept_spectra_give_every_plan_without_the_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With groups too large for all spectra to be searched: the same plans to the last bit, the moments never read."""
    for module in (planners, kept_spectra):
        monkeypatch.setattr(module, "CHEAP", 50)
    stats = sampled(num_layers=LAYERS, head_dim=24, hidden=80, band=BAND, tokens=2000, noise=0.2).stats
    stats.save(tmp_path / "stats.safetensors")
    full = Spectra(stats)
    prepare(full, PlanConfig().bits)
    save_spectra(tmp_path / "spectra.safetensors", full, "key")

    def never() -> Spectra:
        raise AssertionError("the moments were read")

    shapes = shapes_of(tmp_path / "stats.safetensors")
    assert shapes.covariance.is_meta and shapes.layers == stats.layers and shapes.width == stats.width
    for planner in ("dynamic", "uniform", "pyramid"):
        config = PlanConfig(max_layers_per_group=BAND, planner=planner)
        for share in (0.01, 0.03, 0.0625, 0.1, 0.17, 0.25, 0.4):
            room = Room(int(share * 16 * LAYERS * stats.width))
            kept = load_spectra(tmp_path / "spectra.safetensors", shapes, 0.75, "group", never)
            wanted = PLANNERS[planner](Spectra(stats), config, room, lambda _: None, lambda _: 0.0)
            assert PLANNERS[planner](kept, config, room, lambda _: None, lambda _: 0.0) == wanted


def test_what_is_lacking_is_computed_and_kept(tmp_path: Path) -> None:
    stats = sampled(num_layers=4, band=3).stats
    stats.save(tmp_path / "stats.safetensors")
    one = Spectra(stats)
    one.eigenvalues(0, 2)
    save_spectra(tmp_path / "s.safetensors", one, "key")
    kept = load_spectra(
        tmp_path / "s.safetensors", shapes_of(tmp_path / "stats.safetensors"), 0.75, "group", lambda: one
    )
    assert (kept.eigenvalues(0, 2) == one.eigenvalues(0, 2)).all() and "whole" not in vars(kept)
    assert (kept.eigenvalues(1, 3) == Spectra(stats).eigenvalues(1, 3)).all() and kept.whole is one
    save_spectra(tmp_path / "s.safetensors", kept, "key")
    again = load_spectra(tmp_path / "s.safetensors", kept.stats, 0.75, "group", lambda: one)
    assert set(again._found) == {(0, 2), (1, 3)}


def test_damaged_spectra_are_computed_again(work: Path, tmp_path: Path) -> None:
    explorer = Explorer(find_kept(work), Recipe())
    before = explorer.path.read_bytes()
    wanted = explorer.plan(Recipe().override({"budget": {"kv_budget": "50%"}}))
    explorer.path.write_bytes(before[:-9] + bytes(9))
    with pytest.raises(CorruptArtifactError):
        load_spectra(explorer.path, explorer.kept.shapes, 0.75, "group", lambda: explorer.spectra)
    afresh = Explorer(find_kept(work), Recipe())
    assert not isinstance(afresh.spectra, KeptSpectra)
    assert afresh.plan(Recipe().override({"budget": {"kv_budget": "50%"}})) == wanted
    afresh.prepare(lambda _: None)
    assert isinstance(Explorer(find_kept(work), Recipe()).spectra, KeptSpectra)


def test_sweep_as_table_json_and_picture(work: Path, tmp_path: Path) -> None:
    common = ("plan", work, "--sweep", "--budgets", "12.5%,25%,50%", "--exact-window", "16", "--budget-context", "512")
    picture = tmp_path / "frontier.png"
    done = clla(*common, "--json", "--plot", picture)
    assert done.exit_code == 0, done.output + done.stderr
    rows = json.loads(done.stdout)
    assert [row["budget"] for row in rows] == ["12.5%", "25%", "50%"] and picture.read_bytes()[1:4] == b"PNG"
    losses = [row["predicted_loss"] for row in rows]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[2]
    assert all(row["share"] <= float(row["budget"][:-1]) / 100 for row in rows)
    table = clla(*common)
    assert table.exit_code == 0 and all(f"{row['row_bytes']:,}" in table.stdout for row in rows)


def test_budgets_that_hold_nothing_are_left_out_of_a_sweep(work: Path) -> None:
    """The window belongs to the statistics, and at small budgets it leaves nothing for latents."""
    done = clla("plan", work, "--sweep", "--budgets", "0.01%,25%", "--json")
    assert done.exit_code == 0, done.output + done.stderr
    assert [row["budget"] for row in json.loads(done.stdout)] == ["25%"]
    assert "0.01% is left out: the budget of" in done.stderr and "leaves nothing" in done.stderr


@pytest.mark.parametrize(
    ("options", "word"),
    (
        (("--planner", "kvsharer"), "model"),
        (("--latent-input", "first_layer"), "inputs"),
        (("--sweep", "--kv-budget", "3%"), "--sweep"),
        (("--budgets", "3%"), "--sweep"),
        (("--sweep", "--budgets", "300%"), "(--budgets): Value error"),
        (("--sweep", "--budgets", "0.01%"), "raise --budgets"),
        (("--kv-budget", "0.01%"), "leaves nothing"),
    ),
)
def test_what_cannot_be_planned_is_refused(work: Path, options: tuple[str, ...], word: str) -> None:
    done = clla("plan", work, *options)
    assert done.exit_code == 2 and word in done.stderr


def test_groups_larger_than_the_band_are_refused(work: Path) -> None:
    kept = find_kept(work)
    narrow = replace(kept, shapes=replace(kept.shapes, covariance=kept.shapes.covariance[:, :2]))
    wide: dict[str, dict[str, Any]] = {"plan": {"max_layers_per_group": 4}, "budget": {"kv_budget": "25%"}}
    with pytest.raises(UsageError, match="neighbours"):
        Explorer(narrow, Recipe()).settle(Recipe().override(wide))
    settled = Explorer(narrow, Recipe()).settle(Recipe().override({"budget": wide["budget"]}))
    assert settled.plan.max_layers_per_group == 2  # where none is asked for, as many as the moments have
    told = Explorer(narrow, Recipe()).told_of_groups([Recipe().override({"budget": wide["budget"]})])
    assert told is not None and "at most 2 layers" in told
    asked = Recipe().override({"plan": {"max_layers_per_group": 2}, "budget": wide["budget"]})
    assert Explorer(narrow, Recipe()).told_of_groups([asked]) is None


def test_plans_are_read_for_the_window_of_the_statistics(work: Path, tmp_path: Path) -> None:
    """Of plans in a folder that of the statistics' own window counts, whichever is newer."""
    for file in work.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    other = json.loads(next(tmp_path.glob("plan-*.json")).read_text())
    other["window"] = 32
    (tmp_path / "plan-later.json").write_text(json.dumps(other))
    assert find_kept(tmp_path).plan.window == 16


def test_a_place_without_statistics_is_refused(tmp_path: Path) -> None:
    for where in (tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError, match="no statistics"):
            find_kept(where)
    sampled().stats.save(tmp_path / "stats-x.safetensors")
    with pytest.raises(UsageError, match="no plan"):
        find_kept(tmp_path)
    (tmp_path / "stats-x.safetensors").write_bytes(b"no")
    with pytest.raises(CorruptArtifactError):
        find_kept(tmp_path)


def test_statistics_know_their_window(work: Path) -> None:
    done = clla("plan", work, "--kv-budget", "25%", "--exact-window", "32")
    assert done.exit_code == 2 and "--exact-window 32 --dry-run" in " ".join((done.output + done.stderr).split())
