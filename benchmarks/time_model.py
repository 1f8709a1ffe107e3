"""How long a decoding step reads its cache: what bytes and products allow on a GPU.

    python benchmarks/time_model.py [--shape llama-3-8b] [--kv-budget 6.25%] [--contexts 8192,32768,131072]
        [--batches 1,16] [--bandwidth 2.43] [--products 700]

No GPU is needed: the rates are those that were measured on an H100 (benchmarks/RESULTS.md, "On a GPU"). Rows are
unpacked to bf16 once for all layers of their group. In each layer queries are turned once per bucket and absorbed into
the decoder, meet the latents, and sum them up. "In full" reads all components of all rows. "Selected" judges by the
first quarter, reads the best rows in full and keeps the others' share of the sum. Products run while bytes move, so
a stage takes the longer of both, and stages follow one another.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from transformers import AutoModelForCausalLM

from clla.bench.shapes import ROPE, STORED, random_plan, shape_config
from clla.modeling.attention_clla import judging_rank, rows_in_full
from clla.modeling.hooks_clla import rope_of
from clla.modeling.quantize_clla import RowLayout
from clla.modeling.rotary_clla import bucket_length
from clla.source.families import kv_shape

BF16 = STORED.itemsize


@dataclass(frozen=True)
class Reading:
    """What one layer reads in one step.

    Attributes:
        batch: sequences.
        rows: latents of each.
        rank: components of a latent.
        row_bytes: of a latent.
        judged: components of every row that are read.
        best: rows of which all components are read; 0 where `judged` are all.
        heads: query heads.
        kv_heads: key-value heads.
        dim: of a head.
        bucket: neighbouring rows that queries meet with one rotation.
        layers: of the group, which share its unpacked rows.
    """

    batch: int
    rows: int
    rank: int
    row_bytes: int
    judged: int
    best: int
    heads: int
    kv_heads: int
    dim: int
    bucket: int
    layers: int

    def stages(self) -> dict[str, tuple[float, float]]:
        """Products (two operations each are counted) and bytes of each stage."""
        rows, buckets = self.batch * self.rows, self.batch * -(-self.rows // self.bucket)
        absorbed = self.heads * self.judged * buckets
        decoder = self.kv_heads * self.dim * self.rank * BF16  # of keys, or of values
        read = rows * self.row_bytes * self.judged / self.rank  # if all components had as many bits: too few
        latents, met = rows * self.judged * BF16, 2 * self.heads * self.judged * rows
        logits = 4 * self.heads * rows  # in fp32
        found = {
            "unpack": (0, (read + latents) / self.layers),
            "absorb": (2 * self.dim * absorbed, decoder * self.judged / self.rank + absorbed * BF16),
            "logits": (met, latents + absorbed * BF16 + logits),
            "softmax": (0, 2 * logits),
            "sums": (met, latents + logits),
            "values": (2 * self.batch * self.heads * self.dim * self.rank, decoder),
        }
        if self.best:
            best = self.batch * self.best
            keys = 2 * self.kv_heads * self.dim * self.rank * best
            opened = best * (self.row_bytes + 3 * self.rank * BF16)  # written once, read for keys and for sums
            found["best rows"] = (keys + 4 * self.heads * self.rank * best, decoder + opened)
        return {name: (float(products), float(nbytes)) for name, (products, nbytes) in found.items()}

    @property
    def operations(self) -> float:
        """Per row."""
        return sum(products for products, _ in self.stages().values()) / (self.batch * self.rows)

    def seconds(self, bandwidth: float, products: float) -> float:
        """At bytes and operations per second, each stage as fast as either allows."""
        return sum(max(ops / products, nbytes / bandwidth) for ops, nbytes in self.stages().values())


def main() -> None:
    """Print the table."""
    args = _arguments()
    config = shape_config(args.shape)
    kv, plan = kv_shape(config), random_plan(config, kv_budget=args.kv_budget)
    small = {"num_hidden_layers": 1, "vocab_size": 8, "intermediate_size": 8, "bos_token_id": 1, "eos_token_id": 2}
    rope = rope_of(AutoModelForCausalLM.from_config(type(config)(**{**config.to_dict(), **small})), ROPE)
    dim, kv_heads = kv.head_dim, kv.num_key_value_heads
    layers = [(RowLayout(g.tier_bits, plan.tier_size), len(g.layers)) for g in plan.groups for _ in g.layers]
    bandwidth, products = args.bandwidth * 1e12, args.products * 1e12
    bucket = bucket_length(rope, dim)
    ranks = sorted({layout.rank for layout, _ in layers})
    print(
        f"{args.shape}, {len(layers)} layers, rank {', '.join(map(str, ranks))}, buckets of {bucket}; "
        "milliseconds of all layers\n"
    )
    print("| context | batch | read | MFLOP per token and layer | floor | source, bf16 cache: floor |")
    print("|---" * 6 + "|")
    for context in map(int, args.contexts.split(",")):
        for batch in map(int, args.batches.split(",")):
            cache = 2 * kv_heads * dim * BF16 * context * batch * len(layers)
            for name in ("in full", "selected"):
                best = (rows_in_full(context) or 0) if name == "selected" else 0
                if name == "selected" and not best:
                    continue
                readings = [
                    Reading(
                        batch, context, layout.rank, layout.row_bytes, judging_rank(layout) if best else layout.rank,
                        best, config.num_attention_heads, kv_heads, dim, bucket, count,
                    )
                    for layout, count in layers
                ]  # fmt: skip
                floor = sum(reading.seconds(bandwidth, products) for reading in readings)
                operations = sum(reading.operations for reading in readings) / len(readings)
                print(
                    f"| {context:,} | {batch} | {name} | {operations / 1e6:.2f} | {1e3 * floor:.2f} | "
                    f"{1e3 * cache / bandwidth:.2f} |"
                )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3-8b")
    parser.add_argument("--kv-budget", default="6.25%")
    parser.add_argument("--contexts", default="8192,32768,131072")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--bandwidth", type=float, default=2.43, help="TB/s")
    parser.add_argument("--products", type=float, default=700.0, help="TFLOP/s in bf16")
    return parser.parse_args()


if __name__ == "__main__":
    main()
