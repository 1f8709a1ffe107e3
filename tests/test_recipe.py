"""Recipes: built-in ones, mistakes with their paths, overrides, and the budget's notation."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from clla.errors import UsageError
from clla.recipe import RECIPE_VERSION, Provenance, Recipe, load_recipe, parse_budget
from clla.recipes import builtin_recipes

SOURCE = 23_040.0


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_built_in_recipes_load_and_describe_themselves() -> None:
    names = builtin_recipes()
    assert {"balanced", "near-lossless", "compact", "two-percent"} <= set(names)
    for name in names:
        recipe = load_recipe(name)
        assert recipe.description and recipe.schema_version == RECIPE_VERSION
    shares = [
        parse_budget(load_recipe(name).budget.kv_budget, source_bytes=1000)
        for name in ("near-lossless", "balanced", "compact", "two-percent")
    ]
    assert shares == [125.0, 62.5, 30.0, 20.0]


def test_an_empty_mapping_is_the_default_recipe(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path, "{}")) == Recipe()


def test_every_field_says_what_it_is() -> None:
    for section in ("calibration", "budget", "plan", "runtime"):
        for name, field in type(getattr(Recipe(), section)).model_fields.items():
            assert field.description, f"{section}.{name}"


def test_all_mistakes_are_listed_at_once_with_their_paths(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        colour: red
        calibration: {tokns: 5, sequence_length: 1}
        budget: {kv_budget: 7x, windw: 3, num_sinks: -1}
        plan: {bits: [2, 9], tier_size: 12, planner: magic}
        runtime: {prefill_chunk: many}
        """,
    )
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    lines = [line.strip().split(":")[0] for line in caught.value.got.splitlines()[1:]]
    assert sorted(lines) == sorted(
        [
            "colour",
            "calibration.tokns",
            "calibration.sequence_length",
            "budget.kv_budget",
            "budget.windw",
            "budget.num_sinks",
            "plan.bits",
            "plan.tier_size",
            "plan.planner",
            "runtime.prefill_chunk",
        ]
    )
    assert "10 mistakes" in caught.value.got and path in caught.value.got and caught.value.exit_code == 2


def test_one_mistake_is_one_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"1 mistake\n"):
        load_recipe(written(tmp_path, "plan: {max_layers_per_group: 0}"))


@pytest.mark.parametrize(
    "text",
    [
        "- a\n- b",
        "just words",
        "",
        "{unclosed: [",
        "a: b: c",
        "calibration: 3",
        "plan: [1]",
        "budget: {kv_budget: yes}",
        "budget: {kv_budget: 3%}\nplan: {}\nbudget: {exact_window: 16}",
        "budget: {exact_window: 16, exact_window: 32}",
        "plan: {bits: [yes]}",
        "when: 2024-13-45",
        "heal: {codec_lr: .inf}",
        "budget: {kv_budget: 1e999}",
    ],
)
def test_documents_that_are_no_recipe_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        load_recipe(written(tmp_path, text))


def test_binary_files_and_missing_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UsageError, match="not YAML"):
        load_recipe(str(tmp_path / "binary"))
    with pytest.raises(UsageError, match="balanced"):
        load_recipe("no-such-recipe")
    with pytest.raises(UsageError, match="no recipe"):
        load_recipe(str(tmp_path))


def test_a_newer_schema_says_to_upgrade_before_its_keys_are_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="schema_version 2") as caught:
        load_recipe(written(tmp_path, "schema_version: 2\nunheard_of: {a: 1}"))
    assert "upgrade" in caught.value.remedy and "unheard_of" not in str(caught.value)


@pytest.mark.parametrize("version", ("0", "'1'", "1.5", "null", "one"))
def test_other_schema_versions_are_refused(version: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="schema_version"):
        load_recipe(written(tmp_path, f"schema_version: {version}"))


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().budget.num_sinks = 5  # type: ignore[misc]


def test_overrides_replace_what_is_given_and_nothing_else() -> None:
    recipe = load_recipe("compact")
    changed = recipe.override(
        {
            "budget": {"kv_budget": "9%", "exact_window": None, "num_sinks": 0},
            "plan": {"bits": [8, 2, 2]},
            "runtime": {},
        }
    )
    assert changed.budget.kv_budget == "9%" and changed.budget.num_sinks == 0 and changed.budget.exact_window is None
    assert changed.plan.bits == (2, 8)
    assert changed.calibration == recipe.calibration and changed.description == recipe.description
    assert recipe.budget.kv_budget == "3%", "the original is untouched"
    assert recipe.override({}) == recipe
    assert (
        recipe.override({"budget": {"exact_window": 32}})
        .override({"budget": {"exact_window": None}})
        .budget.exact_window
        == 32
    )


