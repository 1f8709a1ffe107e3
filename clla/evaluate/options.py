"""What `clla eval` measures. Nothing heavy is imported."""

from __future__ import annotations

from pydantic import Field

from clla.arguments import Dtype, Integers, Name, Settings, Word
from clla.recipe import LARGEST


class Options(Settings):
    """What is measured."""

    text: Name = Field("bundled", description="text to measure on; default: the end of the bundled text")
    num_samples: int = Field(4, ge=1, le=LARGEST, description="samples of text")
    sequence_length: int | None = Field(
        None, ge=2, le=LARGEST, description="tokens per sample; default: 2048, or what the model takes"
    )
    chunk: int | None = Field(None, ge=1, le=LARGEST, description="tokens per step; default: the exact window")
    attend_top_k: int | None = Field(
        None, ge=1, le=LARGEST, description="old tokens read in full; steps then are as short as that takes"
    )
    contexts: Integers | None = Field(
        None, description="context lengths at which caches are measured; default: 512,2048,8192, as far as it goes"
    )
    retrieval: bool = Field(True, description="also plant codes and ask for them")
    retrieval_context: int | None = Field(
        None, ge=128, le=LARGEST, description="tokens around a planted code; default: 4096, or what the model takes"
    )
    retrieval_trials: int = Field(8, ge=1, le=LARGEST, description="number of codes")
    source_model: Name | None = Field(
        None, description="source model, where the weights were trained; default: from the recipe"
    )
    device: Word = Field("auto", description="device to compute on: auto, cpu, cuda or cuda:N")
    dtype: Dtype = Field("auto", description="dtype of the weights: auto, float32, bfloat16 or float16")
