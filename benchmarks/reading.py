"""One layer's decoding over packed latents on a GPU: against what the machine can do, and against flash attention.

    python benchmarks/reading.py [--shapes smollm2-135m,llama-3-8b] [--contexts 8192,32768]
        [--batch-sizes 1,16,largest] [--json]

Everything is measured in one run: the bandwidth of a large copy, the rate of a large bf16 product, reading of packed
random latents as a step of decoding does it, in full and with the best rows selected, and PyTorch's flash attention
over the source's bf16 cache of that layer; beside it absorbed queries over the same latents with a rotary key in each
row (the `mla` recipe, without the two small products around it). Rows are unpacked once for all layers of a group: that
is measured by itself, and each layer's time has its share of it. The floor is that of `time_model.py`, at the rates of
this run. Calls are recorded in CUDA graphs, the second-level cache is emptied before each, and they take turns among
inputs larger than it. The largest batch is that of one layer in all of the memory.

Shape legend: B sequences, H key-value heads, M query heads per key-value head, E exact tokens, d head dim, r rank,
p components of a rotary key, K rows, N bytes per row.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from gpu_timing import Ceilings, cache_bytes, measure_ceilings, timed
from time_model import Reading
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clla.bench.machine import machine_facts
from clla.bench.shapes import SINKS, STORED, random_codec, random_plan, shape_config
from clla.modeling.absorbed_clla import AbsorbedRows
from clla.modeling.attention_clla import Buckets, LatentRows, judging_rank, rows_in_full
from clla.modeling.pack_triton_clla import packed
from clla.modeling.quantize_clla import ROPE_TIER, JoinedLayout, RowLayout
from clla.modeling.rotary_clla import Turns, bucket_length
from clla.modeling.unpack_triton_clla import unpacked

ROPE_BITS = 6  # of a rotary key, of as many components as a head
LAYER = 1  # of its group; the plan makes no difference between them
EXACT = 132  # tokens of window and sinks
MOST_SETS = 64
PACKED_AT_ONCE = 1 << 26  # components drawn at once
MEMORY_SHARE = 0.85  # of what is free, for the largest batch
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Shape:
    """One layer of a model, and its group's codec.

    Attributes:
        name, heads, per_head, size: of the model: its name, H, M and d.
        layers: of its group.
        bucket: neighbouring rows that are met with one rotation.
        angles: [d/2], by which pairs turn per position.
        layout: of a row.
        codec: with `decoder` and `mean`.
    """

    name: str
    heads: int
    per_head: int
    size: int
    layers: int
    bucket: int
    angles: Tensor
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


@dataclass
class Inputs:
    """Attributes: rows as a forward pass reads them; query [B, H, M, d]; exact [B, 2H, E, d]; bias [1, 1, E]."""

    rows: LatentRows
    query: Tensor
    exact: Tensor
    bias: Tensor


def main(arguments: list[str] | None = None) -> None:
    """Parse, check what is read, measure every case, print."""
    args = _arguments(arguments)
    device = torch.device("cpu" if args.dry_run else "cuda")
    facts, rows, errors = machine_facts(device), [], {}
    with torch.inference_mode():
        ceilings = measure_ceilings(device, small=args.dry_run)
        for name in args.shapes:
            shape = make_shape(name, args.kv_budget, args.max_layers_per_group, device)
            errors[name] = {str(dtype).removeprefix("torch."): check(shape, dtype, device) for dtype in TOLERANCE}
            for context, batch in product(args.contexts, args.batch_sizes):
                batch = batch or largest_batch(shape, context, device)
                best = 16 if args.dry_run else rows_in_full(context)
                rows.append(measure(shape, context, batch, best, ceilings, device))
                print(f"{name}, {context} tokens, batch {batch}: done", file=sys.stderr, flush=True)
    report = {"machine": facts, "ceilings": vars(ceilings), "errors": errors, "rows": rows}
    print(json.dumps(report, indent=1) if args.json else table(report))


# What is measured


def make_shape(name: str, kv_budget: str, max_layers_per_group: int, device: torch.device) -> Shape:
    """A layer of the first group of a plan with the widths of real ones, with a random codec."""
    config = shape_config(name)
    plan = random_plan(config, kv_budget=kv_budget, max_layers_per_group=max_layers_per_group)
    first: Any = SimpleNamespace(groups=plan.groups[:1], kv=plan.kv, tier_size=plan.tier_size)  # no other is needed
    codec = random_codec(first, dtype=STORED, device=device).groups[0]
    heads, size = plan.kv.num_key_value_heads, plan.kv.head_dim
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
    angles = theta ** (-2 * torch.arange(size // 2, dtype=torch.float64) / size)

    def rope(positions: Tensor) -> Any:
        turned = positions[..., None] * angles
        return SimpleNamespace(cos=turned.cos().repeat(1, 1, 2), sin=turned.sin().repeat(1, 1, 2), interleaved=False)

    layout = RowLayout(plan.groups[0].tier_bits, plan.tier_size)
    per_head, bucket = config.num_attention_heads // heads, bucket_length(rope, size)  # type: ignore[arg-type]
    return Shape(name, heads, per_head, size, len(plan.groups[0].layers), bucket, angles, layout, codec)


def make_inputs(
    shape: Shape, context: int, batch: int, device: torch.device, *, dtype: torch.dtype = STORED, seed: int = 0
) -> Inputs:
    """Packed random latents of unit variance, exact tokens, and queries."""
    draw, bucket = _drawing(device, dtype, seed), shape.bucket
    data = random_rows(shape.layout, context, batch, draw)
    hidden = torch.full((batch,), SINKS, dtype=torch.int64, device=device)
    codec = SimpleNamespace(decoder=shape.codec.decoder.to(dtype), mean=shape.codec.mean.to(dtype))
    angles = torch.arange(context + bucket, device=device)[:, None] * shape.angles.to(device)
    turns = Turns(torch.polar(torch.ones_like(angles), angles)[None].to(torch.complex64), False)
    buckets = Buckets(bucket, turns.means(bucket, [0] * batch), [0] * batch)
    rows = LatentRows(data, shape.layout, codec, hidden, SINKS, turns.part(0, context), buckets=buckets)
    query = draw(batch, shape.heads, shape.per_head, shape.size)
    exact = draw(batch, 2 * shape.heads, EXACT, shape.size)
    return Inputs(rows, query, exact, torch.zeros(1, 1, EXACT, device=device))


def make_absorbed(
    shape: Shape, context: int, batch: int, device: torch.device, *, dtype: torch.dtype = STORED, seed: int = 0
) -> tuple[AbsorbedRows, Tensor]:
    """Packed random rows with rotary keys, and absorbed queries [B, H·M, 1, r + p]."""
    draw, layout = _drawing(device, dtype, seed), shape.joined
    data = torch.cat([random_rows(part, context, batch, draw) for part in layout.parts], dim=-1)
    rows = AbsorbedRows(data, layout, dtype, torch.zeros(batch, dtype=torch.int64, device=device))
    return rows, draw(batch, shape.query_heads, 1, layout.rank)


def random_rows(layout: RowLayout, context: int, batch: int, draw: Callable[..., Tensor]) -> Tensor:
    """Packed latents [B, K, N] of unit variance."""
    at_once = max(1, PACKED_AT_ONCE // layout.rank)
    sequences = []
    for _ in range(batch):
        counts = [min(at_once, context - start) for start in range(0, context, at_once)]
        sequences.append(torch.cat([packed(draw(1, count, layout.rank), layout) for count in counts], dim=1))
    return torch.cat(sequences)


def _drawing(device: torch.device, dtype: torch.dtype, seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *sizes: torch.randn(*sizes, generator=generator, dtype=dtype, device=device)


def read(shape: Shape, inputs: Inputs, most: int | None) -> Tensor:
    """Attention [B, H, M, d] to all tokens, the best `most` in full; rows stay unpacked for the next call."""
    options: dict[str, Any] = {"scaling": shape.scaling, "turned": True, "most": most}
    return inputs.rows.attended(inputs.query, inputs.exact, inputs.bias, LAYER, **options)


def floor(shape: Shape, context: int, batch: int, best: int | None, ceilings: Ceilings) -> float:
    """Seconds that bytes and products take, each stage at the rate of this machine."""
    judged = shape.layout.rank if best is None else judging_rank(shape.layout)
    sizes = (shape.layout.rank, shape.layout.row_bytes, judged, best or 0)
    reading = Reading(batch, context, *sizes, shape.query_heads, shape.heads, shape.size, shape.bucket, shape.layers)
    return reading.seconds(ceilings.bytes_per_s, ceilings.flops_per_s)


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
    shape: Shape, context: int, batch: int, best: int | None, ceilings: Ceilings, device: torch.device
) -> dict[str, Any]:
    """Seconds of one case: of latents, in full and selected, and of flash attention."""
    set_bytes = batch * context * shape.layout.row_bytes
    sets = [make_inputs(shape, context, batch, device, seed=i) for i in range(_sets(set_bytes, device))]
    found: dict[str, Any] = {"shape": shape.name, "context": context, "batch": batch, "best": best}
    for name, most in (("full", None), ("selected", best)):
        if name == "selected" and (best is None or best >= context):
            continue
        judged = shape.layout.rank if most is None else judging_rank(shape.layout)
        held = batch * context * judged * STORED.itemsize
        open_rows = partial(unpacked, layout=shape.layout, dtype=STORED, rank=judged)
        few = sets[: max(1, min(len(sets), _sets(held, device)))]  # of unpacked ones
        unpack = timed([partial(open_rows, s.rows.data) for s in few], device)
        layer = timed([partial(read, shape, s, most) for s in few], device)
        least = floor(shape, context, batch, most, ceilings)
        whole = layer + unpack / shape.layers
        found[name] = {"layer": whole, "unpack": unpack, "floor": least, "share": least / whole}
    del sets, few, open_rows  # the others need the room
    absorbed = [make_absorbed(shape, context, batch, device, seed=i) for i in range(_sets(set_bytes, device))]
    found["absorbed"] = timed([partial(rows.sums, query, shape.scaling) for rows, query in absorbed], device)
    del absorbed
    found["sdpa"] = sdpa(shape, context, batch, device, folded=False)
    found["sdpa_folded"] = sdpa(shape, context, batch, device, folded=True)
    return found


def check(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Largest errors against the twin in fp32 on the CPU, in parts of the largest.

    Of attention in full, of attention with 16 rows selected from the twin's logits, and of absorbed sums.

    Raises:
        SystemExit: they are too large, or not numbers.
    """
    inputs = make_inputs(shape, 200, 2, device, dtype=dtype)
    inputs.rows.hidden[1] += 37
    inputs.rows.reach = 200
    twin = make_inputs(shape, 200, 2, torch.device("cpu"), dtype=torch.float32)
    twin.rows.data, twin.rows.hidden, twin.rows.reach = inputs.rows.data.cpu(), inputs.rows.hidden.cpu(), 200
    twin.query, twin.exact = inputs.query.float().cpu(), inputs.exact.float().cpu()
    codec = inputs.rows.codec
    twin.rows.codec = SimpleNamespace(decoder=codec.decoder.float().cpu(), mean=codec.mean.float().cpu())
    errors = {"full": _error(read(shape, inputs, None), read(shape, twin, None))}
    chosen = torch.stack([torch.arange(40, 56), torch.arange(50, 66)])
    logits = [torch.empty(2, shape.heads, shape.per_head, 16, device=x.query.device) for x in (inputs, twin)]
    for x, out in zip((inputs, twin), logits, strict=True):
        best = x.rows.chosen(chosen.to(out.device))
        best.logits(x.query, LAYER, out, scaling=shape.scaling, turned=True)
    errors["chosen"] = _error(*logits)
    rows, query = make_absorbed(shape, 200, 2, device, dtype=dtype)
    rows.hidden[1] += 37
    exact = AbsorbedRows(rows.data.cpu(), rows.layout, torch.float32, rows.hidden.cpu())
    errors["absorbed"] = _error(rows.sums(query, shape.scaling), exact.sums(query.float().cpu(), shape.scaling))
    if not all(error <= TOLERANCE[dtype] for error in errors.values()):
        raise SystemExit(f"{shape.name} in {dtype}: errors {errors}; at most {TOLERANCE[dtype]} is expected")
    return errors