def test_overrides_are_validated_together() -> None:
    with pytest.raises(UsageError) as caught:
        Recipe().override({"budget": {"kv_budget": "200%"}, "plan": {"tier_size": 7, "colour": 1}})
    assert "3 mistakes" in caught.value.got
    assert all(path in caught.value.got for path in ("budget.kv_budget", "plan.tier_size", "plan.colour"))


@pytest.mark.parametrize("name", ["default", *builtin_recipes()])
def test_yaml_round_trip(name: str, tmp_path: Path) -> None:
    recipe = Recipe(description="Größe – ≥ 2 %") if name == "default" else load_recipe(name)
    where = Provenance(model="a/b", revision="abc", versions={"clla": "0.1.0"})
    for variant in (
        recipe,
        recipe.override({"calibration": {"tokens": 77}, "budget": {"budget_context": 0, "exact_window": 0}}),
        recipe.model_copy(update={"provenance": where}),
    ):
        text = variant.to_yaml()
        assert load_recipe(written(tmp_path, text)) == variant
        assert next(iter(yaml.safe_load(text))) == "schema_version"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6.25%", 1440.0),
        (" 6.25 % ", 1440.0),
        ("0.0625", 1440.0),
        ("1440B", 1440.0),
        ("1440 bytes", 1440.0),
        ("1440", 1440.0),
        ("100%", SOURCE),
        ("1", SOURCE),
        ("1.0", SOURCE),
        ("1%", 230.4),
        (".5", 11_520.0),
        ("5e-2", 1152.0),
        ("1.5KB", 1500.0),
        ("1.5KiB", 1536.0),
        ("0.5B", 0.5),
        ("23040B", SOURCE),
    ],
)
def test_budgets_read_as_bytes(text: str, expected: float) -> None:
    assert parse_budget(text, source_bytes=SOURCE) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "%",
        "half",
        "-5%",
        "0",
        "0%",
        "0B",
        "100.1%",
        "23041B",
        "1e9",
        "1e999",
        "nan",
        "inf",
        "5.5.5%",
        "5 %%",
        "3GB",
    ],
)
def test_budgets_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_budget(text, source_bytes=SOURCE)
    assert caught.value.expected and caught.value.remedy


@pytest.mark.parametrize("text", ["6.25", "2", "100", "1.5"])
def test_numbers_that_could_be_percent_or_bytes_ask_for_a_unit(text: str) -> None:
    with pytest.raises(UsageError, match="no unit") as caught:
        parse_budget(text, source_bytes=SOURCE)
    assert f"{text}%" in caught.value.expected and f"{text}B" in caught.value.expected


@given(st.floats(1e-6, 1.0))
@settings(deadline=None, max_examples=50)
def test_share_percent_and_bytes_agree(share: float) -> None:
    expected = share * SOURCE
    assert parse_budget(repr(share), source_bytes=SOURCE) == pytest.approx(expected)
    assert parse_budget(f"{share * 100!r}%", source_bytes=SOURCE * (1 + 1e-12)) == pytest.approx(expected)
    assert parse_budget(f"{expected!r}B", source_bytes=SOURCE * (1 + 1e-12)) == pytest.approx(expected)


@pytest.mark.parametrize(("value", "text"), [(0.0625, "0.0625"), (1440, "1440"), (1e-05, "1e-05"), ("3%", "3%")])
def test_yaml_numbers_are_budgets_too(value: float | str, text: str) -> None:
    recipe = Recipe.model_validate({"budget": {"kv_budget": value}})
    assert recipe.budget.kv_budget == text
    assert parse_budget(text, source_bytes=SOURCE) > 0


@pytest.mark.parametrize("text", ["\x85", "a\u2028b", "a\u2029 b\n", "tab\tand \ufeff mark", " plain: 'text' #"])
def test_descriptions_survive_yaml(text: str, tmp_path: Path) -> None:
    """Also signs that YAML takes for ends of lines."""
    path = tmp_path / "recipe.yaml"
    path.write_text(Recipe(description=text).to_yaml(), encoding="utf-8")
    assert load_recipe(str(path)).description == text
