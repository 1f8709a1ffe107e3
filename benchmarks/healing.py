"""What healing buys back: quality before and after, and KL against trained tokens, for several budgets.

    python benchmarks/healing.py MODEL --text TEXT [--dataset D] [--budgets 6.25,2] [--heal-tokens N]
    python benchmarks/healing.py MODEL --text TEXT --mla --heal-tokens 10000000

Percent is the latents' share of the source cache, scales included, exact window (W = 64) not. Perplexity over samples
of TEXT at two context lengths, streamed W tokens per step with the caches really kept, and codes planted in the same
text, beside the source in the same run. `--mla` heals the form without a window instead: latents of 12.5 % of the
rank, not quantized, from the first layer of each group.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from clla import console
from clla.checkpoint.assemble import attach
from clla.convert.factor import make_codec
from clla.convert.stages import Run, resolve
from clla.evaluate.figures import draw_healing
from clla.evaluate.perplexity import Subject, compare
from clla.evaluate.retrieval import make_trials, retrieve
from clla.evaluate.source_cache import SourceCache
from clla.heal.run import Healing, HealOptions, heal, resolve_healing
from clla.modeling.modeling_clla import CllaForCausalLM
from clla.plan.budget import derive_group_size
from clla.plan.metrics import weigh
from clla.recipe import Recipe
from clla.source.device import pick_device
from clla.source.model import open_source
from clla.text.sequences import load_documents, whole_samples

MLA: dict[str, dict[str, Any]] = {
    "plan": {"latent_input": "first_layer", "bits": (16,)},
    "budget": {"exact_window": 0, "num_sinks": 0},
}


def main() -> None:
    """Calibrate once; convert, measure, heal and measure again for every budget; print and write everything."""
    args = _arguments()
    logging.set_verbosity_error()
    device, source = pick_device(args.device), open_source(args.model)
    changes: dict[str, dict[str, Any]] = {
        "calibration": {"dataset": args.dataset, "tokens": args.calibration_tokens},
        "heal": {},
    }
    smallest = min(float(budget) for budget in args.budgets.split(","))  # of which groups are the longest
    changes["budget"] = {"budget_context": 0, "exact_window": args.exact_window, "kv_budget": f"{smallest}%"}
    recipe = Recipe().override(changes)
    recipe = resolve(recipe.override(MLA) if args.mla else recipe, source, device)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    run = Run(source, recipe, device, args.work_dir, hold_out=False)  # another text is measured on
    stats, documents = run.stats(), load_documents(args.text)
    texts = {
        length: whole_samples(documents, run.tokenizer, count=count, length=length).to(device)
        for length, count in ((2048, args.num_samples), (8192, args.num_long_samples))
        if count
    }
    results: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(args).items()}, "budgets": {}}
    for budget in ("12.5",) if args.mla else args.budgets.split(","):
        size = derive_group_size(float(budget) / 100, source.kv.values, recipe.plan.source)
        own = recipe.override(
            {
                "budget": {"kv_budget": f"{budget}%"},
                "plan": {"max_layers_per_group": min(size, recipe.plan.group_size)},
                "heal": _heal_changes(args),
            }
        )
        run.recipe, run.plan_key = own, f"healing-{budget}-{recipe.plan.source}-{args.exact_window}"
        spectra = weigh(stats, own)
        plan = run.plan(stats, spectra)
        converted = attach(run.model(), make_codec(spectra, plan, stats), run.block(plan))
        chunk = plan.window or 64
        before = measure(converted, run.model(), run.tokenizer, texts, args, chunk=chunk)
        config = resolve_healing(own.heal, plan, own, device) if own.heal else None
        assert config is not None
        start = time.monotonic()
        work = args.work_dir / f"heal-{budget}"
        healed, progress = heal(converted, run.model(), run.tokenizer, config, HealOptions(work, resume=args.resume))
        seconds = time.monotonic() - start
        for parameter in healed.parameters():
            parameter.data = parameter.data.to(source.dtype)
        results["budgets"][budget] = {
            "before": before,
            "after": measure(healed, run.model(), run.tokenizer, texts, args, chunk=chunk),
            "config": config.model_dump(mode="json"),
            "history": [asdict(point) for point in progress.history],
            "seconds": seconds,
            "verdict": Healing(config, progress.history, progress.stopped, None).verdict,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1))
    show(results)
    histories = {f"{budget} %": row["history"] for budget, row in results["budgets"].items()}
    draw_healing(histories, args.output.with_suffix(".png"))


def measure(
    converted: CllaForCausalLM,
    source: PreTrainedModel,
    tokenizer: Any,
    texts: dict[int, Tensor],
    args: argparse.Namespace,
    *,
    chunk: int,
) -> dict[str, Any]:
    """Perplexity and KL at every context length, and retrieval, of source and converted model."""
    dtype = getattr(torch, converted.config.spec.kv_dtype)
    models = {
        "source": Subject(source, lambda: SourceCache(source.config, dtype)),
        "converted": Subject(converted, converted.new_cache),
    }
    found: dict[str, Any] = {}
    for length, windows in texts.items():
        with console.progress(f"Measuring at {length} (windows)", len(windows)) as advance:
            quality = compare(models, windows, chunk=chunk, on_sample=advance)
        found[str(length)] = {name: asdict(q) for name, q in quality.items()}
    if args.retrieval_trials:
        filler = next(iter(texts.values())).flatten().cpu()
        trials = make_trials(tokenizer, filler, context=args.retrieval_context, count=args.retrieval_trials)
        device = source.device
        found["retrieval"] = {n: asdict(retrieve(m, trials, chunk=chunk, device=device)) for n, m in models.items()}
    return found


def show(results: dict[str, Any]) -> None:
    """The table, in Markdown."""
    print("| budget | measure | source | before | after |\n|---|---|---|---|---|")
    for budget, row in results["budgets"].items():
        for key, after in row["after"].items():
            for name in ("perplexity", "kl") if key != "retrieval" else ("nll", "exact"):
                values = after["source"][name], row["before"][key]["converted"][name], after["converted"][name]
                print(f"| {budget} % | {name}, {key} | " + " | ".join(f"{value:.4f}" for value in values) + " |")
        speeds = [point["tokens_per_second"] for point in row["history"][1:]]
        print(f"\n{row['verdict']}; {row['seconds']:.0f} s in all, {max(speeds):,.0f} tokens/s at best\n")


def _heal_changes(args: argparse.Namespace) -> dict[str, Any]:
    names = ("train", "codec_lr", "weight_lr", "sequence_length", "batch_tokens", "codec_share", "cache_share")
    changes = {name: getattr(args, name) for name in names}
    return changes | {"tokens": args.heal_tokens, "evaluations": args.evaluations}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hub id, directory, .gguf file or 'demo'")
    parser.add_argument("--text", required=True, help="evaluation text; never calibrate or heal on it")
    parser.add_argument("--dataset", default="bundled", help="text to calibrate and heal on")
    parser.add_argument(
        "--calibration-tokens", type=int, help="tokens to calibrate on; default 16384 on CPU, 262144 on GPU"
    )
    parser.add_argument("--budgets", default="6.25,2", help="percent, comma-separated")
    parser.add_argument("--mla", action="store_true", help="the form without a window, 12.5 %% of the rank")
    parser.add_argument("--exact-window", type=int, default=64)
    parser.add_argument("--num-samples", type=int, default=24, help="samples of 2048 tokens")
    parser.add_argument("--num-long-samples", type=int, default=8, help="samples of 8192 tokens; 0 leaves them out")
    parser.add_argument("--retrieval-trials", type=int, default=32, help="planted codes; 0 leaves retrieval out")
    parser.add_argument("--retrieval-context", type=int, default=4096)
    parser.add_argument("--heal-tokens", type=int, help="default: by budget and device")
    parser.add_argument("--train", choices=("codec", "attention", "all"))
    parser.add_argument("--codec-lr", type=float)
    parser.add_argument("--weight-lr", type=float)
    parser.add_argument("--sequence-length", type=int)
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--codec-share", type=float)
    parser.add_argument("--cache-share", type=float)
    parser.add_argument("--evaluations", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--work-dir", type=Path, default=Path("scratch/healing"), help="keeps statistics, text and states"
    )
    parser.add_argument("--output", type=Path, default=Path("scratch/healing.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
