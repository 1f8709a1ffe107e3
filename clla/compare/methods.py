"""The methods that are compared: each builder gives its settings, for the budgets where it has a dial."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch

from clla.baselines.attention import ObservedModel
from clla.baselines.kivi import KiviCache
from clla.baselines.kvsharer import KvSharerCache, Order, Score, replaced, search
from clla.baselines.kvtc import KvtcCache, allocate, collect, principal
from clla.baselines.less import LessCache
from clla.baselines.less_training import train_feature_maps
from clla.baselines.minicache import MiniCacheCache
from clla.baselines.palu import palu
from clla.baselines.pyramidkv import PyramidKvCache
from clla.baselines.think import ThinkCache
from clla.baselines.turboquant import FORMS, TurboQuantCache
from clla.baselines.xkv import VALUE_RANK, XkvCache
from clla.compare.bench import SINKS, Bench, Setting
from clla.errors import CllaError, UsageError
from clla.evaluate.perplexity import Subject
from clla.evaluate.source_cache import SourceCache
from clla.modeling.hooks_clla import rope_of
from clla.plan.budget import derive_group_size, derive_window
from clla.recipe import PlanConfig

KIVI_BITS = (4, 3, 2)
KVTC_TOKENS, KVTC_WINDOW, KVTC_BLOCK, KVTC_COMPONENTS = 16_384, 128, 16, 2048
PYRAMID_WINDOW, PYRAMID_BLOCK = 8, 16
LESS_RANK, LESS_SEQUENCES = 8, 8
SEARCH_SEQUENCES, SEARCH_TOKENS = 4, 64  # that KVSharer's search runs on; the paper too has samples of 64

Builder = Callable[[Bench, list[float]], Iterator[Setting]]


@dataclass(frozen=True)
class Method:
    """Attributes: settings: its builder, given shares of the source's bytes; trained: it learns weights."""

    settings: Builder
    trained: bool = False


def _whole_contexts(bench: Bench, count: int) -> tuple[list[torch.Tensor], str]:
    """Calibration sequences [1, T] as long as the context, and why there are none, where the text has none."""
    try:
        return list(islice(bench.sequences(bench.context), count)), ""
    except CllaError as error:
        return [], error.got


def stored(bench: Bench, budgets: list[float]) -> Iterator[Setting]:
    """What people run in production: smaller formats of the source's cache."""
    config = bench.source.config
    yield Setting("fp8 a tensor", Subject(bench.model, lambda: SourceCache(config, "fp8")))
    yield Setting("fp8 per token and head", Subject(bench.model, lambda: SourceCache(config, "fp8-token-head")))
    yield Setting("int4 per token and head", Subject(bench.model, lambda: SourceCache(config, "int4")))


def kivi(bench: Bench, budgets: list[float]) -> Iterator[Setting]:
    for sinks in (0, SINKS) if bench.thorough else (SINKS,):
        for bits in KIVI_BITS:
            name = f"{bits} bit, residual 128" + (f", {sinks} sinks" if sinks else "")
            yield Setting(name, Subject(bench.model, partial(KiviCache, bench.source.config, bits=bits, sinks=sinks)))


def turboquant(bench: Bench, budgets: list[float]) -> Iterator[Setting]:
    """As vLLM serves it, the first and last two layers exact; with all layers coded, too."""
    for exact in (2, 0) if bench.thorough else (2,):
        for form in FORMS:
            name = form + (f", {2 * exact} layers exact" if exact else "")
            new_cache = partial(TurboQuantCache, bench.source.config, form=form, exact_layers=exact)
            yield Setting(name, Subject(bench.model, new_cache))


