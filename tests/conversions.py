"""Small converted models, of every form that a cache can have."""

from __future__ import annotations

from functools import cache, lru_cache

from conftest import pico
from helpers import converted_of, plan_of, stats_of, strict_of
from transformers import PreTrainedModel

from clla.artifacts.stats import Stats
from clla.modeling.modeling_clla import CllaForCausalLM

TOLERANCE = {"atol": 2e-3, "rtol": 2e-3}  # 16-bit latents through four fp32 layers
WINDOW, BLOCK, SINKS, CHUNK = 8, 8, 2, 24
FORMS = ("group", "static", "first", "first without a window", "strict", "sliding", "hybrid")


@lru_cache(maxsize=32)
def source_and_stats(family: str) -> tuple[PreTrainedModel, Stats]:
    model = pico(family)
    return model, stats_of(model)


def full_rank(family: str = "llama", source: str = "group", **options: object) -> CllaForCausalLM:
    model, stats = source_and_stats(family)
    groups = tuple((layer,) for layer in stats.layers) if source == "first" else ()
    return converted_of(model, plan_of(stats, model, groups=groups, source=source, **options), stats)  # type: ignore[arg-type]


def lossy(**options: object) -> CllaForCausalLM:
    model, stats = source_and_stats("llama")
    return converted_of(model, plan_of(stats, model, bits=4, rank=64, **options), stats)  # type: ignore[arg-type]


def form(name: str, lossless: bool = False) -> CllaForCausalLM:
    """A small conversion of some form."""
    return _form(name, lossless)


@cache
def _form(name: str, lossless: bool) -> CllaForCausalLM:
    family = {"sliding": "qwen2-sliding", "hybrid": "lfm2"}.get(name, "llama")
    model = pico(family)
    if name == "strict":
        stats = stats_of(model, with_queries=True, batches=2)
        small = {"groups": ((0, 1), (2, 3)), "components": 16, "bits": 4, "rope_bits": 6, "rank": 48}
        return strict_of(model, stats, **({} if lossless else small))[0]  # type: ignore[arg-type]
    stats = stats_of(model, batches=2)
    source = "first" if name.startswith("first") else "group"
    window = 0 if name == "first without a window" else WINDOW
    groups = tuple((layer,) for layer in stats.layers) if source == "first" else ()
    small = {} if lossless else {"bits": 4, "rank": 48}
    plan = plan_of(stats, model, **small, groups=groups, source=source, window=window, sinks=SINKS,
                   flush_block=BLOCK)  # type: ignore[arg-type] # fmt: skip
    return converted_of(model, plan, stats, prefill_chunk=CHUNK)
