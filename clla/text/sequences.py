"""Calibration text as sequences of token ids, and what of it is kept back for measuring.

Documents are cut into pieces, shuffled with a seed and packed, so that few tokens still see many
documents. The same seed and files give the same sequences. What is read is cut before it is tokenized, and of a long
text no more pieces than can be held are kept, evenly spread over it.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from clla.errors import DatasetError, generating
from clla.text.reading import load_documents as load_documents
from clla.text.reading import read_documents

BLOCK_CHARS = 16_000  # of text; every HELD_OUT-th block is never calibrated on
HELD_OUT = 16
CHARS_PER_TOKEN = 8  # generous: a piece must not run out of tokens in ordinary text
HELD_CHARS = 1 << 26  # of text, before shuffling
MARGIN = 64  # tokens at the end of a cut text, which its rest might change


def token_batches(
    documents: Iterable[str],
    tokenizer: Any,
    *,
    tokens: int,
    sequence_length: int,
    batch_size: int = 1,
    seed: int = 0,
) -> list[Tensor]:
    """Pack documents into batches of token ids [batch_size, sequence_length].

    Args:
        documents: texts.
        tokenizer: the model's; what it puts before a text stands before every sequence.
        tokens: wanted in all, rounded up to whole sequences.
        sequence_length: T.
        batch_size: sequences per batch.
        seed: of the shuffling.

    Raises:
        DatasetError: the text is shorter than one sequence.
    """
    prefix = list(tokenizer("")["input_ids"])
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    body = sequence_length - len(prefix)
    parts = (piece for text in documents for piece in _cut(text, body * CHARS_PER_TOKEN) if piece.strip())
    pieces = _spread(parts, HELD_CHARS)
    random.Random(seed).shuffle(pieces)
    wanted = -(-tokens // sequence_length)
    sequences: list[list[int]] = []
    buffer: list[int] = []
    # A piece's rest waits until all pieces were begun: few tokens should see many documents.
    waiting: deque[str | list[int]] = deque(pieces)
    while waiting:
        piece = waiting.popleft()
        ids = tokenizer(piece, add_special_tokens=False)["input_ids"] if isinstance(piece, str) else piece
        ids, rest = ids[: body - len(buffer)], ids[body - len(buffer) :]
        if rest:
            waiting.append(rest)
        buffer += ids
        if len(buffer) == body:
            sequences.append(prefix + buffer)
            buffer = []
            if len(sequences) == wanted:
                break
        elif len(buffer) + len(separator) < body:
            buffer += separator
    if not sequences:
        raise DatasetError(
            f"the text is shorter than one sequence ({len(buffer)} tokens)",
            expected=f"at least {sequence_length} tokens",
            remedy="give a longer text to fit the model on, or shorter sequences",
        )
    stacked = torch.tensor(sequences)
    return list(stacked.split(batch_size))


def calibration_blocks(documents: Iterable[str]) -> Iterator[str]:
    """Blocks of a text to calibrate on; the same for every length and seed.

    A text of fewer than `HELD_OUT` blocks keeps nothing back.
    """
    return (block for number, block in _blocks(documents) if number % HELD_OUT != HELD_OUT - 1)


def held_out_blocks(documents: Iterable[str]) -> Iterator[str]:
    """Blocks of a text that are kept for measuring: those that `calibration_blocks` leaves out."""
    return (block for number, block in _blocks(documents) if number % HELD_OUT == HELD_OUT - 1)


def holds_back(dataset: str, tokenizer: Any = None, *, length: int = 0) -> bool:
    """Whether a text is long enough to keep anything back of it; with a tokenizer, one sample of `length` tokens."""
    blocks = held_out_blocks(read_documents(dataset, tell=False))
    if tokenizer is None:
        return next(blocks, None) is not None
    try:
        return len(whole_samples(blocks, tokenizer, count=1, length=length)) == 1
    except DatasetError:
        return False


def evaluation_samples(dataset: str, tokenizer: Any, *, count: int, length: int) -> Tensor:
    """Samples [count, length] to measure on: a text from its start, or what calibration leaves out of the
    bundled text.

    Raises:
        DatasetError: as `read_documents`, or the text is shorter than one sample.
    """
    documents = read_documents(dataset)
    blocks = held_out_blocks(documents) if dataset == "bundled" else documents
    return whole_samples(blocks, tokenizer, count=count, length=length)


def report_samples(dataset: str, tokenizer: Any, *, count: int, length: int, fallback: int) -> tuple[Tensor, bool]:
    """Samples [N, T] of a text to measure on, and whether they are of the blocks that are kept back.

    A text too short to keep enough back is measured on as a whole, in samples no longer than `fallback`. Where the
    model writes its own, the bundled one is taken (`report_text`).

    Raises:
        DatasetError: as `read_documents`, or the text is shorter than one sample.
    """
    text = report_text(dataset)
    try:
        blocks = held_out_blocks(read_documents(text, tell=False))
        return whole_samples(blocks, tokenizer, count=count, length=length), True
    except DatasetError:
        documents = read_documents(text, tell=False)
        return whole_samples(documents, tokenizer, count=count, length=min(length, fallback)), False


def report_text(dataset: str) -> str:
    """The text that is measured on after a calibration on `dataset`."""
    return "bundled" if dataset == "self" else dataset


def whole_samples(documents: Iterable[str], tokenizer: Any, *, count: int, length: int) -> Tensor:
    """The first `count` samples of `length` tokens of a text, in order, documents joined by blank lines.

    Raises:
        DatasetError: the text is shorter than one sample.
    """
    ids: list[int] = []
    for i, text in enumerate(documents):
        ids += _first_ids(("\n\n" if i else "") + text, tokenizer, count * length - len(ids))
        if len(ids) >= count * length:
            break
    found = min(count, len(ids) // length)
    if found == 0:
        raise DatasetError(
            f"the text has {len(ids)} tokens",
            expected=f"at least one sample of {length}",
            remedy="pass a longer text or a smaller --sequence-length",
        )
    return torch.tensor(ids[: found * length]).view(found, length)


def _first_ids(text: str, tokenizer: Any, wanted: int) -> list[int]:
    """At least the first `wanted` token ids of a text, or all there are; no more of it is tokenized than that takes."""
    chars = (wanted + MARGIN) * CHARS_PER_TOKEN
    while True:
        ids: list[int] = tokenizer(text[:chars])["input_ids"]
        if chars >= len(text):
            return ids
        if len(ids) >= wanted + MARGIN:
            return ids[:wanted]
        chars *= 4


@torch.no_grad()
def self_written(
    model: Any, tokenizer: Any, *, tokens: int, sequence_length: int, batch_size: int = 8, seed: int = 0
) -> Iterator[Tensor]:
    """Text that the model writes itself, sampled at temperature 1 from its start token.

    Yields:
        [batch_size, sequence_length] token ids.

    Raises:
        DatasetError: the tokenizer names neither a beginning nor an end token.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise DatasetError("the tokenizer has no start token to write from", remedy="pass a text file to --dataset")
    devices = [model.device] if model.device.type == "cuda" else []
    for first in range(0, tokens, batch_size * sequence_length):
        left = -(-(tokens - first) // sequence_length)
        prompt = torch.full((min(batch_size, left), 1), start, device=model.device)
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed + first)
            with generating(model.config.name_or_path):
                written = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    min_new_tokens=sequence_length - 1,
                    max_new_tokens=sequence_length - 1,
                    pad_token_id=start,
                )
            yield written


def _blocks(documents: Iterable[str]) -> Iterator[tuple[int, str]]:
    return enumerate(block for text in documents for block in _cut(text, BLOCK_CHARS))


def _cut(text: str, length: int) -> Iterator[str]:
    """Parts of at most `length` characters, cut at line ends where there are any."""
    start = 0
    while start < len(text):
        end = text.rfind("\n", start + length // 2, start + length) + 1 if start + length < len(text) else len(text)
        end = end if end > start else start + length
        yield text[start:end]
        start = end


def _spread(pieces: Iterable[str], most: int) -> list[str]:
    """All pieces, or, where they have more than `most` characters, every second, fourth, … of them."""
    kept: list[str] = []
    held, step = 0, 1
    for number, piece in enumerate(pieces):
        if number % step == 0:
            kept.append(piece)
            held += len(piece)
        while held > most and len(kept) > 1:
            kept, step = kept[::2], 2 * step
            held = sum(map(len, kept))
    return kept
