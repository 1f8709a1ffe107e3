"""Quality against the latents' share of the source cache, for any model: the table of this field.

    python benchmarks/quality.py MODEL --text TEXT [--dataset D] [--calibration-tokens N]
        [--num-samples N] [--budgets 12.5,6.25]

Perplexity over samples of TEXT, streamed in chunks of the exact window W (never fewer than 32), with the
caches really kept. Percent is the latents' share of the source cache, scales included, exact window not.
The source, and the source with an int4 cache, run over the same text in the same run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from latents import plan_latents
from transformers.utils import logging

from clla import console
from clla.checkpoint.assemble import attach, clla_block
from clla.convert.factor import make_codec
from clla.convert.stages import Run, resolve
from clla.evaluate.figures import draw_quality
from clla.evaluate.perplexity import Quality, Subject, compare
from clla.evaluate.report import subjects
from clla.plan.metrics import weigh
from clla.recipe import Recipe
from clla.source.device import pick_device
from clla.source.model import Source, open_source
from clla.text.sequences import load_documents, whole_samples

# name: (latent source, window, most layers per group; None as a recipe with the budget)
VARIANTS: dict[str, tuple[str, int, int | None]] = {
    "group W=128": ("group", 128, None),
    "group W=32": ("group", 32, None),
    "first W=128": ("first", 128, None),
    "first W=32": ("first", 32, None),
    "first no window": ("first", 0, None),
    "per layer W=128": ("group", 128, 1),
    "groups of 6 W=128": ("group", 128, 6),
}


def main() -> None:
    """Parse, calibrate once for each window, run every variant and budget, print and write the table."""
    args = _arguments()
    logging.set_verbosity_error()
    device, source = pick_device(args.device), open_source(args.model)
    names = [name for name in VARIANTS if name in args.variants.split(",")] if args.variants else list(VARIANTS)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    samples = whole_samples(
        load_documents(args.text), source.load_tokenizer(), count=args.num_samples, length=args.sequence_length
    ).to(device)
    rows: dict[str, dict[str, float]] = {}
    runs: dict[int, Run] = {}
    for name in names:
        window = VARIANTS[name][1]
        if window not in runs:
            runs[window] = Run(
                source, _settings(window, names, args, source, device), device, args.work_dir, hold_out=False
            )
        rows |= _variant(name, runs[window], samples, args)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(
            json.dumps({"arguments": {k: str(v) for k, v in vars(args).items()}, "rows": rows}, indent=1)
        )
    _print(rows, names, args)
    points = {"source": (rows["source"]["bytes_per_token"], rows["source"]["perplexity"])}
    points["source, int4 cache"] = (rows["int4"]["bytes_per_token"], rows["int4"]["perplexity"])
    points |= {
        f"clla {key.split('|')[1]} %": (row["latent_bytes"], row["perplexity"])
        for key, row in rows.items()
        if key.startswith(names[0])
    }
    draw_quality(
        points,
        args.output.with_suffix(".png"),
        curve="clla",
        title=f"{source.name}: {args.num_samples} samples of {args.sequence_length}, {names[0]}, latents' bytes",
    )


def _settings(window: int, names: list[str], args: argparse.Namespace, source: Source, device: torch.device) -> Recipe:
    """What the moments of all variants with a window are collected by."""
    own = [VARIANTS[name] for name in names if VARIANTS[name][1] == window]
    smallest = min(float(budget) for budget in args.budgets.split(","))
    changes: dict[str, dict[str, Any]] = {
        "calibration": {"dataset": args.dataset, "tokens": args.calibration_tokens},
        # of which groups are the longest
        "budget": {"budget_context": 0, "exact_window": window, "kv_budget": f"{smallest}%"},
        "plan": {"latent_input": "all_layers" if window else "first_layer"},
    }
    recipe = resolve(Recipe().override(changes), source, device)
    inputs = any(kind == "first" for kind, _, _ in own)  # whose moments are collected for them
    return recipe.override({"plan": {"latent_input": "first_layer"}}) if inputs else recipe


def _variant(name: str, run: Run, windows: torch.Tensor, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """All budgets of one variant, beside the source, over the same windows."""
    latent_source, window, group_size = VARIANTS[name]
    stats = run.stats()
    recipe = run.recipe.override(
        {"plan": {"latent_input": "all_layers" if latent_source == "group" else "first_layer"}}
    )
    config = recipe.plan.model_copy(update={"max_layers_per_group": group_size})
    spectra, model = weigh(stats, recipe), run.model()
    models: dict[str, Subject] = {}
    planned: dict[str, float] = {}
    for budget in args.budgets.split(","):
        plan = plan_latents(run, spectra, stats, config, percent=float(budget), window=window)
        block = clla_block(
            plan,
            rope=run.rope,
            kv_dtype=run.source.dtype,
            prefill_chunk=max(window, 32),
        )
        converted = attach(model, make_codec(spectra, plan, stats), block)
        if not models:
            models = {k: v for k, v in subjects(converted, run.source.dtype).items() if k != "converted"}
        models[f"{name}|{budget}"] = Subject(converted, converted.new_cache)
        planned[f"{name}|{budget}"] = float(plan.row_bytes)
    with console.progress(name, len(windows)) as advance:
        found = compare(models, windows, chunk=max(window, 32), on_sample=advance)
    return {k: _row(q, windows.shape[1], planned.get(k)) for k, q in found.items()}


def _row(quality: Quality, length: int, latent_bytes: float | None) -> dict[str, float]:
    row = {"perplexity": quality.perplexity, "kl": quality.kl, "bytes_per_token": quality.nbytes / length}
    return row if latent_bytes is None else row | {"latent_bytes": latent_bytes}


def _print(rows: dict[str, dict[str, float]], names: list[str], args: argparse.Namespace) -> None:
    source = rows["source"]["perplexity"]
    int4 = rows["int4"]["perplexity"]
    print(f"source {source:.3f}; int4 cache {int4:.3f} ({int4 / source:.4f})\n")
    print("| budget | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for budget in args.budgets.split(","):
        cells = [rows[f"{name}|{budget}"]["perplexity"] for name in names]
        print(f"| {budget} % | " + " | ".join(f"{ppl:.3f} ({ppl / source:.4f})" for ppl in cells) + " |")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hub id, directory, .gguf file or 'demo'")
    parser.add_argument("--text", required=True, help="evaluation text; never calibrate on it")
    parser.add_argument("--dataset", default="bundled", help="calibration text")
    parser.add_argument(
        "--calibration-tokens", type=int, help="tokens to calibrate on; default 16384 on CPU, 262144 on GPU"
    )
    parser.add_argument("--num-samples", type=int, default=24)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--budgets", default="12.5,6.25,3,2", help="percent, comma-separated")
    parser.add_argument("--variants", help="comma-separated; default all: " + ", ".join(VARIANTS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work-dir", type=Path, default=Path("scratch/quality"), help="keeps the statistics")
    parser.add_argument("--output", type=Path, default=Path("scratch/quality.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
