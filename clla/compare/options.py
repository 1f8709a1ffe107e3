"""What `clla compare` compares, and how it is measured. Nothing heavy is imported."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from clla.arguments import Device, MeasuredText, Name, Settings, WeightDtype, Word
from clla.errors import UsageError
from clla.recipe import parse_budget


class Options(Settings):
    """What is compared, and how it is measured. With `quick` the defaults are smaller."""

    budgets: Word | None = Field(
        None,
        description="shares of the source's cache at --sequence-length, comma-separated; default: "
        "50%,25%,12.5%,6.25%,3%",
    )
    methods: Word | None = Field(None, description="names of methods, comma-separated; default: all")
    text: MeasuredText = "bundled"
    dataset: Name = Field("bundled", description="text to calibrate on")
    quick: bool = Field(False, description="two samples, two budgets, two codes, main variants only")
    num_samples: int | None = Field(None, ge=1, description="samples of text; default: 24, or 2 with --quick")
    sequence_length: int | None = Field(
        None, ge=64, description="tokens per sample, at which budgets hold; default: 2048, or what the model takes"
    )
    long_context: int | None = Field(
        None, ge=64, description="tokens at which bytes are measured, too; default: 8192, or what the model takes"
    )
    chunk: int = Field(128, ge=1, description="tokens per forward pass")
    calibration_tokens: int | None = Field(
        None, gt=0, description="tokens to calibrate on; default: 16384 on CPU, 262144 on GPU"
    )
    retrieval_trials: int | None = Field(None, ge=0, description="planted codes; default: 16, or 2 with --quick")
    device: Device = "auto"
    dtype: WeightDtype = "auto"
    work_dir: Path | None = Field(None, description="keep the statistics here")

    @property
    def shares(self) -> list[float]:
        """Shares of the source's bytes.

        Raises:
            UsageError: they cannot be read, or there is none.
        """
        found = self.budgets or ("25%,6.25%" if self.quick else "50%,25%,12.5%,6.25%,3%")
        shares = [
            parse_budget(part, source_bytes=None, option="--budgets") for part in found.split(",") if part.strip()
        ]
        if not shares:
            raise UsageError(f"--budgets {found!r} names no share", expected="e.g. 25%,6.25%", remedy="correct it")
        return shares

    @property
    def samples(self) -> int:
        """Samples of text."""
        return self.num_samples or (2 if self.quick else 24)

    @property
    def trials(self) -> int:
        """Planted codes; 0 leaves retrieval out."""
        return (2 if self.quick else 16) if self.retrieval_trials is None else self.retrieval_trials
