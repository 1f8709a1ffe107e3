"""What calibration costs, in forward passes of the source over the same tokens.

    python benchmarks/calibration.py MODEL [--rounds N] [--batch B] [--length T] [--band K] [--device D] [--clock C]

The unit is a plain forward pass with its logits. Every round runs it beside the parts of calibration, in the same
process, so that whatever else the machine does meets all of them; the table holds medians over the rounds. Also the
multiplications and additions that the parts need, for the model and for known shapes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from clla.calibrate.collect import Collection, Collector, TokenRows
from clla.calibrate.importance import Importance
from clla.calibrate.moments import STRIPS
from clla.calibrate.rope_detection import rope_settings
from clla.recipe import CalibrationConfig
from clla.source.device import pick_device, pick_dtype
from clla.source.model import open_source

BASIS = CalibrationConfig().basis
# hidden, intermediate, layers, query heads, key-value heads, head dim, vocabulary
SHAPES = {
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 64, 49_152),
    "Llama-3-8B": (4096, 14_336, 32, 32, 8, 128, 128_256),
    "Llama-2-7B": (4096, 11_008, 32, 32, 32, 128, 32_000),
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Arithmetic:
    """Floating-point operations a token: a forward pass, its gradients to keys and values, moments, metric."""

    forward: float
    backward: float
    moments: float
    metric: float

    @property
    def floor(self) -> float:
        """Forward passes that calibration takes where every operation takes as long as one of the forward pass."""
        return (self.forward + self.moments + self.backward + self.metric) / self.forward


def arithmetic(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int, vocabulary: int, *,
    length: int, band: int,
) -> Arithmetic:  # fmt: skip
    """Of a decoder with gated feed-forward layers, on sequences of `length` tokens."""
    projections = hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * intermediate
    attention = 4 * heads * head_dim * (length / 2)  # scores and their use, for half of the pairs
    head = 2 * hidden * vocabulary
    n = min(2 * kv_heads * head_dim, BASIS)
    pairs = sum(min(band, layers - layer) for layer in range(layers))
    own = (1 + 1 / STRIPS) / 2  # of a layer with itself, as strips on and above the diagonal
    return Arithmetic(
        forward=layers * (2 * projections + attention) + head,
        backward=layers * (2 * projections + 2.5 * attention) + head,  # scores are formed once more
        moments=2 * n * n * (pairs - layers + own * layers),
        metric=2 * n * n * own * layers,
    )


def main() -> None:
    """Parse, measure, print."""
    args = _arguments()
    logging.set_verbosity_error()
    device, source = pick_device(args.device), open_source(args.model)
    dtype = pick_dtype(args.dtype, source.dtype, device)
    model = source.load_model(dtype=dtype, device=device)
    ids = torch.randint(source.config.get_text_config().vocab_size, (args.batch, args.length), device=device)
    rope = rope_settings(model, source.layers)
    wanted = Collection(source.layers, source.kv, args.band, rope, window=args.window)
    collector = Collector(model, wanted, checkpointing=args.checkpointing)
    rows = measured(model, collector, ids, rounds=args.rounds, clock=CLOCKS[args.clock])
    unit = statistics.median(rows["forward"])
    found = {
        name: {"seconds": statistics.median(times), "forwards": statistics.median(_ratios(times, rows["forward"]))}
        for name, times in rows.items()
    }
    shapes = {name: arithmetic(*shape, length=args.length, band=args.band) for name, shape in SHAPES.items()}
    if args.json:
        arguments = {key: str(value) for key, value in vars(args).items()}
        floors = {name: {**vars(shape), "floor": shape.floor} for name, shape in shapes.items()}
        print(json.dumps({"arguments": arguments, "dtype": str(dtype), "parts": found, "arithmetic": floors}, indent=1))
        return
    print(f"{args.model}, {dtype}, {args.batch} x {args.length} tokens: a forward pass takes {unit:.3f} s\n")
    print("| part | seconds | forward passes |\n|---|---|---|")
    for name, row in found.items():
        print(f"| {name} | {row['seconds']:.3f} | {row['forwards']:.2f} |")
    print("\n| operations a token | forward | backward | moments | metric | floor, forward passes |\n|" + "---|" * 6)
    for name, shape in shapes.items():
        cells = (f"{value / 1e6:.0f} M" for value in vars(shape).values())
        print(f"| {name} | " + " | ".join(cells) + f" | {shape.floor:.2f} |")


def measured(
    model: PreTrainedModel, collector: Collector, ids: torch.Tensor, *, rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each part in each round; the first round, in which memory is taken, does not count."""
    found: dict[str, list[float]] = {}
    collector.importance = Importance(len(collector.wanted.layers), collector.wanted.kv.values)
    portion: list[TokenRows] = []
    for number in range(rounds + 1):
        parts: dict[str, Callable[[], object]] = {
            "forward": lambda: _forward(model, ids),
            "keys, values and gradients": lambda: portion.append(collector.read(ids)),
            "moments and metric": lambda: collector.settle(portion),
        }
        portion.clear()
        times = {name: _seconds(part, ids.device, clock) for name, part in parts.items()}
        times["calibration"] = times["keys, values and gradients"] + times["moments and metric"]
        if number:
            for name, seconds in times.items():
                found.setdefault(name, []).append(seconds)
    return found


@torch.no_grad()
def _forward(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def _seconds(part: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    start = clock()
    part()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def _ratios(times: list[float], units: list[float]) -> list[float]:
    return [a / b for a, b in zip(times, units, strict=True)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hub id, directory, .gguf file or 'demo'")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=1, help="sequences per batch")
    parser.add_argument("--length", type=int, default=2048, help="tokens per sequence")
    parser.add_argument("--window", type=int, default=128, help="newest tokens that will be exact; 0: none")
    parser.add_argument("--band", type=int, default=6, help="largest group size")
    parser.add_argument("--checkpointing", default="auto", choices=("auto", "always", "never"))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--clock", default="wall", choices=tuple(CLOCKS), help="'cpu' where others use the cores, too")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
