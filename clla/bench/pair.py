"""What is measured: a converted model and the source that it runs on, from a checkpoint or with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clla.artifacts.plan import Plan
from clla.bench.shapes import ROPE, STORED, random_codec, random_model, random_plan, shape_config
from clla.bench.speed import Contender, draw_ids
from clla.checkpoint.assemble import attach, clla_block
from clla.checkpoint.load import load_checkpoint
from clla.evaluate.source_cache import SourceCache
from clla.modeling.hooks_clla import CACHE
from clla.modeling.modeling_clla import CllaForCausalLM
from clla.recipe import RuntimeConfig
from clla.source.device import pick_dtype


@dataclass(frozen=True)
class Pair:
    """A converted model, whose weights are its source's.

    Attributes:
        name: of the checkpoint or the shape.
        converted: the model, with the source in it.
        plan: what it runs on.
        special: token ids that stand for no text.
    """

    name: str
    converted: CllaForCausalLM
    plan: Plan
    special: set[int]

    def ids(self, batch: int, length: int, seed: int) -> Tensor:
        """Random token ids [batch, length] without special ones."""
        vocab_size, device = self.converted.config.text_config.vocab_size, self.converted.device
        return draw_ids((batch, length), vocab_size=vocab_size, left_out=self.special, seed=seed, device=device)

    def contenders(self, *, static: bool, source_chunk: int | None) -> dict[str, Contender]:
        """The source with a plain cache in the dtype that it computes in, and the converted model with its own.

        Args:
            static: the converted cache is told its length beforehand.
            source_chunk: tokens per call of the source's prefill; None for all at once.
        """
        converted: Any = self.converted
        source, config = converted.source, converted.config.text_config

        def new_cache(length: int) -> Any:
            return converted.new_cache(max_cache_len=length) if static else converted.new_cache()

        def generate_options(length: int) -> dict[str, Any]:
            return {CACHE: new_cache(length)} if static else {}

        return {
            "source": Contender(source, lambda length: SourceCache(config, source.dtype), source_chunk),
            "converted": Contender(converted, new_cache, None, generate_options),  # it cuts its input itself,
        }

    @torch.inference_mode()
    def touch(self) -> None:
        """Read every weight, since those of a file that is mapped only then are in memory."""
        for module in (self.converted.source, self.converted.codec):
            for weight in module.parameters():
                weight.sum()


def load_pair(checkpoint: str, *, device: torch.device, dtype: str) -> Pair:
    """A checkpoint.

    Args:
        checkpoint: directory or Hub id.
        device: where it goes.
        dtype: `auto` or that of the weights.

    Raises:
        CllaError: it cannot be read.
    """
    loaded = load_checkpoint(checkpoint, device=device, dtype=dtype)
    special = set(loaded.tokenizer.all_special_ids) | _ends(loaded.model.config.text_config)
    return Pair(Path(checkpoint).name, loaded.model, loaded.plan, special)


def random_pair(
    name: str, *, kv_budget: str, max_layers_per_group: int | None, device: torch.device, dtype: str, seed: int
) -> Pair:
    """A shape with random weights, plan and codec.

    Args:
        name: of the shape.
        kv_budget: of its latents.
        max_layers_per_group: layers that share one.
        device: where it is made.
        dtype: `auto` or that of the weights.
        seed: of the weights.

    Raises:
        UsageError: no such shape, or a budget that does not suit it.
    """
    config, compute = shape_config(name), pick_dtype(dtype, STORED, device)
    plan = random_plan(config, kv_budget=kv_budget, max_layers_per_group=max_layers_per_group)
    model = random_model(config, dtype=compute, device=device, seed=seed)
    codec = random_codec(plan, dtype=compute, device=device, seed=seed)
    block = clla_block(plan, rope=ROPE, kv_dtype=STORED, prefill_chunk=RuntimeConfig().prefill_chunk)
    return Pair(name, attach(model, codec, block), plan, _ends(config))


def _ends(config: Any) -> set[int]:
    """Ids that begin, end or pad a text."""
    found: set[int] = set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return found
