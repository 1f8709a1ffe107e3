"""How well plans predict what is measured: loss and KL by second order against KL and perplexity on text left out.

    python benchmarks/prediction.py MODEL [--text TEXT] [--budgets 25,12.5,…] [--num-samples N] [--sequence-length N]

All plans come from the same moments. At every budget the dynamic planner's is measured, at `--equal` percent also those
of other planners and group sizes. Nothing is exact but the newest W tokens, as in use; predictions are for tokens all
coded, so measured KL is below them by what the window spares.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from latents import plan_latents
from scipy.stats import pearsonr, spearmanr
from torch import Tensor
from transformers.utils import logging

from clla import console
from clla.checkpoint.assemble import attach
from clla.convert.factor import make_codec
from clla.convert.stages import Run, resolve
from clla.evaluate.figures import OWN_COLOUR, SOURCE_COLOUR, axes_of, save
from clla.evaluate.perplexity import Subject, compare
from clla.evaluate.report import subjects
from clla.plan.metrics import weigh
from clla.recipe import Recipe
from clla.source.device import pick_device
from clla.source.model import open_source
from clla.text.sequences import load_documents, whole_samples

EQUAL: dict[str, dict[str, Any]] = {
    "uniform, 6": {"planner": "uniform", "max_layers_per_group": 6},
    "uniform, 3": {"planner": "uniform", "max_layers_per_group": 3},
    "pyramid, 6": {"planner": "pyramid", "max_layers_per_group": 6},
    "dynamic, 3": {"max_layers_per_group": 3},
    "dynamic, 1": {"max_layers_per_group": 1},
}


@dataclass(frozen=True)
class Point:
    """A plan's figures: loss in units of its metric, KL in nats by second order, and measured by text."""

    name: str
    budget: float
    row_bytes: int
    loss: float
    kl: float
    measured: dict[str, dict[str, float]]


def measure(run: Run, texts: dict[str, Tensor], cases: list[tuple[str, float, dict[str, Any]]]) -> list[Point]:
    """Plan, factor and run every case on every text.

    Args:
        run: whose moments are used.
        texts: token ids [N, T] by name.
        cases: name, percent and changes of the plan settings.
    """
    stats, model, points = run.stats(), run.model(), []
    spectra = weigh(stats, run.recipe, run.device)
    assert run.recipe.budget.exact_window is not None
    window = run.recipe.budget.exact_window
    base: dict[str, float] = {}
    for name, budget, changes in cases:
        settings = run.recipe.plan.model_copy(update={"max_layers_per_group": None, **changes})
        plan = plan_latents(run, spectra, stats, settings, percent=budget, window=window)
        codec = make_codec(spectra, plan, stats)
        converted = attach(model, codec, run.block(plan))
        models = {"source": subjects(converted, run.source.dtype)["source"]}
        models["converted"] = Subject(converted, converted.new_cache)
        measured = {}
        for text, windows in texts.items():
            found = compare(models, windows, chunk=window)
            base[text] = found["source"].perplexity
            measured[text] = {
                "kl": found["converted"].kl,
                "ratio": found["converted"].perplexity / base[text],
            }
        converted.release_source()
        points.append(Point(name, budget, plan.row_bytes, plan.predicted_loss, codec.predicted_kl, measured))
        console.say(f"{name} {budget} %: {points[-1]}")
    return points


def correlations(points: list[Point], text: str) -> dict[str, float]:
    """Spearman's rank and Pearson's of the logarithms, of predicted loss and KL with measured KL, and with ln ratio."""
    kl = [point.measured[text]["kl"] for point in points]
    log_ratio = [math.log(point.measured[text]["ratio"]) for point in points]
    found = {}
    for label, predicted in (("loss", [p.loss for p in points]), ("KL", [p.kl for p in points])):
        found[f"{label} and KL, Spearman"] = float(spearmanr(predicted, kl).statistic)
        found[f"{label} and KL, Pearson of logs"] = float(pearsonr([math.log(p) for p in predicted], _logs(kl))[0])
        found[f"{label} and perplexity, Spearman"] = float(spearmanr(predicted, log_ratio).statistic)
    return found


def _logs(values: list[float]) -> list[float]:
    return [math.log(max(value, 1e-9)) for value in values]


