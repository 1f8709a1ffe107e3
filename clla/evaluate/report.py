"""Measure a converted model against its source, and write down what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from clla.artifacts.plan import Plan
from clla.evaluate.measured_cache import with_kept_bytes
from clla.evaluate.memory import measured_bytes
from clla.evaluate.perplexity import Subject, compare
from clla.evaluate.retrieval import make_trials, retrieve
from clla.evaluate.source_cache import SourceCache
from clla.modeling.modeling_clla import CllaForCausalLM
from clla.tables import Table
from clla.text.vocabulary import check_tokens

NAMES = ("source", "int4", "converted")
UNSEEN = {  # what is said of a text
    True: "not the calibration text",
    False: "part of the calibration text",
    None: "perhaps part of the calibration text: that is not known",
}
LABELS = {"source": "source", "int4": "source, int4 cache", "converted": "converted"}


@dataclass(frozen=True)
class Report:
    """What was measured, side by side in one run.

    Attributes:
        quality: perplexity, kl (nats per token, to the source) and bytes_per_token by name
            (`source`, `int4`: the source with an int4 cache, `converted`).
        context: tokens per sample.
        windows: number of samples.
        chunk: tokens per forward pass.
        cache_bytes: measured and planned bytes of the converted cache by context length.
        source_bytes: measured bytes of the source's cache by context length.
        retrieval: nll and exact by name, where it was asked for.
        unseen: calibration and training did not read the text; None where that is not known.
    """

    quality: dict[str, dict[str, float]]
    context: int
    windows: int
    chunk: int
    cache_bytes: dict[int, dict[str, float]] = field(default_factory=dict)
    source_bytes: dict[int, float] = field(default_factory=dict)
    retrieval: dict[str, dict[str, float]] = field(default_factory=dict)
    unseen: bool | None = None

    def to_json(self) -> dict[str, Any]:
        """The report as nested objects, figures per token."""
        last = max(self.cache_bytes) if self.cache_bytes else None
        cache: dict[str, Any] = {"by_context": {str(k): v for k, v in self.cache_bytes.items()}}
        if last is not None:
            cache.update(self.cache_bytes[last], context=last)
        return {
            **{name: dict(values) for name, values in self.quality.items()},
            "cache": cache,
            "source_bytes_by_context": {str(k): v for k, v in self.source_bytes.items()},
            "retrieval": self.retrieval,
            "context": self.context,
            "windows": self.windows,
            "chunk": self.chunk,
            "unseen": self.unseen,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Report:
        """A report from what `to_json` gives.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it is something else.
        """
        return cls(
            quality={name: dict(data[name]) for name in NAMES if name in data},
            context=data["context"],
            windows=data["windows"],
            chunk=data["chunk"],
            cache_bytes={int(k): v for k, v in data["cache"]["by_context"].items()},
            source_bytes={int(k): v for k, v in data["source_bytes_by_context"].items()},
            retrieval=data.get("retrieval") or {},
            unseen=data.get("unseen"),
        )

    def quality_table(self, before: Report | None = None) -> Table:
        """Source, int4 and converted side by side; and the converted model as it was before healing."""
        base, named = self.quality["source"], [(LABELS[name], row) for name, row in self.quality.items()]
        if before is not None:
            named.insert(-1, ("converted, before healing", before.quality["converted"]))
        rows = [
            (
                label,
                f"{row['perplexity']:.3f}",
                f"{row['perplexity'] / base['perplexity']:.4f}",
                f"{row['kl']:.4f}" if "kl" in row else "",
                f"{row['bytes_per_token']:,.0f}",
                f"{100 * row['bytes_per_token'] / base['bytes_per_token']:.1f} %",
            )
            for label, row in named
        ]
        title = f"{self.windows} samples of {self.context} tokens, {self.chunk} per step, {UNSEEN[self.unseen]}"
        titles = ("", "perplexity", "ratio", "KL (nats per token)", "cache bytes per token", "of source")
        return Table.of(titles, rows, title=title)

    def bytes_table(self) -> Table:
        """Bytes per token of one sequence's cache, measured and planned."""
        rows = [
            (
                f"{context:,}",
                f"{self.source_bytes[context]:,.0f}",
                f"{row['bytes_per_token']:,.2f}",
                f"{row['planned_bytes_per_token']:,.2f}",
                f"{100 * row['bytes_per_token'] / self.source_bytes[context]:.2f} %",
            )
            for context, row in self.cache_bytes.items()
        ]
        titles = ("tokens", "source, bytes per token", "converted", "planned", "of source")
        return Table.of(titles, rows, title="Cache of one sequence")

    def retrieval_table(self) -> Table:
        """Planted codes, where they were asked for."""
        rows = [(LABELS[n], f"{r['nll']:.3f}", f"{100 * r['exact']:.0f} %") for n, r in self.retrieval.items()]
        return Table.of(("", "NLL of the code (nats)", "exact"), rows, title="Retrieval of planted codes")

    def tables(self) -> list[Table]:
        """All of them."""
        return [self.quality_table(), self.bytes_table(), *([self.retrieval_table()] if self.retrieval else [])]


