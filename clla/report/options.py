"""What `clla report` shows, and how it is measured. Nothing heavy is imported."""

from __future__ import annotations

from pydantic import Field

from clla.arguments import Device, MeasuredText, SampleLength, Settings, SourceModel, WeightDtype


class Options(Settings):
    """What is on a page, and how it is measured."""

    num_prompts: int | None = Field(
        None, ge=0, description="built-in prompts to continue; default: 3, or 0 where --prompt is given"
    )
    max_new_tokens: int = Field(160, ge=1, description="tokens to write after each prompt")
    text: MeasuredText = "bundled"
    num_samples: int = Field(2, ge=0, description="samples of text that errors of layers are measured on; 0: none")
    sequence_length: SampleLength = None
    source_model: SourceModel = None
    device: Device = "auto"
    dtype: WeightDtype = "auto"
