"""The text that healing trains on, and what it is measured on: packed once, and kept in the work directory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from clla import console
from clla.errors import CorruptArtifactError, DatasetError
from clla.evaluate.seen import FittedText, fingerprint, fitted_text
from clla.recipe import HealConfig
from clla.storage.files import digest, load_verified, save_verified
from clla.text.reading import read_documents
from clla.text.sequences import (
    calibration_blocks,
    held_out_blocks,
    holds_back,
    self_written,
    token_batches,
    whole_samples,
)

HELD_OUT_SAMPLES = 4


def healing_text(config: HealConfig, model: PreTrainedModel, tokenizer: Any, work: Path) -> tuple[Tensor, Tensor]:
    """Sequences [N, T] (int32) to train on, made once and kept in `work`, and samples [M, T] that training leaves out.

    A text shorter than what is wanted is read again in another order. Of text that the model writes itself the last
    sequences are kept back.

    Raises:
        DatasetError: the text has less than one sequence.
    """
    assert config.tokens and config.dataset and config.sequence_length, "the config is not resolved"
    length = config.sequence_length
    text = config.dataset, fingerprint(config.dataset), model.config._name_or_path
    key = digest(*text, config.tokens, length, config.seed)
    path = work / f"text-{key}.safetensors"
    if path.exists():
        try:
            found = load_verified(path)
            return found["sequences"], found["held_out"].long()
        except CorruptArtifactError as error:
            console.say(f"Packing the text again: {error.got}")
    wanted = max(1, config.tokens // length)
    if config.dataset == "self":
        total = config.tokens + HELD_OUT_SAMPLES * length
        written = self_written(model, tokenizer, tokens=total, sequence_length=length, seed=config.seed)
        with console.progress("Writing (tokens)", total) as advance:
            rows = torch.cat([_counted(batch.cpu(), advance) for batch in written])
        sequences, held = rows[:-HELD_OUT_SAMPLES], rows[-HELD_OUT_SAMPLES:]
    else:
        sequences, held = _packed(config, tokenizer, wanted)
    sequences = sequences.to(torch.int32)
    save_verified(path, {"sequences": sequences, "held_out": held.to(torch.int32)})
    return sequences, held


def healed_on(dataset: str, tokenizer: Any, *, length: int) -> FittedText:
    """What healing on a text trains on, in sequences of `length` tokens: all of it, where it is too short to keep one
    back.
    """
    return fitted_text(dataset, held_out=dataset == "self" or holds_back(dataset, tokenizer, length=length))


def _counted(batch: Tensor, advance: console.Advance) -> Tensor:
    advance(batch.numel())
    return batch


def _packed(config: HealConfig, tokenizer: Any, wanted: int) -> tuple[Tensor, Tensor]:
    """Sequences [wanted, T] of a text, and samples [M, T] of what is kept back of it."""
    assert config.dataset and config.sequence_length
    dataset, length = config.dataset, config.sequence_length

    def pack(texts: Iterable[str], count: int) -> Tensor:
        return torch.cat(
            token_batches(texts, tokenizer, tokens=count * length, sequence_length=length, seed=config.seed)
        )

    if holds_back(dataset, tokenizer, length=length):
        left_out = held_out_blocks(read_documents(dataset, tell=False))
        held = whole_samples(left_out, tokenizer, count=HELD_OUT_SAMPLES, length=length)
        sequences = pack(calibration_blocks(read_documents(dataset)), wanted)
    else:  # too short for that: keep the last sequences back
        sequences = pack(read_documents(dataset), wanted + HELD_OUT_SAMPLES)
        count = min(HELD_OUT_SAMPLES, len(sequences) // 2)
        if count == 0:
            raise DatasetError(
                f"{config.dataset} has a single sequence of {length} tokens",
                expected="one to train on and one to measure on",
                remedy="name a longer text, or lower heal.sequence_length",
            ) from None
        sequences, held = sequences[:-count], sequences[-count:]
    if len(sequences) < wanted:
        console.say(
            f"The text has {sequences.numel():,} tokens of the {wanted * length:,} wanted; it is read repeatedly"
        )
    generator = torch.Generator().manual_seed(config.seed)
    rows = [torch.arange(len(sequences))]
    while sum(map(len, rows)) < wanted:
        rows.append(torch.randperm(len(sequences), generator=generator))
    return sequences[torch.cat(rows)[:wanted]], held
