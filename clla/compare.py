"""Run published methods and our own side by side on one model: the same text, real caches, measured bytes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from clla import console
from clla.artifacts import Codec, Plan, Stats, write_text
from clla.baselines.attention import ObservedModel
from clla.baselines.kivi import KiviCache
from clla.baselines.kvsharer import KvSharerCache, Order, Score, replaced, search
from clla.baselines.less import LessCache
from clla.baselines.less_training import train_feature_maps
from clla.baselines.minicache import MiniCacheCache
from clla.baselines.palu import palu
from clla.baselines.pyramidkv import PyramidKvCache
from clla.baselines.stored import SourceCache
from clla.baselines.think import ThinkCache
from clla.baselines.xkv import VALUE_RANK, XkvCache
from clla.calibrate.data import evaluation_windows
from clla.convert.assemble import attach, clla_block
from clla.convert.factor import make_codec
from clla.convert.pipeline import Run, resolve, weigh
from clla.convert.planners import derive_window, make_plan
from clla.convert.spectra import Spectra
from clla.errors import UsageError
from clla.evaluate.comparison import Row, comparison_table, draw_comparison, pareto, recommend, write_csv
from clla.evaluate.memory import measured_bytes
from clla.evaluate.perplexity import Subject
from clla.evaluate.perplexity import compare as measure
from clla.evaluate.retrieval import make_trials, retrieve
from clla.modeling.hooks_clla import rope_of
from clla.recipe import Recipe
from clla.source import Source, open_source, pick_device

KIVI_BITS = (4, 3, 2)
PYRAMID_WINDOW, PYRAMID_BLOCK = 8, 16
LESS_RANK, LESS_SINKS = 8, 4
SEARCH_SEQUENCES = 2
SEARCH_TOKENS = 256  # of the calibration sequences that KVSharer's search runs on


@dataclass(frozen=True)
class Bench:
    """What methods are built from.

    Attributes:
        source: the model's description.
        model: loaded.
        tokenizer: the source's.
        stats: moments, collected with inputs.
        recipe: resolved; plan settings of our own method.
        batches: calibration sequences [1, T].
        context: tokens at which budgets hold and quality is measured.
        chunk: tokens a forward pass.
    """

    source: Source
    model: PreTrainedModel
    tokenizer: Any
    stats: Stats
    recipe: Recipe
    batches: list[Tensor]
    context: int
    chunk: int

    @cached_property
    def _spectra(self) -> dict[tuple[str, float, str], Spectra]:
        return {}

    def spectra(self, recipe: Recipe) -> Spectra:
        """Weighted moments, the same for every budget and bit width."""
        key = (recipe.plan.metric, recipe.plan.metric_power, recipe.plan.source)
        if key not in self._spectra:
            self._spectra[key] = weigh(self.stats, recipe)
        return self._spectra[key]

    def converted(self, plan: Plan, codec: Codec) -> Subject:
        """The model running on a plan and codec."""
        plan = replace(plan, kept_layers=self.source.kept_layers, kept_window=self.source.kept_window)
        block = clla_block(
            plan,
            interleaved_rope=self.source.family.interleaved_rope,
            kv_dtype=self.source.dtype,
            prefill_chunk=self.chunk,
        )
        model = attach(self.model, codec, block)
        return Subject(model, model.new_cache)


Settings = Iterator[tuple[str, Subject]]
Builder = Callable[[Bench, list[float]], Settings]


def stored(bench: Bench, budgets: list[float]) -> Settings:
    """What people run in production: smaller formats of the source's cache."""
    config = bench.source.config
    yield "fp8 a tensor", Subject(bench.model, lambda: SourceCache(config, "fp8"))
    yield "fp8 a token and head", Subject(bench.model, lambda: SourceCache(config, "fp8-token-head"))
    yield "int4 a token and head", Subject(bench.model, lambda: SourceCache(config, "int4"))


def kivi(bench: Bench, budgets: list[float]) -> Settings:
    for sinks in (0, 4):
        for bits in KIVI_BITS:
            setting = f"{bits} bit, residual 128" + (f", {sinks} sinks" if sinks else "")
            yield setting, Subject(bench.model, partial(KiviCache, bench.source.config, bits=bits, sinks=sinks))


def minicache(bench: Bench, budgets: list[float]) -> Settings:
    config = bench.source.config
    yield "retention as in the prose", Subject(bench.model, lambda: MiniCacheCache(config, retention="prose"))
    yield "retention as in the equation", Subject(bench.model, lambda: MiniCacheCache(config, retention="equation"))


