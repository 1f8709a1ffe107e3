"""What `clla eval` measures. Nothing heavy is imported."""

from __future__ import annotations

from pydantic import Field

from clla.arguments import Device, Integers, MeasuredText, SampleLength, Settings, SourceModel, WeightDtype


class Options(Settings):
    """What is measured."""

    text: MeasuredText = "bundled"
    num_samples: int = Field(4, ge=1, description="samples of text")
    sequence_length: SampleLength = None
    chunk: int | None = Field(None, ge=1, description="tokens per forward pass; default: the exact window")
    attend_top_k: int | None = Field(
        None,
        ge=0,
        description="old tokens read in full, 0 for all: measures decoding, in forward passes as short as that takes",
    )
    contexts: Integers | None = Field(
        None, description="context lengths at which caches are measured; default: 512,2048,8192, as far as it goes"
    )
    retrieval: bool = Field(True, description="also plant codes and ask for them")
    retrieval_context: int | None = Field(
        None, ge=128, description="tokens around a planted code; default: 4096, or what the model takes"
    )
    retrieval_trials: int = Field(8, ge=1, description="number of codes")
    source_model: SourceModel = None
    device: Device = "auto"
    dtype: WeightDtype = "auto"
