"""Properties of any recipe, any plan and any batch, over random examples."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import pico
from helpers import converted_of, kept_bytes, plan_of, stats_of, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from torch import Tensor
from transformers import PreTrainedModel

from clla.artifacts.plan import LayerGroup, Plan
from clla.artifacts.stats import Stats
from clla.errors import UsageError
from clla.modeling.cache_clla import CllaCache
from clla.modeling.modeling_clla import CllaForCausalLM
from clla.modeling.sizes_clla import WORD_BITS
from clla.recipe import LARGEST, Recipe, load_recipe

TOLERANCE = {"atol": 2e-3, "rtol": 2e-3}  # as in test_model.py
COUNT = st.integers(1, LARGEST)
TEXT = st.text(max_size=30)  # controls, line separators, quotes, every script; no half surrogates
ANY = st.sampled_from([{"a": 1}, [[1]], [None], {}])  # nothing takes these


def share(low: float = 0.0, high: float = 1.0, **options: Any) -> st.SearchStrategy[float]:
    return st.floats(low, high, **options)


def odd(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values) | ANY


# For every field of every section: values that are right, and values that are not. None stands for the default.
FIELDS: dict[str, dict[str, tuple[st.SearchStrategy[Any], st.SearchStrategy[Any]]]] = {
    "calibration": {
        "dataset": (TEXT, odd(3, True, "\ud800")),
        "tokens": (st.none() | COUNT, odd(0, -1, 1.5, "many", True, LARGEST + 1, float("inf"))),
        "sequence_length": (st.none() | st.integers(32, LARGEST), odd(31, 0, "x", float("nan"))),
        "batch_size": (st.none() | COUNT, odd(0, -3, 2.5, False, 10**30)),
        "skip_positions": (st.integers(0, LARGEST), odd(-1, 0.5, None)),
        "seed": (st.integers(-LARGEST, LARGEST), odd(None, "x", 0.5, True, -(10**30))),
        "basis": (st.integers(16, LARGEST), odd(15, None, "x")),
    },
    "budget": {
        "kv_budget": (
            st.sampled_from(["6.25%", "0.5", "1440B", "1.5KiB", 0.03, 1440]) | share(0.01, 1.0).map(repr),
            odd("", "7", "x%", "101%", 0, -1, 7, float("inf"), True, None, "-3%", "1e999"),
        ),
        "budget_context": (st.none() | st.integers(0, LARGEST), odd(-1, 0.5, "x", True)),
        "exact_window": (st.none() | st.integers(0, LARGEST), odd(-1, 0.5, "x", True)),
        "num_sinks": (st.integers(0, LARGEST), odd(-1, None, 0.5)),
    },
    "plan": {
        "planner": (
            st.sampled_from(["dynamic", "uniform", "cluster", "pyramid", "kvsharer"]),
            odd("magic", None, 1, "Dynamic"),
        ),
        "sharing_order": (st.sampled_from(["similar", "dissimilar"]), odd("", None)),
        "reading_price": (share(0.0, 16.0), odd(-0.1, 16.5, None, "x", float("nan"), True)),
        "latent_input": (st.sampled_from(["all_layers", "first_layer"]), odd("third", None, True)),
        "key": (st.sampled_from(["reconstruct", "decoupled"]), odd("both", None, True)),
        "qk_rope_head_dim": (
            st.none() | st.integers(1, LARGEST // 8).map(lambda n: 8 * n),
            odd(0, -8, 12, LARGEST + 8, 1.5, True),
        ),
        "rope_bits": (st.sampled_from([1, 2, 3, 4, 5, 6, 8, 16]), odd(0, 9, None, "x")),
        "layout": (st.sampled_from(["free", "deepseek"]), odd("llama", None)),
        "max_layers_per_group": (st.none() | st.integers(1, 64), odd(0, 65, 1.5, True)),
        "bits": (
            st.lists(st.sampled_from(sorted(WORD_BITS)), min_size=1, max_size=12),
            odd([], [0], [9], [2, 32], 4, "x", None, [True], [1.5]),
        ),
        "tier_size": (st.integers(1, LARGEST // 8).map(lambda n: 8 * n), odd(0, -8, 12, None, LARGEST + 8, 10**30)),
        "metric": (st.sampled_from(["fisher", "pca", "weights", "asvd"]), odd("magic", None)),
        "metric_power": (share(), odd(-0.1, 1.1, float("nan"), float("inf"), None, True)),
        "flush_block": (COUNT, odd(0, None, 0.5)),
    },
    "runtime": {
        "placement": (st.sampled_from(["auto", "device", "spread", "stream"]), odd("nowhere", None, True)),
        "prefill_chunk": (COUNT, odd(0, None, "x")),
        "compute_dtype": (st.sampled_from(["auto", "float32", "bfloat16", "float16"]), odd("float64", None, 32)),
        "gradient_checkpointing": (st.sampled_from(["auto", "always", "never"]), odd("sometimes", None, True)),
    },
    "heal": {
        "tokens": (st.none() | COUNT, odd(0, 0.5, True)),
        "train": (st.none() | st.sampled_from(["codec", "attention", "all"]), odd("nothing", True, 1)),
        "codec_lr": (st.none() | share(exclude_min=True), odd(0, -1, float("inf"), float("nan"), "x", True)),
        "weight_lr": (st.none() | share(exclude_min=True), odd(0, -1, float("inf"), float("nan"), "x", True)),
        "sequence_length": (st.none() | st.integers(32, LARGEST), odd(31, "x")),
        "batch_tokens": (st.none() | COUNT, odd(0, -1, True)),
        "codec_share": (share(exclude_max=True), odd(1, -0.1, None, float("nan"))),
        "cache_share": (share(), odd(1.1, -0.1, None, float("nan"))),
        "evaluations": (COUNT, odd(0, None)),
        "dataset": (st.none() | TEXT, odd(3, True)),
        "gradient_checkpointing": (st.booleans(), odd(None, 2, "maybe")),
        "seed": (st.integers(-LARGEST, LARGEST), odd(None, "x", 0.5, True)),
    },
}


def test_every_field_has_its_strategies() -> None:
    sections = {name: field.annotation for name, field in Recipe.model_fields.items() if name in FIELDS}
    for name, section in sections.items():
        kind = next(k for k in (section, *getattr(section, "__args__", ())) if _is_model(k))
        assert set(FIELDS[name]) == set(kind.model_fields), name
    assert set(FIELDS) == set(Recipe.model_fields) - {"schema_version", "description", "provenance"}


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    """Recipes as they stand in YAML: some sections, some of their fields, every value right."""
    data: dict[str, Any] = {"description": draw(TEXT)} if draw(st.booleans()) else {}
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), unique=True)):
        chosen = draw(st.lists(st.sampled_from(sorted(FIELDS[name])), unique=True))
        data[name] = {field: draw(FIELDS[name][field][0]) for field in chosen}
    return data


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes") / "recipe.yaml"


def load(path: Path, data: dict[str, Any]) -> Recipe:
    path.write_text(yaml.safe_dump(data, allow_unicode=False), encoding="utf-8")
    return load_recipe(str(path))


@given(data=documents())
@settings(deadline=None, max_examples=60)
def test_any_valid_recipe_survives_yaml(data: dict[str, Any], recipe_file: Path) -> None:
    recipe = load(recipe_file, data)
    for section, values in data.items():
        if section == "description":
            assert recipe.description == values
            continue
        for field, value in values.items():
            kept = getattr(getattr(recipe, section), field)
            if field == "bits":
                assert kept == tuple(sorted(set(value)))
            else:
                assert kept == (str(value) if field == "kv_budget" else value), (section, field)
    recipe_file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(str(recipe_file)) == recipe
    assert load_recipe(str(recipe_file)).to_yaml() == recipe.to_yaml()


@pytest.mark.slow
@given(data=documents(), draw=st.data())
@settings(deadline=None, max_examples=120)
def test_any_wrong_field_is_named(data: dict[str, Any], draw: st.DataObject, recipe_file: Path) -> None:
    section = draw.draw(st.sampled_from(sorted(FIELDS)))
    field = draw.draw(st.sampled_from(sorted(FIELDS[section])))
    value = draw.draw(FIELDS[section][field][1])
    data[section] = {**data.get(section, {}), field: value}
    with pytest.raises(UsageError) as caught:
        load(recipe_file, data)
    lines = [line for line in caught.value.got.splitlines() if line.startswith("  ")]
    assert lines and all(line.startswith(f"  {section}.{field}") for line in lines), caught.value.got
    with pytest.raises(UsageError, match=rf"{section}\.{field}"):  # as options of the command line
        Recipe().override({section: {field: value if value is not None else {"a": 1}}})


@given(data=documents(), name=st.text("abcdefgh_", min_size=1, max_size=8), where=st.sampled_from(["", *FIELDS]))
@settings(deadline=None, max_examples=25)
def test_any_unknown_field_is_named(data: dict[str, Any], name: str, where: str, recipe_file: Path) -> None:
    if where:
        data[where] = {**data.get(where, {}), name: 1}
    else:
        data[name] = 1
    with pytest.raises(UsageError, match=f"{where}.{name}" if where else name):
        load(recipe_file, data)


@given(text=st.text(max_size=80) | st.text("{}[]:-#&*!|>'\"%@`,? \n\tab019.~", max_size=60))
@settings(deadline=None, max_examples=80)
def test_any_text_is_a_recipe_or_a_usage_error(text: str, recipe_file: Path) -> None:
    recipe_file.write_text(text, encoding="utf-8")
    try:
        assert isinstance(load_recipe(str(recipe_file)), Recipe)
    except UsageError as error:
        assert error.got and error.remedy


@cache
def model_and_stats() -> tuple[PreTrainedModel, Stats]:
    model = pico()
    return model, stats_of(model)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any partition of the four layers, any widths, any window, sinks and block."""
    model, stats = model_and_stats()
    source = draw(st.sampled_from(["group", "first"]))
    tier_size = draw(st.sampled_from([8, 16]))
    cuts = sorted(draw(st.sets(st.integers(1, 3))))
    groups = []
    for start, stop in zip([0, *cuts], [*cuts, 4], strict=True):
        bits = draw(
            st.lists(st.sampled_from(sorted(WORD_BITS)), max_size=4).map(lambda b: tuple(sorted(b, reverse=True)))
        )
        groups.append(LayerGroup(tuple(range(start, stop)), bits, 1.0))
    window = draw(st.integers(1, 40)) if source == "group" else draw(st.integers(0, 40))
    plan = plan_of(
        stats,
        model,
        source=source,
        tier_size=tier_size,
        window=window,
        sinks=draw(st.integers(0, 6)),
        flush_block=draw(st.integers(1, 12)),
    )
    return replace(plan, groups=tuple(groups))