def healing_table(before: Report | None, after: Report | None) -> Table | None:
    """What healing brought, where both were measured."""
    if before is None or after is None:
        return None
    figures: list[tuple[str, Callable[[Report, str], float | None], str]] = [
        ("perplexity", lambda report, name: report.quality[name]["perplexity"], ".3f"),
        ("KL (nats per token)", lambda report, name: report.quality[name].get("kl"), ".4f"),
        ("NLL of planted codes", lambda report, name: report.retrieval.get(name, {}).get("nll"), ".3f"),
        ("exact codes", lambda report, name: report.retrieval.get(name, {}).get("exact"), ".2f"),
    ]
    rows = []
    for label, pick, form in figures:
        found = [pick(after, "source"), pick(before, "converted"), pick(after, "converted")]
        if found[2] is not None:
            rows.append([label, *("" if value is None else format(value, form) for value in found)])
    return Table.of(("", "source", "before", "after"), rows, title="Healing")


def subjects(
    converted: CllaForCausalLM, kv_dtype: torch.dtype, source: PreTrainedModel | None = None
) -> dict[str, Subject]:
    """Source, source with an int4 cache, and converted model; the source is what it runs on, unless told otherwise."""
    source, config = source or converted.source, converted.config.text_config
    return {
        "source": Subject(source, lambda: SourceCache(config, kv_dtype)),
        "int4": Subject(source, lambda: SourceCache(config, "int4")),
        "converted": Subject(converted, converted.new_cache),
    }


def before_and_after(
    converted: CllaForCausalLM,
    tokenizer: Any,
    plan: Plan,
    samples: Tensor,
    *,
    chunk: int | None = None,
    contexts: tuple[int, ...] = (),
    retrieval_context: int = 0,
    retrieval_trials: int = 16,
    unseen: bool | None = None,
    source_model: PreTrainedModel | None = None,
    on_step: Callable[[int], None] = lambda _: None,
) -> Report:
    """Run source and converted model over the same text, through the caches they really keep.

    Args:
        converted: the model; the model that it runs on is the reference.
        tokenizer: the source's.
        plan: for planned bytes.
        samples: [N, T] token ids.
        chunk: tokens per forward pass; default: the exact window, so that a token sees between one and two
            windows exactly, as in decoding.
        contexts: lengths at which caches are measured; T is always among them.
        retrieval_context: tokens around a planted code; 0 leaves retrieval out.
        retrieval_trials: number of codes.
        unseen: calibration and training did not read the samples; None where that is not known.
        source_model: the reference instead, where the weights were trained.
        on_step: called with 1 after each sample.
    """
    device = converted.device
    check_tokens(samples, converted.config.text_config.vocab_size, tokenizer)
    samples = samples.to(device)
    chunk = chunk or plan.window or converted.prefill_chunk
    kv_dtype = getattr(torch, converted.config.spec.kv_dtype)
    models = subjects(converted, kv_dtype, source_model)
    # What is measured is in the dtype that is computed in, so what is planned is told in it, too.
    plan = with_kept_bytes(plan, converted.source, itemsize=converted.dtype.itemsize)
    length = samples.shape[1]
    quality = {
        name: {
            "perplexity": q.perplexity,
            "bytes_per_token": q.nbytes / length,
            **({"kl": q.kl} if name != "source" else {}),
        }
        for name, q in compare(models, samples, chunk=chunk, on_sample=on_step).items()
    }
    lengths = sorted({length, *contexts})
    wide = converted.prefill_chunk
    cache = measured_bytes(models["converted"], lengths, chunk=wide, device=device)
    source = measured_bytes(models["source"], lengths, chunk=wide, device=device)
    codes = {}
    if retrieval_context:
        trials = make_trials(tokenizer, samples.flatten().cpu(), context=retrieval_context, count=retrieval_trials)
        codes = {name: asdict(retrieve(models[name], trials, chunk=chunk, device=device)) for name in NAMES}
    return Report(
        quality=quality,
        context=length,
        windows=len(samples),
        chunk=chunk,
        cache_bytes={
            c: {
                "bytes_per_token": cache[c] / c,
                "planned_bytes_per_token": (plan.bytes_at(c) + plan.kept_bytes_at(c)) / c,
            }
            for c in lengths
        },
        source_bytes={c: source[c] / c for c in lengths},
        retrieval=codes,
        unseen=unseen,
    )
