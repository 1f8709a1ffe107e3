"""Speed and memory side by side: what a run reports, the shapes it builds, and mistakes. No time is judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import pico
from helpers import clla, converted_of, plan_of, stats_of, tokens

from clla.bench.largest_batch import largest, largest_batches
from clla.bench.options import Options
from clla.bench.pair import Pair, random_pair
from clla.bench.peak import ProcessPeak, watch_peak
from clla.bench.run import run_bench
from clla.bench.shapes import SHAPES, mixed_tiers, random_plan, shape_config
from clla.bench.speed import Contender, Work, attempt, draw_ids, measure, run_pass
from clla.errors import UsageError
from clla.modeling.quantize_clla import RowLayout

CPU = torch.device("cpu")
FAST = ["--new-tokens", 4, "--repeats", 1, "--device", "cpu"]


def bench(*arguments: object) -> dict[str, Any]:
    done = clla("bench", *arguments, *FAST, "--json")
    assert done.exit_code == 0, done.output + done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def run(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A checkpoint, two contexts by two batches, with everything that can be asked for."""
    plot = tmp_path_factory.mktemp("plot") / "speed.png"
    options = ["--contexts", "300,100", "--batch-sizes", "1,3", "--largest-batch", "--memory-limit", "500KB"]
    return bench(checkpoint, *options, "--plot", plot) | {"picture": plot}


@pytest.mark.slow
def test_rows_cover_contexts_and_batches(run: dict[str, Any]) -> None:
    assert [(row["context"], row["batch"]) for row in run["rows"]] == [(100, 1), (100, 3), (300, 1), (300, 3)]
    for row in run["rows"]:
        for name in ("source", "converted"):
            figures = {k: v for k, v in row[name].items() if "peak" not in k and k != "decode_by_repeat"}
            assert all(value > 0 for value in figures.values()), figures
            assert row[name]["prefill_peak_bytes"] >= 0 and row[name]["decode_peak_bytes"] >= 0
            assert len(row[name]["decode_by_repeat"]) == 1
        for key in ("decode_tokens_per_s", "prefill_tokens_per_s", "cache_bytes"):
            assert row["ratio"][key] == pytest.approx(row["converted"][key] / row["source"][key])


@pytest.mark.slow
def test_bytes_are_those_planned(run: dict[str, Any]) -> None:
    """And the source's are keys and values of every token."""
    for row in run["rows"]:
        converted, tokens_held = row["converted"], row["context"] * row["batch"]
        assert converted["cache_bytes"] == pytest.approx(converted["planned_bytes"], rel=0.01)
        assert row["source"]["cache_bytes"] == tokens_held * 4 * 2 * 2 * 16 * 4  # layers, KV, heads, dim, fp32
        assert converted["cache_bytes_per_token"] == converted["cache_bytes"] / tokens_held


@pytest.mark.slow
def test_generate_starts_from_the_longest_context(run: dict[str, Any]) -> None:
    generated = run["generate"]
    assert generated["context"] == 300
    rates = [generated[name]["tokens_per_s"] for name in ("source", "converted")]
    assert min(rates) > 0 and generated["ratio"]["tokens_per_s"] == pytest.approx(rates[1] / rates[0])
    assert generated["source"]["first_token"] > 0


@pytest.mark.slow
def test_largest_batch_keeps_to_the_limit(run: dict[str, Any]) -> None:
    """One sequence more would not fit: every sequence takes as much as the others."""
    most = run["largest_batch"]
    assert most["context"] == 300 and "0.5 MB" in most["basis"] and "caches" in most["basis"]
    for name in ("source", "converted"):
        batch, nbytes = most[name]["batch"], most[name]["cache_bytes"]
        assert nbytes <= 1.01 * 500_000 < nbytes * (batch + 1) / batch * 1.02
        assert most[name]["decode_tokens_per_s"] > 0
    assert most["ratio"]["batch"] == most["converted"]["batch"] / most["source"]["batch"] > 1


