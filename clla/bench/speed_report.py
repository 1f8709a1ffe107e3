"""What `clla bench` found: as JSON and as tables. Ratios are converted to source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from clla.bench.generating import Generated
from clla.bench.largest_batch import Largest
from clla.bench.speed import Speed
from clla.tables import Table

NAMES = ("source", "converted")
TITLES = ("model", "context", "batch", "cache B/token", "planned", "cache MB", "prefill peak", "decode peak",
          "prefill tok/s", "decode tok/s", "mean", "ratio")  # fmt: skip


@dataclass(frozen=True)
class SpeedRow:
    """One context and batch.

    Attributes:
        context: tokens in the cache when decoding begins.
        batch: sequences.
        planned_bytes: of the converted cache at the context, all sequences together.
        found: by name; None for a model that ran out of memory.
    """

    context: int
    batch: int
    planned_bytes: float
    found: dict[str, Speed | None]

    def to_json(self) -> dict[str, Any]:
        figures = _figures(self.found)
        for speed in filter(None, figures.values()):
            speed["cache_bytes_per_token"] = speed["cache_bytes"] / (self.context * self.batch)
        if figures["converted"]:
            figures["converted"]["planned_bytes"] = self.planned_bytes
            figures["converted"]["planned_bytes_per_token"] = self.planned_bytes / (self.context * self.batch)
        return {"context": self.context, "batch": self.batch, **figures, "ratio": ratios(figures)}


@dataclass(frozen=True)
class SpeedReport:
    """All of a run.

    Attributes:
        model: checkpoint or shape.
        settings: what was asked for.
        machine: what it ran on.
        weights_bytes: of the source, which both share.
        codec_bytes: of the converted model, beside them.
        memory: how peaks were measured.
        rows: a context and batch each.
        generate_context: tokens of the prompt that `generate` wrote after.
        generated: by name; None for a model that ran out of memory.
        largest: by name; None where it was not looked for.
        largest_basis: what says that a batch fits.
    """

    model: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    weights_bytes: int
    codec_bytes: int
    memory: str
    rows: list[SpeedRow]
    generate_context: int
    generated: dict[str, Generated | None]
    largest: dict[str, Largest] | None
    largest_basis: str

    def to_json(self) -> dict[str, Any]:
        generated = _figures(self.generated)
        largest: dict[str, Any] | None = None
        if self.largest is not None:
            found = _figures(self.largest)
            context = max(row.context for row in self.rows)
            largest = {"context": context, "basis": self.largest_basis, **found, "ratio": ratios(found)}
        return {
            "model": self.model,
            "settings": self.settings,
            "machine": self.machine,
            "weights_bytes": self.weights_bytes,
            "codec_bytes": self.codec_bytes,
            "memory": self.memory,
            "rows": [row.to_json() for row in self.rows],
            "generate": {"context": self.generate_context, **generated, "ratio": ratios(generated)},
            "largest_batch": largest,
        }

    def lines(self) -> dict[str, dict[int, float]]:
        """Tokens decoded a second by context, by model and batch."""
        batches = sorted({row.batch for row in self.rows})
        found: dict[str, dict[int, float]] = {}
        for batch in batches:
            for name in NAMES:
                label = f"{name}, batch {batch}" if len(batches) > 1 else name
                speeds = {row.context: row.found[name] for row in self.rows if row.batch == batch}
                found[label] = {context: one.decode_tokens_per_s for context, one in speeds.items() if one is not None}
        return found

    def tables(self) -> list[Table]:
        """Speed and memory by context and batch; and `generate()` and the largest batch."""
        machine, settings = self.machine, self.settings
        where = f"{machine['name']}, {settings['dtype']}, {machine['threads']} threads"
        title = f"{self.model}: {settings['new_tokens']} tokens decoded; peaks in MB above the weights; {where}"
        main = []
        for row in self.rows:
            ratio = row.to_json()["ratio"]
            main += [(name, f"{row.context:,}", str(row.batch), *_cells(name, row, ratio)) for name in NAMES]
        ratio, label = ratios(_figures(self.generated)), f"generate() after {self.generate_context:,} tokens"
        beside = []
        for name, done in self.generated.items():
            cells = ["out of memory"]
            if done is not None:
                cells = [f"{done.tokens_per_s:,.1f}", _own(name, ratio, "tokens_per_s"), f"{done.first_token:.2f}"]
            beside.append((label, name, "1", *cells))
            label = ""
        if self.largest is not None:
            ratio, label = ratios(_figures(self.largest)), f"largest batch ({self.largest_basis})"
            for name, most in self.largest.items():
                rate = f"{most.decode_tokens_per_s:,.1f}"
                beside.append((label, name, str(most.batch), rate, _own(name, ratio, "decode_tokens_per_s")))
                label = ""
        titles = ("", "model", "batch", "tok/s", "ratio", "first token s")
        return [Table.of(TITLES, main, title=title), Table.of(titles, beside, words=2)]


def ratios(figures: dict[str, Any]) -> dict[str, float] | None:
    """Converted to source of every figure that both have; None if one has none."""
    source, converted = (figures[name] for name in NAMES)
    if not source or not converted:
        return None
    both = [key for key, value in source.items() if isinstance(value, int | float) and value]
    return {key: converted[key] / source[key] for key in both if key in converted and key != "longest_gap"}


def _figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """Dataclasses by name as JSON, None where there is none."""
    return {name: asdict(one) if one is not None else None for name, one in found.items()}


def _cells(name: str, row: SpeedRow, ratio: dict[str, float] | None) -> list[str]:
    """Figures of one model in a row of the table."""
    speed, tokens = row.found[name], row.context * row.batch
    if speed is None:
        return ["out of memory"]
    return [
        f"{speed.cache_bytes / tokens:,.0f}",
        f"{row.planned_bytes / tokens:,.0f}" if name == "converted" else "",
        f"{speed.cache_bytes / 1e6:,.1f}",
        f"{speed.prefill_peak_bytes / 1e6:,.1f}",
        f"{speed.decode_peak_bytes / 1e6:,.1f}",
        f"{speed.prefill_tokens_per_s:,.0f}",
        f"{speed.decode_tokens_per_s:,.1f}",
        f"{speed.decode_mean_tokens_per_s:,.1f}",
        _own(name, ratio, "decode_tokens_per_s"),
    ]


def _own(name: str, ratio: dict[str, float] | None, key: str) -> str:
    """A ratio, in the row of the converted model."""
    return f"{ratio[key]:.2f}" if ratio and name == "converted" and key in ratio else ""
