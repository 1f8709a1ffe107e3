"""How long planning and factoring take for a model of some shape, on random moments of that shape.

    python benchmarks/planning.py --shape llama-3-8b [--layers N] [--budget 6.25] [--device D] [--threads N] [--json]

Keys and values of all layers are made of common factors, whose loadings change from layer to layer and whose variances
fall as a power of their number, and of some that are each layer's own; the metric falls likewise. Only moments are
made, from formulas, so memory is that of the moments.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from clla.artifacts.plan import KVShape, Plan
from clla.artifacts.stats import Stats
from clla.convert.factor import make_codec
from clla.plan.budget import GROUP_SIZE, Budget
from clla.plan.make import make_plan
from clla.plan.spectra import Spectra
from clla.recipe import PlanConfig
from clla.source.device import pick_device

SHAPES = {"smollm2-135m": (30, KVShape(3, 64)), "llama-3-8b": (32, KVShape(8, 128))}
FALL, OWN, TURN, METRIC_FALL = 1.6, 0.05, 0.25, 0.8


def random_stats(layers: int, kv: KVShape, band: int, seed: int = 0) -> Stats:
    """Moments of y_l = A_l z + B_l e_l, where A_l turns slowly with l and the variances of z and e_l fall."""
    generator = torch.Generator().manual_seed(seed)
    n, factors = kv.values, 2 * kv.values

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    scales = torch.arange(1, factors + 1).float().pow(-FALL / 2)
    loadings: list[Tensor] = []  # of the last `band` layers, [n, factors]
    covariance, fisher = torch.zeros(layers, band, n, n), torch.zeros(layers, n, n)
    turned = normal(n, factors)
    for layer in range(layers):
        turned = (1 - TURN**2) ** 0.5 * turned + TURN * normal(n, factors)
        loadings = [*loadings, turned * scales][-band:]
        own = normal(n, n) * (OWN**0.5 * scales[:n])
        for back, earlier in enumerate(reversed(loadings)):
            covariance[layer - back, back] = earlier @ loadings[-1].mT
        covariance[layer, 0] += own @ own.mT
        weights = normal(n, n) * torch.arange(1, n + 1).float().pow(-METRIC_FALL / 2)
        fisher[layer] = weights @ weights.mT / n
    return Stats(tuple(range(layers)), kv, 1, torch.zeros(layers, n), covariance, fisher, made_from="random")


@dataclass(frozen=True)
class Timing:
    """Seconds of each stage, processor time of all together, peak memory, and what it came to."""

    weighing: float
    planning: float
    factoring: float
    processor: float
    gigabytes: float
    groups: int
    rank: int
    loss: float


def measured(stats: Stats, budget: float, device: torch.device) -> Timing:
    """Weigh, plan and factor once."""
    spectra, config = Spectra(stats, device=device), PlanConfig(max_layers_per_group=GROUP_SIZE)
    start, processor = time.perf_counter(), time.process_time()
    _ = spectra.weighted
    weighed = _now(device)
    plan: Plan = make_plan(
        stats,
        config,
        budget=Budget(budget / 100 * len(stats.layers) * stats.kv.values * 2, None, 128, 4),
        kv_itemsize=2,
        kept_layers=(),
        kept_window=0,
        made_from="benchmark",
        spectra=spectra,
    )
    planned = _now(device)
    make_codec(spectra, plan, stats)
    factored = _now(device)
    ranks = [len(group.tier_bits) * plan.tier_size for group in plan.groups]
    return Timing(
        weighing=weighed - start,
        planning=planned - weighed,
        factoring=factored - planned,
        processor=time.process_time() - processor,
        gigabytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        groups=len(ranks),
        rank=max(ranks),
        loss=plan.predicted_loss,
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    """Parse, make moments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3-8b", choices=tuple(SHAPES))
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--budget", type=float, default=6.25, help="percent of 16 bits per value")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    layers, kv = SHAPES[args.shape]
    stats = random_stats(args.layers or layers, kv, GROUP_SIZE)
    print(f"moments of {len(stats.layers)} layers of {kv.values} values", file=sys.stderr)
    found = measured(stats, args.budget, pick_device(args.device))
    if args.json:
        print(json.dumps({"arguments": vars(args), **vars(found)}, indent=1))
        return
    print(
        "| weighing | planning | factoring | all | processor | peak memory | groups | longest latent |\n|" + "---|" * 8
    )
    total = found.weighing + found.planning + found.factoring
    times = " | ".join(f"{t:.1f} s" for t in (found.weighing, found.planning, found.factoring, total, found.processor))
    print(f"| {times} | {found.gigabytes:.1f} GB | {found.groups} | {found.rank} |")


if __name__ == "__main__":
    main()
