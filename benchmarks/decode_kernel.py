"""One layer's decoding over packed latents on a GPU: against what the machine can do, and against SDPA.

    python benchmarks/decode_kernel.py [--shapes smollm2-135m,llama-3-8b] [--contexts 8192,32768]
        [--batch-sizes 1,16,largest] [--select 2048] [--sweep] [--json]

Everything is measured in one run: the bandwidth of a large copy, the rate of a large bf16 product, the kernels over
packed random latents (logits, softmax, sums, decoding of values), and PyTorch's flash attention over the source's
bf16 cache of that layer; beside it absorbed queries over the same latents with a rotary key in each row (the `strict`
recipe, without the two small products around it). The floor is what no kernel can beat: the longer of the bytes at that
bandwidth and the products at that rate. Calls are recorded in CUDA graphs, the second-level cache is emptied before
each, and they take turns among inputs larger than it. The largest batch is that of one layer in all of the memory.

Shape legend: B sequences, H key-value heads, M query heads a key-value head, K tokens, d head dim, r rank, N bytes a
row, G layers of a group.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from gpu_timing import Ceilings, cache_bytes, measure_ceilings, timed
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clla.bench.machine import machine_facts
from clla.bench.shapes import SINKS, STORED, random_codec, random_plan, shape_config
from clla.modeling import attention_triton_clla, rows_clla
from clla.modeling.absorbed_clla import AbsorbedRows
from clla.modeling.attention_clla import LatentRows, judging_rank
from clla.modeling.pack_triton_clla import pack_rows
from clla.modeling.quantize_clla import ROPE_TIER, JoinedLayout, RowLayout
from clla.modeling.rotary_clla import Turns

BAR = 0.5  # of the floor
ROPE_BITS = 6  # of a rotary key, of as many components as a head
LAYER = 1  # of its group; the plan makes no difference between them
MOST_SETS = 64
PACKED_AT_ONCE = 1 << 26  # components drawn at once
MEMORY_SHARE = 0.85  # of what is free, for the largest batch
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
SWEPT_TILES = [(128, 8), (128, 4), (64, 8), (64, 4), (32, 8), (32, 4)]
SWEPT_COMPONENTS, SWEPT_TOKENS = (16, 32, 64), (32, 64, 128)


@dataclass(frozen=True)
class Shape:
    """One layer of a model, and its group's codec; `theta` is the base of its rotation."""

    name: str
    heads: int
    per_head: int
    size: int
    theta: float
    layout: RowLayout
    codec: Any

    @property
    def query_heads(self) -> int:
        return self.heads * self.per_head

    @property
    def joined(self) -> JoinedLayout:
        """Rows with a rotary key."""
        return JoinedLayout(self.layout, RowLayout((ROPE_BITS,) * (self.size // ROPE_TIER), ROPE_TIER))

    @property
    def scaling(self) -> float:
        return self.size**-0.5

    @property
    def judging_rank(self) -> int:
        """First components by which tokens are chosen."""
        return judging_rank(self.layout)


@dataclass
class Inputs:
    """Attributes: rows as a forward pass reads them; query [B, H, M, d]; logits [B, H, M, K], written."""

    rows: LatentRows
    query: Tensor
    logits: Tensor


def main(arguments: list[str] | None = None) -> None:
    """Parse, check the kernels, measure every case, print."""
    args = _arguments(arguments)
    device = torch.device("cpu" if args.dry_run else "cuda")
    facts, rows, sweeps, errors = machine_facts(device), [], [], {}
    kernels = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    with torch.inference_mode(), _kernels(kernels):
        ceilings = measure_ceilings(device, small=args.dry_run)
        for name in args.shapes:
            shape = make_shape(name, args.kv_budget, args.max_layers_per_group, device)
            errors[name] = {str(dtype).removeprefix("torch."): check(shape, dtype, device) for dtype in TOLERANCE}
            for context, batch in product(args.contexts, args.batch_sizes):
                batch = batch or largest_batch(shape, context, device)
                rows.append(measure(shape, context, batch, args.select, ceilings, device))
                print(f"{name}, {context} tokens, batch {batch}: done", file=sys.stderr, flush=True)
                if args.sweep and kernels:
                    sweeps += sweep(shape, context, batch, device)
    report = {"machine": facts, "ceilings": vars(ceilings), "errors": errors, "rows": rows, "sweep": sweeps}
    print(json.dumps(report, indent=1) if args.json else table(report, args.select))


# What is measured


def make_shape(name: str, kv_budget: str, max_layers_per_group: int, device: torch.device) -> Shape:
    """A layer of the first group of a plan with the widths of real ones, with a random codec."""
    config = shape_config(name)
    plan = random_plan(config, kv_budget=kv_budget, max_layers_per_group=max_layers_per_group)
    codec = random_codec(_first_group(plan), dtype=STORED, device=device).groups[0]
    heads, rope = plan.kv.num_key_value_heads, getattr(config, "rope_parameters", None) or {}
    layout = RowLayout(plan.groups[0].tier_bits, plan.tier_size)
    per_head, theta = config.num_attention_heads // heads, rope.get("rope_theta", 10000.0)
    return Shape(name, heads, per_head, plan.kv.head_dim, theta, layout, codec)


def make_inputs(
    shape: Shape, context: int, batch: int, device: torch.device, *, dtype: torch.dtype = STORED, seed: int = 0
) -> Inputs:
    """Packed random latents of unit variance, and queries."""
    draw = _drawing(device, dtype, seed)
    data = random_rows(shape.layout, context, batch, draw, device)
    hidden = torch.full((batch,), SINKS, dtype=torch.int64, device=device)
    codec = SimpleNamespace(decoder=shape.codec.decoder.to(dtype), mean=shape.codec.mean.to(dtype))
    rows = LatentRows(data, shape.layout, codec, hidden, SINKS, _turns(shape, context, device))
    query = draw(batch, shape.heads, shape.per_head, shape.size)
    logits = torch.empty(batch, shape.heads, shape.per_head, context, device=device)
    return Inputs(rows, query, logits)


def make_absorbed(
    shape: Shape, context: int, batch: int, device: torch.device, *, dtype: torch.dtype = STORED, seed: int = 0
) -> tuple[AbsorbedRows, Tensor]:
    """Packed random rows with rotary keys, and absorbed queries [B, H·M, 1, r + p]."""
    draw, layout = _drawing(device, dtype, seed), shape.joined
    data = torch.cat([random_rows(part, context, batch, draw, device) for part in layout.parts], dim=-1)
    rows = AbsorbedRows(data, layout, dtype, torch.zeros(batch, dtype=torch.int64, device=device))
    return rows, draw(batch, shape.query_heads, 1, layout.rank)


def random_rows(
    layout: RowLayout, context: int, batch: int, draw: Callable[..., Tensor], device: torch.device
) -> Tensor:
    """Packed latents [B, K, N] of unit variance."""
    data = torch.empty(batch, context, layout.row_bytes, dtype=torch.uint8, device=device)
    at_once = max(1, PACKED_AT_ONCE // layout.rank)
    for sequence, start in product(range(batch), range(0, context, at_once)):
        stop = min(start + at_once, context)
        latents = draw(1, stop - start, layout.rank)
        if device.type == "cuda":
            pack_rows(latents, layout, data[sequence : sequence + 1], start)
        else:
            data[sequence, start:stop] = layout.pack(latents[0])
    return data


def _drawing(device: torch.device, dtype: torch.dtype, seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *sizes: torch.randn(*sizes, generator=generator, dtype=dtype, device=device)


def read_all(shape: Shape, inputs: Inputs) -> Tensor:
    """Attention [B, H, M, d] to all tokens."""
    inputs.rows.logits(inputs.query, LAYER, inputs.logits, scaling=shape.scaling, turned=True)
    return inputs.rows.values(inputs.logits.softmax(-1), LAYER)


def read_chosen(shape: Shape, inputs: Inputs, select: int) -> Tensor:
    """Attention [B, H, M, d] to the `select` tokens with the most weight by the first components."""
    options: dict[str, Any] = {"scaling": shape.scaling, "turned": True}
    inputs.rows.logits(inputs.query, LAYER, inputs.logits, rank=shape.judging_rank, **options)
    best = inputs.logits.softmax(-1).sum((1, 2)).topk(select, sorted=False).indices.sort().values
    chosen = inputs.rows.chosen(best)
    logits = torch.empty(*inputs.query.shape[:3], select, device=inputs.query.device)
    chosen.logits(inputs.query, LAYER, logits, **options)
    return chosen.values(logits.softmax(-1), LAYER)


def floor(shape: Shape, context: int, batch: int, ceilings: Ceilings) -> tuple[float, str]:
    """Seconds that no kernel can beat, and which of the two takes them.

    Bytes: rows, decoders and angles once, logits once written and once read. Products: keys, logits, sums and values.
    """
    rank, width, logits = shape.layout.rank, shape.heads * shape.size, batch * shape.query_heads * context
    nbytes = batch * context * shape.layout.row_bytes + STORED.itemsize * (2 * width * rank + context * shape.size)
    nbytes += 2 * 4 * logits
    flops = 2 * batch * context * rank * width + 2 * logits * (shape.size + rank)
    flops += 2 * batch * shape.query_heads * rank * shape.size
    seconds = {"bytes": nbytes / ceilings.bytes_per_s, "products": flops / ceilings.flops_per_s}
    longer = max(seconds, key=lambda key: seconds[key])
    return seconds[longer], longer


def absorbed_floor(shape: Shape, context: int, batch: int, ceilings: Ceilings) -> float:
    """The same for absorbed queries: rows and logits; products of queries with rows, of weights with latents."""
    logits = batch * shape.query_heads * context
    nbytes = batch * context * shape.joined.row_bytes + 2 * 4 * logits
    flops = 2 * logits * (shape.joined.rank + shape.layout.rank)
    return max(nbytes / ceilings.bytes_per_s, flops / ceilings.flops_per_s)


def sdpa(shape: Shape, context: int, batch: int, device: torch.device, *, folded: bool) -> float:
    """Seconds of PyTorch's flash attention over a bf16 cache.

    Args:
        folded: query heads of a key-value head are passed as its queries, so that keys are read once for all of them,
            rather than with `enable_gqa`.
    """
    set_bytes = 2 * batch * context * shape.heads * shape.size * STORED.itemsize
    head_shape = (shape.heads, shape.per_head) if folded else (shape.query_heads, 1)
    drawn = []
    for _ in range(_sets(set_bytes, device)):
        query = torch.randn(batch, *head_shape, shape.size, dtype=STORED, device=device)
        both = torch.randn(2, batch, shape.heads, context, shape.size, dtype=STORED, device=device)
        drawn.append((query, *both))
    backends = [SDPBackend.FLASH_ATTENTION] if device.type == "cuda" else [SDPBackend.MATH]

    attend = partial(nn.functional.scaled_dot_product_attention, enable_gqa=not folded)
    with sdpa_kernel(backends):
        return timed([partial(attend, *x) for x in drawn], device)


def measure(
    shape: Shape, context: int, batch: int, select: int, ceilings: Ceilings, device: torch.device
) -> dict[str, Any]:
    """Seconds of one case, by kernels and by SDPA."""
    set_bytes = batch * context * (shape.layout.row_bytes + 4 * shape.query_heads)
    sets = [make_inputs(shape, context, batch, device, seed=i) for i in range(_sets(set_bytes, device))]
    least, bound = floor(shape, context, batch, ceilings)
    found: dict[str, Any] = {"shape": shape.name, "context": context, "batch": batch, "floor": least, "bound": bound}
    found["all"] = timed([partial(read_all, shape, s) for s in sets], device)
    options: dict[str, Any] = {"scaling": shape.scaling, "turned": True}
    found["logits"] = timed([partial(s.rows.logits, s.query, LAYER, s.logits, **options) for s in sets], device)
    for inputs in sets:
        inputs.logits.copy_(inputs.logits.softmax(-1))
    found["values"] = timed([partial(s.rows.values, s.logits, LAYER) for s in sets], device)
    found["chosen"] = None
    if select < context:
        found["chosen"] = timed([partial(read_chosen, shape, s, select) for s in sets], device)
    del sets, inputs  # the others need the room
    absorbed = [make_absorbed(shape, context, batch, device, seed=i) for i in range(_sets(set_bytes, device))]
    found["absorbed"] = timed([partial(rows.sums, query, shape.scaling) for rows, query in absorbed], device)
    found["absorbed_floor"] = absorbed_floor(shape, context, batch, ceilings)
    del absorbed
    found["sdpa"] = sdpa(shape, context, batch, device, folded=False)
    found["sdpa_folded"] = sdpa(shape, context, batch, device, folded=True)
    return found | {"sets_bytes": set_bytes, "share_of_floor": least / found["all"]}


def check(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Largest errors of kernels against the twin in fp32, in parts of the largest: logits, attention, absorbed sums.

    Raises:
        SystemExit: they are too large, not numbers, or other rows are hidden.
    """
    inputs = make_inputs(shape, 200, 2, device, dtype=dtype)
    inputs.rows.hidden[1] += 37
    inputs.rows.reach = 200
    found = read_all(shape, inputs), inputs.logits
    exact = make_inputs(shape, 200, 2, device, dtype=torch.float32)
    exact.rows.data, exact.rows.hidden, exact.rows.reach = inputs.rows.data, inputs.rows.hidden, 200
    exact.query = inputs.query.float()
    exact.rows.codec.decoder, exact.rows.codec.mean = (
        x.float() for x in (inputs.rows.codec.decoder, inputs.rows.codec.mean)
    )
    with _kernels(False):
        expected = read_all(shape, exact), exact.logits
    errors = {k: _error(a, b) for k, a, b in zip(("attention", "logits"), found, expected, strict=True)}
    rows, query = make_absorbed(shape, 200, 2, device, dtype=dtype)
    rows.hidden[1] += 37
    sums = rows.sums(query, shape.scaling)
    twin = AbsorbedRows(rows.data, rows.layout, torch.float32, rows.hidden)
    with _kernels(False):
        errors["absorbed"] = _error(sums, twin.sums(query.float(), shape.scaling))
    if not all(error <= TOLERANCE[dtype] for error in errors.values()):
        raise SystemExit(f"{shape.name} in {dtype}: errors {errors}; at most {TOLERANCE[dtype]} is expected")
    return errors


def sweep(shape: Shape, context: int, batch: int, device: torch.device) -> list[dict[str, Any]]:
    """Seconds of both kernels with other tiles and blocks, the best first; what does not fit is left out."""
    inputs = make_inputs(shape, context, batch, device)
    options: dict[str, Any] = {"scaling": shape.scaling, "turned": True}

    def logits() -> Tensor:
        inputs.rows.logits(inputs.query, LAYER, inputs.logits, **options)
        return inputs.logits

    right = logits().clone()
    weights = right.softmax(-1)
    add_up = partial(attention_triton_clla.packed_sums, inputs.rows, weights)
    sums, found = add_up(), []
    for tile, components in product(SWEPT_TILES, SWEPT_COMPONENTS):
        changed = {"tile_of": lambda *_, tile=tile: tile, "COMPONENTS": components}
        found.append(_tried("logits", {"tile": tile, "components": components}, changed, logits, right, device))
    for tokens, components in product(SWEPT_TOKENS, SWEPT_COMPONENTS):
        changed = {"TOKENS": tokens, "COMPONENTS": components}
        found.append(_tried("sums", {"tokens": tokens, "components": components}, changed, add_up, sums, device))
    found = sorted((row for row in found if row), key=lambda row: (row["kernel"], row["seconds"]))
    return [{"shape": shape.name, "context": context, "batch": batch, **row} for row in found]


def _tried(
    kernel: str, said: dict[str, Any], changed: dict[str, Any], call: Callable[[], Tensor], right: Tensor, device: Any
) -> dict[str, Any]:
    """One setting; empty if it does not compile, does not fit or is wrong."""
    before = {name: getattr(attention_triton_clla, name) for name in changed}
    try:
        for name, value in changed.items():
            setattr(attention_triton_clla, name, value)
        if not _error(call(), right) <= TOLERANCE[STORED]:
            print(f"{kernel} {said}: wrong", file=sys.stderr)
            return {}
        return {"kernel": kernel, **said, "seconds": timed([call], device)}
    except Exception as error:  # Triton has several, and a setting that fails is no reason to stop
        print(f"{kernel} {said}: {type(error).__name__}", file=sys.stderr)
        return {}
    finally:
        for name, value in before.items():
            setattr(attention_triton_clla, name, value)


# With what


def largest_batch(shape: Shape, context: int, device: torch.device) -> int:
    """Sequences that one layer has room for, both by kernels and by SDPA."""
    if device.type != "cuda":
        return 3
    torch.cuda.empty_cache()
    source = 2 * shape.heads * shape.size * STORED.itemsize
    latents = shape.layout.row_bytes + 4 * 4 * shape.query_heads  # logits, weights, and as much for what is between
    return int(MEMORY_SHARE * torch.cuda.mem_get_info(device)[0] / (context * max(source, latents)))


def _sets(nbytes: int, device: torch.device) -> int:
    """Inputs of so many bytes that are together twice the second-level cache."""
    return min(MOST_SETS, math.ceil(2 * cache_bytes(device) / nbytes))


@contextmanager
def _kernels(wanted: bool) -> Iterator[None]:
    """Rows are read by kernels, or by their twin."""
    before = rows_clla.on_gpu
    rows_clla.on_gpu = lambda x: wanted
    try:
        yield
    finally:
        rows_clla.on_gpu = before


def _turns(shape: Shape, context: int, device: torch.device) -> Turns:
    pairs = torch.arange(shape.size // 2, dtype=torch.float64, device=device)
    angles = torch.arange(context, device=device)[:, None] * shape.theta ** (-2 * pairs / shape.size)
    return Turns(torch.polar(torch.ones_like(angles), angles)[None].to(torch.complex64), False)


def _first_group(plan: Any) -> Any:
    """A plan of its first group alone, as no other codec is needed."""
    return SimpleNamespace(groups=plan.groups[:1], kv=plan.kv, tier_size=plan.tier_size)


def _error(found: Tensor, expected: Tensor) -> float:
    """Largest error in parts of the largest; not a number where either is none, or other entries are infinite."""
    seen = expected.isfinite()
    if not torch.equal(seen, found.isfinite()) or bool(found.isnan().any() | expected.isnan().any()):
        return math.nan
    return float((found[seen].double() - expected[seen].double()).abs().max() / expected[seen].abs().max())


def table(report: dict[str, Any], select: int) -> str:
    """Markdown: what was measured, in microseconds, shares and ratios."""
    ceilings, lines = report["ceilings"], []
    lines.append(
        f"{report['machine']['name']}, torch {report['machine']['torch']}: copy "
        f"{ceilings['bytes_per_s'] / 1e9:,.0f} GB/s, bf16 product {ceilings['flops_per_s'] / 1e12:,.0f} TFLOP/s"
    )
    for name, errors in report["errors"].items():
        said = [f"{dtype} {key} {value:.1e}" for dtype, found in errors.items() for key, value in found.items()]
        lines.append(f"{name}: errors against the twin in fp32: " + ", ".join(said))
    titles = ["shape", "context", "batch", "floor, µs", "by", "all, µs", "of floor", "logits", "values"]
    titles += ["SDPA, µs", "folded", "SDPA / all", f"{select} chosen, µs", "SDPA / chosen"]
    titles += ["absorbed, µs", "of its floor"]
    lines += ["", "| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in report["rows"]:
        chosen = row["chosen"]
        cells = [row["shape"], f"{row['context']}", f"{row['batch']}", _micro(row["floor"]), row["bound"]]
        cells += [_micro(row["all"]), f"{100 * row['share_of_floor']:.0f} %", _micro(row["logits"])]
        cells += [_micro(row["values"]), _micro(row["sdpa"]), _micro(row["sdpa_folded"])]
        cells += [f"{row['sdpa'] / row['all']:.2f}", _micro(chosen) if chosen else "–"]
        cells.append(f"{row['sdpa'] / chosen:.2f}" if chosen else "–")
        cells += [_micro(row["absorbed"]), f"{100 * row['absorbed_floor'] / row['absorbed']:.0f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    least = min(row["share_of_floor"] for row in report["rows"])
    verdict = "reached" if least >= BAR else "missed"
    lines += ["", f"At least {100 * least:.0f} % of the floor; the bar of {100 * BAR:.0f} % is {verdict}."]
    shown: dict[tuple[Any, ...], int] = {}
    for row in report["sweep"]:
        key = (row["shape"], row["context"], row["batch"], row["kernel"])
        shown[key] = shown.get(key, 0) + 1
        if shown[key] <= 3:
            setting = {k: row[k] for k in ("tile", "tokens", "components") if k in row}
            lines.append(f"sweep {key}: {_micro(row['seconds'])} µs {setting}")
    return "\n".join(lines)


def _micro(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f}"


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="smollm2-135m,llama-3-8b", help="comma-separated, of `clla bench --shape`")
    parser.add_argument("--contexts", default="8192,32768", help="tokens, comma-separated")
    parser.add_argument("--batch-sizes", default="1,16,largest", help="sequences, comma-separated")
    parser.add_argument("--select", type=int, default=2048, help="tokens read in full, where so many are chosen")
    parser.add_argument("--kv-budget", default="6.25%", help="the latents' share of the source cache")
    parser.add_argument("--max-layers-per-group", type=int, default=6, help="layers that share a latent")
    parser.add_argument("--sweep", action="store_true", help="also try other tiles and blocks; the best are printed")
    parser.add_argument("--json", action="store_true", help="everything as JSON, times in seconds")
    parser.add_argument("--dry-run", action="store_true", help=argparse.SUPPRESS)  # tiny, on a CPU: no figure is real
    args = parser.parse_args(arguments)
    if args.dry_run:
        args.shapes, args.contexts, args.batch_sizes, args.select = "tiny", "40,90", "1,largest", 48
    elif not torch.cuda.is_available():
        raise SystemExit("no GPU: torch.cuda finds none; one with Triton is expected, this measures nothing else")
    args.shapes = args.shapes.split(",")
    try:
        args.contexts = [int(x) for x in args.contexts.split(",")]
        args.batch_sizes = [0 if x == "largest" else int(x) for x in args.batch_sizes.split(",")]
    except ValueError as error:
        parser.error(f"--contexts and --batch-sizes are numbers, or 'largest': {error}")
    return args


if __name__ == "__main__":
    main()