def kvtc(bench: Bench, budgets: list[float]) -> Iterator[Setting]:
    """At every budget, with the window that our own conversion has there."""
    rope, source = rope_of(bench.model, bench.rope), bench.source
    batches, why_not = _whole_contexts(bench, -(-KVTC_TOKENS // bench.context))
    if why_not:
        yield Setting("all", why_not=why_not)
        return
    keys, values = collect(bench.model, rope, batches, sinks=SINKS, window=KVTC_WINDOW)
    transforms = principal(keys, KVTC_COMPONENTS), principal(values, KVTC_COMPONENTS)
    for budget in budgets:
        window = own_window(budget, source.bytes_per_token, bench.context)
        exact = SINKS + window + KVTC_BLOCK
        room = (budget * bench.context - exact) / (bench.context - exact) * source.bytes_per_token
        try:
            coders = allocate(*transforms, int(8 * room))
        except UsageError as error:
            yield Setting(f"{100 * budget:g} %", why_not=error.got)
            continue
        new_cache = partial(KvtcCache, source.config, rope, coders, window=window, block=KVTC_BLOCK, sinks=SINKS)
        yield Setting(f"{100 * budget:g} % before DEFLATE, window {window}", Subject(bench.model, new_cache))


def minicache(bench: Bench, budgets: list[float]) -> Iterator[Setting]:
    for retention in ("prose", "equation") if bench.thorough else ("prose",):
        new_cache = partial(MiniCacheCache, bench.source.config, retention=retention)
        yield Setting(f"retention as in the {retention}", Subject(bench.model, new_cache))


def kvsharer(bench: Bench, budgets: list[float]) -> Iterator[Setting]:
    """At the largest budget, in the paper's order and in the other; lower ones would leave few layers."""
    count = len(bench.source.layers)
    share = min(count - 1, max(1, round(count * (1 - max(budgets)))))
    batches = [torch.cat(list(islice(bench.sequences(SEARCH_TOKENS), SEARCH_SEQUENCES)))]
    variants: tuple[tuple[Order, Score, float], ...] = (("dissimilar", "cosine", 0.5), ("similar", "kl", 2.0))
    for order, score, threshold in variants:
        leaders = search(bench.model, batches, share=share, order=order, score=score, threshold=threshold)
        name = f"{replaced(leaders)} of {count} layers shared, {order} first, by {score}"
        yield Setting(name, Subject(bench.model, partial(KvSharerCache, bench.source.config, leaders=leaders)))


def think(bench: Bench, budgets: list[float]) -> Iterator[Setting]:
    model = ObservedModel(bench.model)
    for ratio in (0.4, 0.6):
        new_cache = partial(ThinkCache, bench.source.config, ratio=ratio)
        yield Setting(f"{100 * ratio:g} % of the key channels pruned", Subject(model, new_cache))


def pyramidkv(bench: Bench, budgets: list[float]) -> Iterator[Setting]:
    """Also with equal budgets in all layers, which is SnapKV."""
    model, config = ObservedModel(bench.model), bench.source.config
    # What may gather before an eviction, and the queries that choose, come out of the budget.
    queries = -(-config.num_attention_heads // (2 * bench.source.kv.num_key_value_heads))  # tokens' worth of bytes each
    beside = PYRAMID_BLOCK + PYRAMID_WINDOW * queries
    for budget in budgets:
        capacity = int(budget * bench.context) - beside
        if capacity <= 2 * PYRAMID_WINDOW:
            yield Setting(f"{100 * budget:g} %", why_not=f"{beside} tokens of it go to window, queries and buffer")
            continue
        for pyramid in (True, False) if bench.thorough else (True,):
            new_cache = partial(
                PyramidKvCache, config, capacity=capacity, window=PYRAMID_WINDOW, pyramid=pyramid, block=PYRAMID_BLOCK
            )
            shape = "pyramid" if pyramid else "equal (SnapKV)"
            yield Setting(f"{capacity} tokens, {shape}", Subject(model, new_cache))


def less(bench: Bench, budgets: list[float]) -> Iterator[Setting]:
    """Feature maps are trained on calibration text, in sequences as long as the context, once for each budget."""
    model, kv = ObservedModel(bench.model), bench.source.kv
    # The fp32 state takes R·(d + 1) values per head, as many bytes as that number of tokens.
    state = -(-LESS_RANK * (kv.head_dim + 1) * 4 // (2 * kv.head_dim * bench.source.dtype.itemsize))
    beside = SINKS + PYRAMID_BLOCK + state
    batches, why_not = _whole_contexts(bench, LESS_SEQUENCES)
    if why_not:
        yield Setting("all", why_not=why_not)
        return
    for budget in budgets if bench.thorough else [max(budgets)]:
        capacity = int(budget * bench.context) - beside
        if capacity < 1:
            yield Setting(f"{100 * budget:g} %", why_not=f"{beside} tokens of it go to sinks, buffer and state")
            continue
        maps = train_feature_maps(bench.model, batches, capacity=capacity, sinks=SINKS, rank=LESS_RANK)
        new_cache = partial(LessCache, bench.source.config, maps, capacity=capacity, sinks=SINKS, block=PYRAMID_BLOCK)
        yield Setting(f"{capacity} tokens and {LESS_RANK} rows", Subject(model, new_cache))


def palu_settings(bench: Bench, budgets: list[float]) -> Iterator[Setting]:
    itemsize = bench.source.dtype.itemsize
    for budget in budgets:
        for bits in (16, 4) if bench.thorough else (4,):
            share = budget * 8 * itemsize / bits
            name = f"{100 * share:.3g} % rank, {bits} bit"
            if share > 1:
                yield Setting(f"{100 * budget:g} %, {bits} bit", why_not="every value fits: nothing to leave out")
                continue
            try:
                plan, codec = palu(bench.plain, share=share, kv_itemsize=itemsize, bits=bits)
            except UsageError as error:
                yield Setting(name, why_not=error.got)
                continue
            yield Setting(name, bench.converted(plan, codec))


def xkv(bench: Bench, budgets: list[float]) -> Iterator[Setting]:
    """Four layers per group, blocks of an eighth of the context."""
    rope = rope_of(bench.model, bench.rope)
    kv, block, size = bench.source.kv, max(16, bench.context // 8), 4
    blocks = (bench.context - SINKS) // block
    exact = bench.context - blocks * block
    columns = size * kv.values // 2
    for budget in budgets:
        room = (budget * bench.context - exact) * 2 * columns  # values that a group may hold
        rank = int(room / (blocks * (1 + VALUE_RANK) * (block + columns)))
        if rank < 1:
            yield Setting(f"{100 * budget:g} %", why_not=f"a block of {block} tokens that is not yet full takes it")
            continue
        new_cache = partial(XkvCache, bench.source.config, rope, rank=rank, block=block)
        yield Setting(f"rank {rank} of 4 layers, blocks of {block}", Subject(bench.model, new_cache))


def low_rank(plan: dict[str, Any], window: int) -> Builder:
    """A per-layer baseline that is a recipe of the pipeline, at 16 and at 4 bits."""

    def settings(bench: Bench, budgets: list[float]) -> Iterator[Setting]:
        for budget in budgets:
            for bits in (16, 4) if bench.thorough else (4,):
                changes = {
                    **plan,
                    "max_layers_per_group": 1,
                    "planner": "uniform",
                    "latent_input": "first_layer",
                    "bits": (bits,),
                }
                name = f"{100 * budget:g} %, {bits} bit, window {window}"
                yield bench.planned(name, bench.recipe.override({"plan": changes}), budget, window)

    return settings


def own(bench: Bench, budgets: list[float]) -> Iterator[Setting]:
    """The conversion of this package, with its default plan."""
    for budget in budgets:
        window = own_window(budget, bench.source.bytes_per_token, bench.context)
        size = derive_group_size(budget, bench.stats.width)
        recipe = bench.recipe.override({"plan": {"max_layers_per_group": min(size, len(bench.source.layers))}})
        yield bench.planned(f"{100 * budget:g} %, window {window}", recipe, budget, window)


def own_window(budget: float, source_bytes: int, context: int) -> int:
    """Exact window that a conversion would have for a share of the source's bytes at a context."""
    share = budget * source_bytes
    return derive_window(PlanConfig(), budget=share, source_bytes=source_bytes, context=context, sinks=SINKS)


METHODS: dict[str, Method] = {
    "stored": Method(stored),
    "kivi": Method(kivi),
    "turboquant": Method(turboquant),
    "kvtc": Method(kvtc),
    "minicache": Method(minicache),
    "kvsharer": Method(kvsharer),
    "think": Method(think),
    "pyramidkv": Method(pyramidkv),
    "less": Method(less, trained=True),
    "palu": Method(palu_settings),
    "xkv": Method(xkv),
    "cskv": Method(low_rank({"metric": "asvd"}, 32)),
    "weight-svd": Method(low_rank({"metric": "weights"}, 32)),
    "clla": Method(own),
}


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