@st.composite
def splits(draw: st.DrawFn, longest: int = 110) -> list[int]:
    """Where the calls of a context end: long ones, short ones, single tokens."""
    length = draw(st.integers(1, longest))
    ends = sorted(draw(st.sets(st.integers(1, length), max_size=6)) | {length})
    singles = draw(st.integers(0, 8))
    return [*ends, *range(length + 1, length + 1 + singles)]


@pytest.mark.slow
@given(plan=plans(), ends=splits(), batch=st.integers(1, 3), chunk=st.sampled_from([3, 7, 24, 512]))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_any_plan_takes_the_bytes_that_it_says(plan: Plan, ends: list[int], batch: int, chunk: int) -> None:
    """After every call, by the cache's own account and by looking for every tensor that it holds."""
    model, stats = model_and_stats()
    converted = converted_of(model, plan, stats, prefill_chunk=chunk)
    held, ids, start = converted.new_cache(), tokens(batch, ends[-1]), 0
    with torch.no_grad():
        for stop in ends:
            converted(ids[:, start:stop], past_key_values=held, logits_to_keep=1)
            start = stop
            bookkeeping = sum(t.nbytes for t in held.timeline.tensors())
            assert bookkeeping <= 16 * batch  # padding and offsets
            assert held.nbytes - bookkeeping == batch * plan.bytes_at(stop), stop
            assert kept_bytes([held.groups, held.timeline]) == held.nbytes
    converted.release_source()