@pytest.mark.slow
def test_what_it_ran_on_is_named(run: dict[str, Any]) -> None:
    machine, settings = run["machine"], run["settings"]
    assert machine["device"] == "cpu" and machine["name"] and machine["torch"] == torch.__version__
    assert machine["threads"] == torch.get_num_threads() and machine["date"].startswith("20")
    assert settings["dtype"] == "float32" and settings["contexts"] == [100, 300] and settings["repeats"] == 1
    assert "resident size" in run["memory"] and run["weights_bytes"] > run["codec_bytes"] > 0
    assert run["picture"].stat().st_size > 10_000


@pytest.mark.slow
def test_the_table_has_both_models() -> None:
    done = clla("bench", "--shape", "tiny", "--contexts", "64", *FAST)
    assert done.exit_code == 0, done.output + done.stderr
    for word in ("source", "converted", "decode", "tok/s", "generate() after 64", "planned"):
        assert word in done.stdout
    assert "largest batch" not in done.stdout


@pytest.mark.slow
def test_a_shape_keeps_its_budget() -> None:
    found = bench("--shape", "tiny", "--kv-budget", "12.5%", "--max-layers-per-group", 3, "--contexts", "200")
    assert found["settings"]["layer_groups"] == [3, 3] and found["settings"]["dtype"] in ("bfloat16", "float32")
    assert found["settings"]["latents_share"] == pytest.approx(0.125, rel=0.01)
    row = found["rows"][0]["converted"]
    assert row["cache_bytes"] == pytest.approx(row["planned_bytes"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("budget", [0.03, 0.0625, 0.25, 0.45])
def test_plans_of_shapes_spend_their_budget(name: str, budget: float) -> None:
    plan = random_plan(shape_config(name), kv_budget=f"{100 * budget}%", max_layers_per_group=6)
    assert plan.row_bytes == pytest.approx(budget * plan.source_bytes_per_token, rel=0.01)
    assert sum((group.layers for group in plan.groups), ()) == tuple(range(plan.num_layers))
    for group in plan.groups:
        assert 8 * len(group.tier_bits) <= len(group.layers) * plan.kv.values
        RowLayout(group.tier_bits, plan.tier_size)


PUBLISHED = {  # weights, layers, bytes per token in bf16
    "smollm2-135m": (134_515_008, 30, 23_040),
    "llama-3.2-1b": (1_235_814_400, 16, 32_768),
    "llama-3-8b": (8_030_261_248, 32, 131_072),
    "qwen3-8b": (8_190_735_360, 36, 147_456),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_are_the_published_ones(name: str) -> None:
    from transformers import AutoModelForCausalLM

    config = shape_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    plan = random_plan(config, kv_budget="6.25%", max_layers_per_group=6)
    assert (sum(p.numel() for p in model.parameters()), plan.num_layers, plan.source_bytes_per_token) == PUBLISHED[name]


def test_a_sixteenth_is_mixed_as_real_plans_are() -> None:
    tiers = mixed_tiers(288, most=288, tier_size=8)  # of six layers of SmolLM2-135M
    shares = {bits: tiers.count(bits) / len(tiers) for bits in range(1, 7)}
    assert sum(shares.values()) == pytest.approx(1) and shares[1] == pytest.approx(0.3, abs=0.03)
    assert 0.02 <= shares[6] <= 0.06 and shares[2] == pytest.approx(0.3, abs=0.03)


def test_a_random_model_is_made_in_its_dtype_once() -> None:
    pair = random_pair("tiny", kv_budget="6.25%", max_layers_per_group=6, device=CPU, dtype="bfloat16", seed=0)
    assert {p.dtype for p in pair.converted.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in pair.converted.parameters())
    weights = pair.converted.source.model.layers[0].mlp.up_proj.weight
    assert float(weights.float().std()) == pytest.approx(0.02, rel=0.1)
    rotary = pair.converted.source.model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32 and float(rotary[0]) == 1.0
    logits = pair.converted(tokens(2, 200) % 256).logits
    assert bool(logits.isfinite().all())


def test_tokens_are_ordinary_and_the_same_for_a_seed() -> None:
    special = {0, 1, 2, 17}
    ids = draw_ids((3, 400), vocab_size=40, left_out=special, seed=5, device=CPU)
    assert not special & set(ids.flatten().tolist()) and int(ids.max()) == 39
    assert torch.equal(ids, draw_ids((3, 400), vocab_size=40, left_out=special, seed=5, device=CPU))
    assert not torch.equal(ids, draw_ids((3, 400), vocab_size=40, left_out=special, seed=6, device=CPU))


@pytest.fixture(scope="module")
def pair() -> Pair:
    """A converted pico without a checkpoint."""
    model = pico()
    stats = stats_of(model, batches=1)
    plan = plan_of(stats, model, bits=8)
    return Pair("pico", converted_of(model, plan, stats), plan, set())


def test_a_repeated_sequence_is_as_one_prefilled_several_times(pair: Pair) -> None:
    held: list[Any] = []
    for contender in pair.contenders(static=False, source_chunk=32).values():

        def new_cache(length: int, make: Any = contender.new_cache) -> Any:
            held.append(make(length))
            return held[-1]

        kept = Contender(contender.model, new_cache, contender.chunk)
        first = run_pass(kept, tokens(1, 86), Work(context=80, new_tokens=6, copies=3))
        second = run_pass(kept, tokens(1, 86).repeat(3, 1), Work(context=80, new_tokens=6))
        assert len(first.steps) == 6 and first.final_bytes == second.final_bytes == held[-1].nbytes
        assert first.cache_bytes == second.cache_bytes and held[-1].get_seq_length() == 86


@pytest.mark.slow
def test_options_of_the_converted_cache_reach_it(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int | None] = []
    plain = pair.converted.new_cache

    def new_cache(max_cache_len: int | None = None) -> Any:
        lengths.append(max_cache_len)
        return plain()

    monkeypatch.setattr(pair.converted, "new_cache", new_cache)
    monkeypatch.setattr("clla.bench.run.random_pair", lambda *args, **kwargs: pair)
    options = {"shape": "tiny", "contexts": (40,), "new_tokens": 2, "repeats": 1, "device": "cpu"}
    run_bench(None, Options(**options))
    assert set(lengths) == {None}
    lengths.clear()
    run_bench(None, Options(**options, static=True))
    assert set(lengths) == {10, 42}


def test_selection_is_told_to_the_converted_model(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr("clla.bench.run.random_pair", lambda *args, **kwargs: pair)
    monkeypatch.setattr("clla.bench.run._measure", lambda of, *args: told.append(of.converted.attend_top_k))
    monkeypatch.setattr(pair.converted, "attend_top_k", None, raising=False)
    run_bench(None, Options(shape="tiny", contexts=(40,), attend_top_k=7, device="cpu"))
    assert told == [7]


def test_a_peak_is_not_below_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system takes pages of files back when others want the room."""
    sizes = iter([100])
    monkeypatch.setattr(ProcessPeak, "_resident", lambda self: next(sizes, 40))
    with watch_peak(CPU) as peak:
        peak.lap()
    assert peak.laps[0] == 0


def test_peaks_are_seen_in_their_lap() -> None:
    """Sampled, so only what is large and stays for a while is certain."""
    with watch_peak(CPU) as peak:
        block = torch.ones(64 << 20, dtype=torch.uint8)
        del block
        peak.lap()
        small = torch.ones(1 << 20, dtype=torch.uint8)
    assert peak.laps[0] >= 48 << 20 and peak.laps[1] < 32 << 20 and small.sum() == 1 << 20
    assert peak.longest_gap > 0


@pytest.mark.parametrize("answer", [0, 1, 2, 3, 7, 8, 100, 4095, 4096, 9999])
def test_the_largest_that_fits_is_found(answer: int) -> None:
    tried: list[int] = []
    found = largest(lambda n: tried.append(n) or n <= answer, most=4096)
    assert found == min(answer, 4096)
    assert len(tried) == len(set(tried)) <= 26


class Crowded(torch.nn.Module):
    """A model that runs out of memory from some batch on."""

    def __init__(self, model: Any, most: int) -> None:
        super().__init__()
        self.model, self.most = model, most

    def forward(self, **kwargs: Any) -> Any:
        if len(kwargs["input_ids"]) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.model(**kwargs)


@pytest.mark.slow
def test_running_out_of_memory_is_a_result(pair: Pair) -> None:
    both = pair.contenders(static=False, source_chunk=None)
    both["source"] = Contender(Crowded(both["source"].model, 5), both["source"].new_cache)
    work = Work(context=20, new_tokens=3)
    found = measure(both, tokens(6, 23), work, repeats=1)
    assert found["source"] is None and found["converted"] is not None
    most = largest_batches({"source": both["source"]}, tokens(1, 23), work, repeats=1)["source"]
    assert most.batch == 5 and most.decode_tokens_per_s > 0
    none = Contender(Crowded(both["source"].model, 0), both["source"].new_cache)
    assert largest_batches({"source": none}, tokens(1, 23), work, repeats=1)["source"].batch == 0
    with pytest.raises(RuntimeError, match="something else"):
        attempt(lambda: (_ for _ in ()).throw(RuntimeError("something else")), CPU)


def mistake(*arguments: object) -> str:
    done = clla("bench", *arguments)
    assert done.exit_code == 2, (done.exit_code, done.output, done.stderr)
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


def test_mistakes_say_what_to_do(checkpoint: Path, tmp_path: Path) -> None:
    assert "qwen3-8b" in mistake("--shape", "gpt-5") and "tiny" in mistake("--shape", "gpt-5")
    assert "neither" in mistake() and "both" in mistake(checkpoint, "--shape", "tiny")
    assert "clla convert" in mistake(checkpoint, "--kv-budget", "3%")
    for option in ("--contexts", "--batch-sizes"):
        for bad in ("0", "many", "-5", "1.5", ""):
            assert ("correct it" if bad else "leave it out") in mistake("--shape", "tiny", option, bad), (option, bad)
    assert "new-tokens" in mistake("--shape", "tiny", "--new-tokens", "1")
    assert "repeats" in mistake("--shape", "tiny", "--repeats", "0")
    tiny = ["--shape", "tiny", "--device", "cpu"]
    assert "--memory-limit 2GB" in mistake(*tiny, "--largest-batch")
    assert "--largest-batch" in mistake(*tiny, "--memory-limit", "1GB")
    for bad in ("lots", "0", "-1GB"):
        assert "500MB" in mistake(*tiny, "--largest-batch", "--memory-limit", bad)
    assert ".png" in mistake(*tiny, "--plot", tmp_path / "speed.txt")
    assert "exists" in mistake(*tiny, "--plot", tmp_path / "nowhere" / "speed.png")
    assert "--kv-budget" in mistake(*tiny, "--kv-budget", "0.1%") and "lower" in mistake(*tiny, "--kv-budget", "90%")
    assert "float32" in mistake(*tiny, "--dtype", "int8")


@pytest.mark.slow
def test_contexts_beyond_the_model_are_told() -> None:
    done = clla("bench", "--shape", "tiny", "--contexts", "1030", *FAST)
    assert done.exit_code == 0 and "1024 positions" in " ".join(done.stderr.split())
    assert bench("--shape", "tiny")["settings"]["contexts"] == [512]  # of the default ones, those it is made for


@pytest.mark.slow
def test_positions_that_a_model_lacks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico("gpt2")
    stats = stats_of(model, batches=1)
    plan = plan_of(stats, model, bits=8)
    pair = Pair("gpt2", converted_of(model, plan, stats), plan, set())
    monkeypatch.setattr("clla.bench.run.random_pair", lambda *args, **kwargs: pair)
    monkeypatch.setattr("clla.bench.run.shape_config", lambda shape: model.config)
    with pytest.raises(UsageError, match="at most 1024"):
        run_bench(None, Options(shape="tiny", contexts=(1020,), new_tokens=5, device="cpu"))
    row = run_bench(None, Options(shape="tiny", contexts=(1019,), new_tokens=5, repeats=1, device="cpu")).rows[0]
    assert all(row.found.values()) and row.context == 1019


def test_help_names_the_shapes() -> None:
    done = clla("bench", "--help")
    assert done.exit_code == 0 and all(name in done.stdout for name in SHAPES)
