"""What `clla bench` measures. Nothing heavy is imported."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, JsonValue

from clla.arguments import Bytes, Device, Integers, Settings, WeightDtype, Word

SHAPE: dict[str, JsonValue] = {"panel": "A shape instead of a checkpoint"}


class Options(Settings):
    """What is measured."""

    shape: Word | None = Field(
        None,
        description="random weights of a known shape instead: smollm2-135m, llama-3.2-1b, llama-3-8b, qwen3-8b or tiny",
        json_schema_extra=SHAPE,
    )
    kv_budget: Word | None = Field(
        None,
        description="budget of the shape's latents: '6.25%', '1440B', …; default: the recipes'",
        json_schema_extra=SHAPE,
    )
    max_layers_per_group: int | None = Field(
        None, ge=1, description="layers that share a latent; default: the recipes'", json_schema_extra=SHAPE
    )
    contexts: Integers | None = Field(
        None, description="tokens in the cache; default: 512,2048, on a GPU 2048,8192,32768"
    )
    batch_sizes: Integers = Field((1,), description="sequences at once, e.g. 1,8")
    new_tokens: int = Field(32, ge=2, description="tokens decoded in each pass")
    repeats: int = Field(3, ge=1, description="timed passes of each model")
    prefill_chunk: int | None = Field(
        None,
        ge=1,
        description="tokens per call of the prefill, for both models; default as in generate(): the source takes all "
        "at once, the converted model its own chunks",
    )
    largest_batch: bool = Field(False, description="find the most sequences that decode at the longest context")
    memory_limit: Bytes | None = Field(
        None, description="memory for the caches of the largest batch, on a CPU: e.g. 2GB"
    )
    attend_top_k: int | None = Field(
        None, ge=0, description="old tokens that the converted model reads in full, 0 for all; default: as generate()"
    )
    static: bool = Field(False, description="tell the converted cache its length beforehand")
    seed: int = Field(0, ge=0, description="seed of the tokens and of random weights")
    device: Device = "auto"
    dtype: WeightDtype = "auto"
    plot: Path | None = Field(None, description="draw speed against context", json_schema_extra={"panel": "Output"})
