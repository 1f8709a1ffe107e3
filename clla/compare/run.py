"""From a model's name to the table: calibrate, build every setting, measure all of them on the same text."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from clla import console
from clla.compare.bench import BYTES_CHUNK, Bench, Setting
from clla.compare.comparison import Row, comparison_table, draw_comparison, pareto, recommend, write_csv
from clla.compare.methods import METHODS, own_window, pick_methods
from clla.compare.options import Options
from clla.convert.stages import Run, resolve
from clla.evaluate.memory import measured_bytes
from clla.evaluate.perplexity import Subject
from clla.evaluate.perplexity import compare as measure
from clla.evaluate.report import UNSEEN
from clla.evaluate.retrieval import make_trials, plantable, retrieve
from clla.evaluate.seen import fitted_text, unseen
from clla.evaluate.source_cache import SourceCache
from clla.recipe import Recipe
from clla.source.device import pick_device
from clla.source.lengths import reach_of
from clla.source.model import open_source
from clla.storage.filenames import COMPARISON
from clla.storage.files import write_text
from clla.tables import Table
from clla.text.reading import check_text
from clla.text.sequences import evaluation_samples
from clla.text.vocabulary import check_tokens

CONTEXT, LONG_CONTEXT = 2048, 8192  # where the model takes as many tokens


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        model: its name.
        rows: the source first.
        left_out: method, setting and why.
        options: as they were asked for.
        context: tokens that quality was measured at.
        long_context: tokens that bytes were measured at, too.
        unseen: calibration did not read the text; None where that is not known.
    """

    model: str
    rows: list[Row]
    left_out: list[tuple[str, str, str]]
    options: Options
    context: int
    long_context: int
    unseen: bool | None = None

    def recommendations(self) -> list[tuple[float, Row | None]]:
        """For each budget the row of least KL that keeps to it, by this table alone."""
        return [(budget, recommend(self.rows[1:], budget)) for budget in self.options.shares]

    def tables(self) -> list[Table]:
        """All settings, those left out, and which to take at each budget."""
        advice = [
            (f"{100 * budget:g} %", row.name, f"{100 * row.share:.1f} %", f"{row.kl:.4f}")
            if row is not None
            else (f"{100 * budget:g} %", "no setting keeps to it")
            for budget, row in self.recommendations()
        ]
        caption = f"{self.options.samples} samples of the text, {UNSEEN[self.unseen]}"
        found = [comparison_table(self.rows, context=self.context, long_context=self.long_context, caption=caption)]
        if self.left_out:
            found.append(Table.of(("method", "setting", "why"), self.left_out, title="Left out", words=3))
        titles, title = ("budget", "least KL", "of source", "KL"), "Recommendation, from the table above"
        return [*found, Table.of(titles, advice, title=title, words=2)]

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            **self.options.model_dump(mode="json"),
            "num_samples": self.options.samples,
            "context": self.context,
            "long_context": self.long_context,
            "unseen": self.unseen,
            "rows": [asdict(row) for row in self.rows],
            "left_out": [dict(zip(("method", "setting", "why"), entry, strict=True)) for entry in self.left_out],
            "pareto": [row.name for row in pareto(self.rows)],
            "recommended": {f"{100 * budget:g}%": row.name if row else None for budget, row in self.recommendations()},
        }

    def save(self, folder: Path) -> None:
        """`comparison.json`, `.csv`, `.png` and `.svg`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / COMPARISON, json.dumps(self.to_json(), indent=1))
        write_csv(self.rows, folder / "comparison.csv")
        title = f"{self.model}, {self.context} tokens of context"
        for suffix in ("png", "svg"):
            draw_comparison(self.rows[1:], folder / f"comparison.{suffix}", title=title)


def run_comparison(name: str, options: Options) -> Comparison:
    """From a model's name to the table.

    Raises:
        CllaError: bad input.
    """
    names = pick_methods(options.methods)
    if options.dataset != "self":
        check_text(options.dataset)
    check_text(options.text)
    source, where = open_source(name), pick_device(options.device)
    reach = reach_of(source.config)
    reach.check_option("--sequence-length", options.sequence_length)
    reach.check_option("--long-context", options.long_context)
    context = options.sequence_length or reach.fit(CONTEXT)
    long_context = options.long_context or reach.fit(LONG_CONTEXT)
    smallest = min(options.shares)  # its groups are the longest and its window the shortest
    budget = {
        "kv_budget": f"{100 * smallest:g}%",
        "budget_context": 0,
        "exact_window": own_window(smallest, source.bytes_per_token, context),
    }
    wanted: dict[str, dict[str, Any]] = {
        "calibration": {"dataset": options.dataset, "tokens": options.calibration_tokens},
        "budget": budget,
        "runtime": {"compute_dtype": options.dtype},
    }
    recipe = resolve(Recipe().override(wanted), source, where)
    others = {"metric": "pca", "latent_input": "first_layer", "max_layers_per_group": 1}
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work_dir or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        run = Run(source, recipe, where, work)
        samples = evaluation_samples(options.text, run.tokenizer, count=options.samples, length=context)
        check_tokens(samples, source.config.get_text_config().vocab_size, run.tokenizer)
        bench = Bench(
            source=source,
            model=run.model(),
            tokenizer=run.tokenizer,
            rope=run.rope,
            stats=run.stats(),
            plain=run.also(recipe.override({"plan": others})).stats(),
            recipe=recipe,
            sequences=lambda length: (row for batch in run.batches(length) for row in batch.split(1)),
            context=context,
            long_context=long_context,
            chunk=options.chunk,
            thorough=not options.quick,
        )
        rows, left_out = run_methods(bench, names, samples, options)
        known = unseen(options.text, [fitted_text(options.dataset)], left_out=options.text == "bundled")
    return Comparison(source.name, rows, left_out, options, context, long_context, known)


def run_methods(
    bench: Bench, names: list[str], samples: Tensor, options: Options
) -> tuple[list[Row], list[tuple[str, str, str]]]:
    """Build and measure.

    Args:
        bench: the model and its moments.
        names: of methods.
        samples: [N, context] token ids.
        options: budgets and what is measured.

    Returns:
        One row per setting, the source first; method, setting and reason of what was left out.
    """
    config, dtype = bench.source.config, bench.source.dtype
    source = Setting(str(dtype).removeprefix("torch."), Subject(bench.model, lambda: SourceCache(config, dtype)))
    settings = [("source", source)]
    with console.progress("Building (methods)", len(names)) as advance:
        for name in names:
            settings += [(name, setting) for setting in METHODS[name].settings(bench, options.shares)]
            advance()
    subjects = {(name, s.name): s.subject for name, s in settings if s.subject is not None}
    labels = {"\0".join(key): subject for key, subject in subjects.items()}
    device = bench.model.device
    with console.progress("Quality (samples)", len(samples)) as advance:
        quality = measure(labels, samples.to(device), chunk=bench.chunk, on_sample=advance)
    trials = []
    if options.trials and plantable(bench.tokenizer, bench.context):
        count, filler = options.trials, samples.flatten()
        trials = make_trials(bench.tokenizer, filler, context=bench.context, count=count)
    rows, base, far = [], 0.0, bench.long_context
    with console.progress("Bytes and retrieval (settings)", len(subjects)) as advance:
        for (method, name), subject in subjects.items():
            found = quality[f"{method}\0{name}"]
            long = measured_bytes(subject, [far], chunk=BYTES_CHUNK, device=device, text=samples.flatten())[far]
            codes = retrieve(subject, trials, chunk=bench.chunk, device=device) if trials else None
            base = base or float(found.nbytes)
            rows.append(
                Row(
                    method=method,
                    setting=name,
                    bytes_per_token=found.nbytes / bench.context,
                    long_bytes_per_token=long / far,
                    share=found.nbytes / base,
                    perplexity=found.perplexity,
                    kl=found.kl,
                    retrieval_nll=codes.nll if codes else None,
                    retrieval_exact=codes.exact if codes else None,
                    trained=method in METHODS and METHODS[method].trained,
                )
            )
            advance()
    return rows, [(name, s.name, s.why_not) for name, s in settings if s.subject is None]