def draw(points: list[Point], texts: list[str], equal: int, path: Path, title: str) -> None:
    """Measured against predicted KL, both logarithmic; the last `equal` points are other plans at one budget."""
    axes = axes_of(6, 4.5)
    for text, mark in zip(texts, "os^D", strict=False):
        for part, colour, name in (
            (points[: len(points) - equal], OWN_COLOUR, "budgets"),
            (points[len(points) - equal :], SOURCE_COLOUR, "planners at one budget"),
        ):
            xy = [p.kl for p in part], [p.measured[text]["kl"] for p in part]
            axes.plot(*xy, mark, color=colour, label=f"{text}, {name}", markersize=5, alpha=0.8)
    ends = [min(p.kl for p in points), max(p.kl for p in points)]
    axes.plot(ends, ends, color=SOURCE_COLOUR, linewidth=0.8, linestyle=":")
    axes.legend(fontsize=8, frameon=False)
    save(axes, path, x="predicted KL, nats per token", y="measured KL", title=title, log="xy")


def main() -> None:
    """Parse, calibrate once, measure all plans, print the table and its correlations."""
    args = _arguments()
    logging.set_verbosity_error()
    device, source = pick_device(args.device), open_source(args.model)
    recipe = Recipe().override({"calibration": {"dataset": args.dataset, "tokens": args.calibration_tokens}})
    smallest = min(float(budget) for budget in args.budgets.split(","))  # of which groups are the longest
    budget_of = {"budget_context": 0, "exact_window": args.exact_window, "kv_budget": f"{smallest}%"}
    recipe = resolve(recipe.override({"budget": budget_of}), source, device)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    run = Run(source, recipe, device, args.work_dir)
    count, length = args.num_samples, args.sequence_length
    texts = {"left out": run.report_samples()[0][:count, :length]}
    if args.text:
        documents = load_documents(args.text)
        texts[Path(args.text).stem] = whole_samples(documents, run.tokenizer, count=count, length=length)
    texts = {name: windows.to(device) for name, windows in texts.items()}
    cases: list[tuple[str, float, dict[str, Any]]] = [
        ("dynamic", float(budget), {}) for budget in args.budgets.split(",")
    ]
    cases += [(name, args.equal, changes) for name, changes in EQUAL.items()]
    points = measure(run, texts, cases)
    found = {text: correlations(points, text) for text in texts}
    at_equal = {text: correlations([p for p in points if p.budget == args.equal], text) for text in texts}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    data = {"points": [asdict(p) for p in points], "correlations": found, "at_equal_budget": at_equal}
    args.output.write_text(json.dumps(data, indent=1))
    draw(points, list(texts), len(EQUAL), args.output.with_suffix(".png"), f"{source.name}: predicted and measured")
    _print(points, list(texts), found, at_equal)


def _print(
    points: list[Point], texts: list[str], found: dict[str, dict[str, float]], at_equal: dict[str, dict[str, float]]
) -> None:
    heads = [f"KL, {text} | of predicted | perplexity ratio" for text in texts]
    print("| plan | budget | bytes per token | loss | predicted KL | " + " | ".join(heads) + " |")
    print("|---" * (5 + 3 * len(texts)) + "|")
    for p in points:
        cells = [f"{m['kl']:.4f} | {m['kl'] / p.kl:.2f} | {m['ratio']:.4f}" for m in (p.measured[t] for t in texts)]
        print(f"| {p.name} | {p.budget:g} % | {p.row_bytes} | {p.loss:.4g} | {p.kl:.4f} | " + " | ".join(cells) + " |")
    for title, values in (("all", found), ("equal budget", at_equal)):
        for text, row in values.items():
            print(f"{title}, {text}: " + "; ".join(f"{k} {v:.3f}" for k, v in row.items()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hub id, directory, .gguf file or 'demo'")
    parser.add_argument("--text", help="a second evaluation text; never calibrate on it")
    parser.add_argument("--dataset", default="bundled", help="calibration text")
    parser.add_argument(
        "--calibration-tokens", type=int, help="tokens to calibrate on; default 16384 on CPU, 262144 on GPU"
    )
    parser.add_argument("--num-samples", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--exact-window", type=int, default=32, help="exact tokens, and tokens per step")
    parser.add_argument("--budgets", default="25,12.5,6.25,4,3,2,1.5,1", help="percent, comma-separated")
    parser.add_argument("--equal", type=float, default=3.0, help="percent at which planners are compared")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work-dir", type=Path, default=Path("scratch/prediction"), help="keeps the statistics")
    parser.add_argument("--output", type=Path, default=Path("scratch/prediction.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