def kvsharer(bench: Bench, budgets: list[float]) -> Settings:
    """At the largest budget, in the paper's order and in the other; lower ones would leave few layers."""
    count = len(bench.source.layers)
    share = min(count - 1, max(1, round(count * (1 - max(budgets)))))
    batches = [batch[:, :SEARCH_TOKENS] for batch in bench.batches]
    variants: tuple[tuple[Order, Score, float], ...] = (("dissimilar", "cosine", 0.5), ("similar", "kl", 2.0))
    for order, score, threshold in variants:
        leaders = search(bench.model, batches, share=share, order=order, score=score, threshold=threshold)
        setting = f"{replaced(leaders)} of {count} layers shared, {order} first, by {score}"
        yield setting, Subject(bench.model, partial(KvSharerCache, bench.source.config, leaders=leaders))


def think(bench: Bench, budgets: list[float]) -> Settings:
    model = ObservedModel(bench.model)
    for ratio in (0.4, 0.6):
        new_cache = partial(ThinkCache, bench.source.config, ratio=ratio)
        yield f"{100 * ratio:g} % of the key channels pruned", Subject(model, new_cache)


def pyramidkv(bench: Bench, budgets: list[float]) -> Settings:
    """Also with equal budgets in all layers, which is SnapKV."""
    model = ObservedModel(bench.model)
    for budget in budgets:
        # What may gather before an eviction, and the queries that choose, come out of the budget.
        capacity = int(budget * bench.context) - PYRAMID_BLOCK - PYRAMID_WINDOW * _queries_per_key(bench)
        if capacity <= 2 * PYRAMID_WINDOW:
            continue
        for pyramid in (True, False):
            shape = "pyramid" if pyramid else "equal (SnapKV)"
            new_cache = partial(
                PyramidKvCache,
                bench.source.config,
                capacity=capacity,
                window=PYRAMID_WINDOW,
                pyramid=pyramid,
                block=PYRAMID_BLOCK,
            )
            yield f"{capacity} tokens, {shape}", Subject(model, new_cache)