@cache
def full_rank(source: str) -> CllaForCausalLM:
    model, stats = model_and_stats()
    groups = tuple((layer,) for layer in stats.layers) if source == "first" else ()
    return converted_of(model, plan_of(stats, model, groups=groups, source=source), stats)


@pytest.mark.slow
@given(
    source=st.sampled_from(["group", "first"]),
    window=st.integers(1, 30),
    sinks=st.integers(0, 6),
    block=st.integers(1, 8),
    chunk=st.integers(5, 60),
    ends=splits(longest=70),
    draw=st.data(),
)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_any_left_padding_changes_nothing(
    source: str, window: int, sinks: int, block: int, chunk: int, ends: list[int], draw: st.DataObject
) -> None:
    """At full rank: logits and sinks of every padded sequence in a batch are those of the sequence alone."""
    converted, length = full_rank(source), ends[-1]
    converted.config.clla.update(window=window, sinks=sinks, flush_block=block)
    converted.prefill_chunk = chunk
    padding = draw.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=4))
    ids = tokens(len(padding), length, seed=length)
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    found, held = in_calls(converted, ids, mask, ends)
    for row, count in enumerate(padding):
        with torch.no_grad():
            lone = converted.new_cache()
            alone = converted(ids[row : row + 1, count:], past_key_values=lone).logits
            plain = model_and_stats()[0](ids[row : row + 1, count:]).logits
        torch.testing.assert_close(found[row : row + 1, count:], alone, **TOLERANCE)
        torch.testing.assert_close(found[row : row + 1, count:], plain, **TOLERANCE)
        for mine, own in zip(held.groups, lone.groups, strict=True):
            assert mine.held is not None and own.held is not None
            kept = max(0, min(sinks, mine.encoded - count, own.encoded))  # sinks that left both windows
            same = mine.held.exact[:, row, :, :kept], own.held.exact[:, 0, :, :kept]
            torch.testing.assert_close(*same, **TOLERANCE)


@torch.no_grad()
def in_calls(converted: CllaForCausalLM, ids: Tensor, mask: Tensor, ends: list[int]) -> tuple[Tensor, CllaCache]:
    """Logits [B, T, V] and the cache, the input given in pieces as `generate` would."""
    held, parts, start = converted.new_cache(), [], 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for stop in ends:
        piece = slice(start, stop)
        output = converted(
            ids[:, piece], attention_mask=mask[:, :stop], position_ids=positions[:, piece], past_key_values=held
        )
        parts.append(output.logits)
        start = stop
    return torch.cat(parts, 1), held
