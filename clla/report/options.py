"""What `clla report` shows, and how it is measured. Nothing heavy is imported."""

from __future__ import annotations

from pydantic import Field

from clla.arguments import Dtype, Name, Settings, Word
from clla.recipe import LARGEST


class Options(Settings):
    """What is on a page, and how it is measured."""

    num_prompts: int | None = Field(
        None, ge=0, le=LARGEST, description="built-in prompts to continue; default: 3, or 0 where --prompt is given"
    )
    max_new_tokens: int = Field(160, ge=1, le=LARGEST, description="tokens to write after each prompt")
    text: Name = Field("bundled", description="text to measure on; default: the end of the bundled text")
    num_samples: int = Field(
        2, ge=0, le=LARGEST, description="samples of text that errors of layers are measured on; 0: none"
    )
    sequence_length: int | None = Field(
        None, ge=2, le=LARGEST, description="tokens per sample; default: 2048, or what the model takes"
    )
    source_model: Name | None = Field(
        None, description="source model, where the weights were trained; default: from the recipe"
    )
    device: Word = Field("auto", description="device to compute on: auto, cpu, cuda or cuda:N")
    dtype: Dtype = Field("auto", description="dtype of the weights: auto, float32, bfloat16 or float16")