# With what


def largest_batch(shape: Shape, context: int, device: torch.device) -> int:
    """Sequences that one layer has room for, both of latents and of the source's cache."""
    if device.type != "cuda":
        return 3
    torch.cuda.empty_cache()
    source = 2 * shape.heads * shape.size * STORED.itemsize
    latents = shape.layout.row_bytes + 4 * 4 * shape.query_heads  # logits, weights, and as much for what is between
    return int(MEMORY_SHARE * torch.cuda.mem_get_info(device)[0] / (context * max(source, latents)))


def _sets(nbytes: int, device: torch.device) -> int:
    """Inputs of so many bytes that are together twice the second-level cache."""
    return min(MOST_SETS, math.ceil(2 * cache_bytes(device) / nbytes))


def _error(found: Tensor, expected: Tensor) -> float:
    """Largest error in parts of the largest; not a number where either is none, or other entries are infinite."""
    found, expected = found.cpu(), expected.cpu()
    seen = expected.isfinite()
    if not torch.equal(seen, found.isfinite()) or bool(found.isnan().any() | expected.isnan().any()):
        return math.nan
    return float((found[seen].double() - expected[seen].double()).abs().max() / expected[seen].abs().max())


def table(report: dict[str, Any]) -> str:
    """Markdown: what was measured, in microseconds, shares and ratios."""
    ceilings, lines = report["ceilings"], []
    lines.append(
        f"{report['machine']['name']}, torch {report['machine']['torch']}: copy "
        f"{ceilings['bytes_per_s'] / 1e9:,.0f} GB/s, bf16 product {ceilings['flops_per_s'] / 1e12:,.0f} TFLOP/s"
    )
    for name, errors in report["errors"].items():
        said = [f"{dtype} {key} {value:.1e}" for dtype, found in errors.items() for key, value in found.items()]
        lines.append(f"{name}: errors against the twin in fp32: " + ", ".join(said))
    titles = ["shape", "context", "batch", "read", "layer, µs", "unpacking its group", "floor", "of floor"]
    titles += ["SDPA, µs", "folded", "SDPA / layer", "absorbed, µs"]
    lines += ["", "| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in report["rows"]:
        for way, how in (("full", "full"), ("selected", f"best {row['best']}")):
            if way not in row:
                continue
            own = row[way]
            cells = [row["shape"], f"{row['context']}", f"{row['batch']}", how, _micro(own["layer"])]
            cells += [_micro(own["unpack"]), _micro(own["floor"]), f"{100 * own['share']:.0f} %", _micro(row["sdpa"])]
            cells += [_micro(row["sdpa_folded"]), f"{row['sdpa'] / own['layer']:.2f}", _micro(row["absorbed"])]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _micro(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f}"


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="smollm2-135m,llama-3-8b", help="comma-separated, of `clla bench --shape`")
    parser.add_argument("--contexts", default="8192,32768", help="tokens, comma-separated")
    parser.add_argument("--batch-sizes", default="1,16,largest", help="sequences, comma-separated")
    parser.add_argument("--kv-budget", default="6.25%", help="the latents' share of the source cache")
    parser.add_argument("--max-layers-per-group", type=int, default=6, help="layers that share a latent")
    parser.add_argument("--json", action="store_true", help="everything as JSON, times in seconds")
    parser.add_argument("--dry-run", action="store_true", help=argparse.SUPPRESS)  # tiny, on a CPU: no figure is real
    args = parser.parse_args(arguments)
    if args.dry_run:
        args.shapes, args.contexts, args.batch_sizes = "tiny", "40,90", "1,largest"
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