def less(bench: Bench, budgets: list[float]) -> Settings:
    """Feature maps are trained on the calibration sequences, anew for each budget."""
    model = ObservedModel(bench.model)
    for budget in budgets:
        kv = bench.source.kv
        # The fp32 state takes R·(d + 1) values a head, as many bytes as so many tokens; the blocks come on top.
        state = -(-LESS_RANK * (kv.head_dim + 1) * 4 // (2 * kv.head_dim * bench.source.dtype.itemsize))
        capacity = int(budget * bench.context) - LESS_SINKS - PYRAMID_BLOCK - state
        if capacity < 1 or any(batch.shape[1] <= capacity + LESS_SINKS + 1 for batch in bench.batches):
            continue  # nothing would be kept, or nothing evicted to train on
        maps = train_feature_maps(bench.model, bench.batches, capacity=capacity, sinks=LESS_SINKS, rank=LESS_RANK)
        new_cache = partial(
            LessCache, bench.source.config, maps, capacity=capacity, sinks=LESS_SINKS, block=PYRAMID_BLOCK
        )
        yield f"{capacity} tokens and {LESS_RANK} rows", Subject(model, new_cache)


def _queries_per_key(bench: Bench) -> int:
    """Tokens of cache that one token's queries take, rounded up."""
    return -(-bench.source.config.num_attention_heads // (2 * bench.source.kv.num_key_value_heads))


def palu_settings(bench: Bench, budgets: list[float]) -> Settings:
    for budget in budgets:
        for bits in (16, 4):
            share = budget * 8 * bench.source.dtype.itemsize / bits
            if share > 1:
                continue
            try:
                plan, codec = palu(bench.stats, share=share, kv_itemsize=bench.source.dtype.itemsize, bits=bits)
            except UsageError:  # no whole tier of rank is left
                continue
            yield f"{100 * share:.3g} % rank, {bits} bit", bench.converted(plan, codec)


def xkv(bench: Bench, budgets: list[float]) -> Settings:
    """Blocks of an eighth of the context; budgets that the unfinished block alone takes are left out."""
    rope, interleaved = rope_of(bench.model), bench.source.family.interleaved_rope
    kv, block, sinks, size = bench.source.kv, max(16, bench.context // 8), 4, 4
    blocks = (bench.context - sinks) // block
    exact = bench.context - blocks * block
    columns = size * kv.values // 2
    for budget in budgets:
        room = (budget * bench.context - exact) * 2 * columns  # values that a group may hold
        rank = int(room / (blocks * (1 + VALUE_RANK) * (block + columns)))
        if rank < 1:
            continue
        new_cache = partial(XkvCache, bench.source.config, rope, rank=rank, block=block, interleaved=interleaved)
        yield f"rank {rank} of 4 layers, blocks of {block}", Subject(bench.model, new_cache)


def low_rank(plan: dict[str, Any], window: int) -> Builder:
    """A per-layer baseline that is a recipe of the pipeline, at 16 and at 4 bits where that fits."""

    def build(bench: Bench, budgets: list[float]) -> Settings:
        for budget in budgets:
            for bits in (16, 4):
                changes = {**plan, "max_group_size": 1, "planner": "uniform", "source": "first", "bits": (bits,)}
                found = _planned(bench, bench.recipe.override({"plan": changes}), budget, window)
                if found is not None:
                    yield f"{100 * budget:g} %, {bits} bit, window {window}", found

    return build


def own(evict: float | None) -> Builder:
    """The conversion of this package, with its default plan."""

    def build(bench: Bench, budgets: list[float]) -> Settings:
        for budget in budgets:
            window = derive_window(
                bench.recipe.plan,
                budget=budget * bench.source.bytes_per_token,
                source_bytes=bench.source.bytes_per_token,
                context=bench.context,
                sinks=4,
            )
            found = _planned(bench, bench.recipe, budget, window, evict)
            if found is not None:
                kept = f", {100 * evict:g} % evicted" if evict else ""
                yield f"{100 * budget:g} %, window {window}{kept}", found

    return build


def _planned(bench: Bench, recipe: Recipe, budget: float, window: int, evict: float | None = None) -> Subject | None:
    """A plan within the budget, running; None if window and sinks take all of it."""
    spectra = bench.spectra(recipe)
    try:
        plan = make_plan(
            bench.stats,
            recipe.plan,
            budget=budget * bench.source.bytes_per_token,
            context=bench.context,
            window=window,
            sinks=4,
            evict=evict,
            kv_itemsize=bench.source.dtype.itemsize,
            kept_layers=bench.source.kept_layers,
            kept_window=bench.source.kept_window,
            made_from="compare",
            spectra=spectra,
        )
    except UsageError:
        return None
    return bench.converted(plan, make_codec(spectra, plan, bench.stats))


METHODS: dict[str, Builder] = {
    "stored": stored,
    "kivi": kivi,
    "minicache": minicache,
    "kvsharer": kvsharer,
    "think": think,
    "pyramidkv": pyramidkv,
    "less": less,
    "palu": palu_settings,
    "xkv": xkv,
    "cskv": low_rank({"metric": "asvd"}, 32),
    "weight-svd": low_rank({"metric": "weights"}, 32),
    "clla": own(None),
    "clla-evict": own(0.5),
}


TRAINED = {"less"}  # methods that learn weights


def pick_methods(names: str | None) -> list[str]:
    """Names from a comma-separated list, all by default.

    Raises:
        UsageError: no such method.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()] if names else list(METHODS)
    unknown = [name for name in wanted if name not in METHODS]
    if unknown or not wanted:
        raise UsageError(f"--methods {names}", expected="some of " + ", ".join(METHODS), remedy="correct the names")
    return wanted


def make_bench(run: Run, *, context: int, chunk: int) -> Bench:
    """Calibrate (with inputs) and gather what the methods need."""
    batches = [batch[:1] for batch in islice(run.batches(), SEARCH_SEQUENCES)]
    stats = run.stats()
    recipe = run.recipe.override({"plan": {"source": "group"}})
    return Bench(run.source, run.model(), run.tokenizer, stats, recipe, batches, context, chunk)


def run_methods(
    bench: Bench,
    names: list[str],
    budgets: list[float],
    windows: Tensor,
    *,
    long_context: int,
    retrieval_trials: int,
) -> list[Row]:
    """Build, measure and tabulate.

    Args:
        bench: the model and its moments.
        names: of methods.
        budgets: shares of the source's bytes at `bench.context`.
        windows: [N, context] token ids.
        long_context: at which bytes are measured too.
        retrieval_trials: number of planted codes; 0 leaves retrieval out.
    """
    config, dtype = bench.source.config, bench.source.dtype
    subjects: dict[tuple[str, str], Subject] = {
        ("source", str(dtype).removeprefix("torch.")): Subject(bench.model, lambda: SourceCache(config, dtype))
    }
    with console.progress("Building (methods)", len(names)) as advance:
        for name in names:
            subjects.update({(name, setting): subject for setting, subject in METHODS[name](bench, budgets)})
            advance()
    labels = {f"{method}|{setting}": subject for (method, setting), subject in subjects.items()}
    device = bench.model.device
    with console.progress("Quality (windows)", len(windows)) as advance:
        quality = measure(labels, windows.to(device), chunk=bench.chunk, on_window=advance)
    trials = []
    if retrieval_trials:
        trials = make_trials(bench.tokenizer, windows.flatten(), context=bench.context, count=retrieval_trials)
    rows, base = [], 0.0
    with console.progress("Bytes and retrieval (settings)", len(subjects)) as advance:
        for (method, setting), subject in subjects.items():
            found = quality[f"{method}|{setting}"]
            long = measured_bytes(subject, [long_context], chunk=4 * bench.chunk, device=device)[long_context]
            codes = retrieve(subject, trials, chunk=bench.chunk, device=device) if trials else None
            base = base or float(found.nbytes)
            rows.append(
                Row(
                    method=method,
                    setting=setting,
                    bytes_per_token=found.nbytes / bench.context,
                    long_bytes_per_token=long / long_context,
                    share=found.nbytes / base,
                    perplexity=found.perplexity,
                    kl=found.kl,
                    retrieval_nll=codes.nll if codes else None,
                    retrieval_exact=codes.exact if codes else None,
                    trained=method in TRAINED,
                )
            )
            advance()
    return rows


@dataclass(frozen=True)
class Comparison:
    """Attributes: model: its name; rows: the source first; budgets: shares asked for; context; long_context."""

    model: str
    rows: list[Row]
    budgets: list[float]
    context: int
    long_context: int

    def recommendations(self) -> list[tuple[float, Row | None]]:
        """For each budget the row of least KL that keeps to it, by this table alone."""
        return [(budget, recommend(self.rows[1:], budget)) for budget in self.budgets]

    def tables(self) -> list[Table]:
        advice = Table("budget", "least KL", "of source", "KL", title="Recommendation, from the table above")
        for budget, row in self.recommendations():
            if row is None:
                advice.add_row(f"{100 * budget:g} %", "no setting keeps to it", "", "")
            else:
                name, share = f"{row.method}: {row.setting}", f"{100 * row.share:.1f} %"
                advice.add_row(f"{100 * budget:g} %", name, share, f"{row.kl:.4f}")
        return [comparison_table(self.rows, context=self.context, long_context=self.long_context), advice]

    def to_json(self) -> dict[str, Any]:
        return {
            **{k: v for k, v in vars(self).items() if k != "rows"},
            "rows": [asdict(row) for row in self.rows],
            "pareto": [f"{row.method}: {row.setting}" for row in pareto(self.rows)],
            "recommended": {
                f"{100 * budget:g}%": f"{row.method}: {row.setting}" if row else None
                for budget, row in self.recommendations()
            },
        }

    def save(self, folder: Path) -> None:
        """`comparison.json`, `.csv`, `.png` and `.svg`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "comparison.json", json.dumps(self.to_json(), indent=1))
        write_csv(self.rows, folder / "comparison.csv")
        for suffix in ("png", "svg"):
            draw_comparison(
                self.rows[1:], folder / f"comparison.{suffix}", title=f"{self.model}, {self.context} tokens of context"
            )


def run_comparison(
    name: str,
    *,
    methods: str | None,
    budgets: list[float],
    text: str,
    dataset: str,
    windows: int,
    context: int,
    long_context: int,
    chunk: int,
    tokens: int | None,
    retrieval_trials: int,
    device: str,
    work_dir: Path | None,
) -> Comparison:
    """From a model's name to the table; the options are those of `clla compare`.

    Raises:
        CllaError: bad input.
    """
    names = pick_methods(methods)
    source, where = open_source(name), pick_device(device)
    recipe = Recipe().override({"calibration": {"dataset": dataset, "tokens": tokens}, "plan": {"source": "first"}})
    recipe = resolve(recipe.override({"budget": {"at_context": 0, "window": 128}}), source, where)
    with tempfile.TemporaryDirectory() as scratch:
        work = work_dir or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        bench = make_bench(Run(source, recipe, where, work), context=context, chunk=chunk)
        ids = evaluation_windows(text, bench.tokenizer, count=windows, length=context)
        rows = run_methods(bench, names, budgets, ids, long_context=long_context, retrieval_trials=retrieval_trials)
    return Comparison(source.name, rows, budgets, context, long_context)
