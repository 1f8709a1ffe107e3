"""Calibration text: where it comes from and how it becomes sequences of token ids.

Documents are cut into pieces, shuffled with a seed and packed, so that few tokens still see many
documents. The same seed and files give the same sequences.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import random
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clla.errors import DatasetError

BLOCK_CHARS = 16_000  # of text; every HELD_OUT-th block is never calibrated on
HELD_OUT = 16
CHARS_PER_TOKEN = 8  # generous: a piece must not run out of tokens in ordinary text
MAX_DOCUMENTS = 100_000  # of a streamed data set, before shuffling
TEXT_FIELDS = ("text", "content", "document", "body")


def bundled_path() -> Path:
    """The public-domain text that ships with the package (provenance beside it)."""
    return Path(str(resources.files("clla") / "data" / "calibration.txt.xz"))


def load_documents(dataset: str) -> list[str]:
    """Texts of a data set.

    Args:
        dataset: `bundled`, a .txt, .jsonl or .parquet file (also .xz or .gz of the first two), or a
            Hub data set id, with an optional `:split`.

    Raises:
        DatasetError: it is missing, empty, or has no text column.
    """
    if dataset == "bundled":
        return _read_text(bundled_path())
    path = Path(dataset).expanduser()
    kind = _kind(path)
    if kind:
        if not path.is_file():
            raise DatasetError(
                f"{path} does not exist",
                expected="a .txt, .jsonl or .parquet file, a Hub data set id, 'bundled' or 'self'",
                remedy="check the path given to --dataset",
            )
        documents = _read_text(path) if kind == ".txt" else _read_rows(path, kind)
    elif path.exists():
        raise DatasetError(
            f"{path} is no text file that is understood",
            expected=".txt, .jsonl or .parquet",
            remedy="rename or convert it",
        )
    else:
        documents = _read_hub(dataset)
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise DatasetError(f"{dataset} holds no text", remedy="pass a data set with text to --dataset")
    return documents


def hub_dataset(dataset: str) -> tuple[str, str] | None:
    """Id and split of a data set that `load_documents` would read from the Hub; None for all others."""
    if dataset in ("bundled", "self") or _kind(Path(dataset)):
        return None
    return _id_and_split(dataset)


def fingerprint(dataset: str) -> str:
    """SHA-256 of a local or bundled file; empty for a Hub data set and for `self`, which have no file."""
    path = bundled_path() if dataset == "bundled" else Path(dataset).expanduser()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def token_batches(
    documents: list[str],
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
        batch_size: sequences a batch.
        seed: of the shuffling.

    Raises:
        DatasetError: the text is shorter than one sequence.
    """
    prefix = list(tokenizer("")["input_ids"])
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    body = sequence_length - len(prefix)
    pieces = _pieces(documents, body * CHARS_PER_TOKEN)
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
            remedy="pass a longer --dataset or a smaller --sequence-length",
        )
    stacked = torch.tensor(sequences)
    return list(stacked.split(batch_size))


def split_held_out(documents: list[str]) -> tuple[list[str], list[str]]:
    """Blocks to calibrate on, and blocks that are kept for measuring; the same for every length and seed.

    A text of fewer than `HELD_OUT` blocks keeps nothing back.
    """
    blocks = [block for text in documents for block in _cut(text, BLOCK_CHARS)]
    held = [block for i, block in enumerate(blocks) if i % HELD_OUT == HELD_OUT - 1]
    return [block for i, block in enumerate(blocks) if i % HELD_OUT != HELD_OUT - 1], held


def evaluation_windows(dataset: str, tokenizer: Any, *, count: int, length: int) -> Tensor:
    """Windows [count, length] to measure on: a text from its start, or what calibration leaves out of the
    bundled text.

    Raises:
        DatasetError: as `load_documents`, or the text is shorter than one window.
    """
    documents = load_documents(dataset)
    if dataset == "bundled":
        _, documents = split_held_out(documents)
    return whole_windows(documents, tokenizer, count=count, length=length)


def report_windows(dataset: str, tokenizer: Any, *, count: int, length: int, fallback: int) -> tuple[Tensor, bool]:
    """Windows [N, T] of a text to measure on, and whether calibration and training left them out.

    A text too short to keep enough back is measured on as a whole, in windows no longer than `fallback`. Where the
    model writes its own, the bundled one is taken (`report_text`).

    Raises:
        DatasetError: as `load_documents`, or the text is shorter than one window.
    """
    documents = load_documents(report_text(dataset))
    try:
        return whole_windows(split_held_out(documents)[1], tokenizer, count=count, length=length), True
    except DatasetError:
        return whole_windows(documents, tokenizer, count=count, length=min(length, fallback)), dataset == "self"


def report_text(dataset: str) -> str:
    """The text that is measured on after a calibration on `dataset`."""
    return "bundled" if dataset == "self" else dataset


def whole_windows(documents: list[str], tokenizer: Any, *, count: int, length: int) -> Tensor:
    """The first `count` windows of `length` tokens of a text, in order, documents joined by blank lines.

    Raises:
        DatasetError: the text is shorter than one window.
    """
    ids: list[int] = []
    for i, text in enumerate(documents):
        ids += tokenizer(("\n\n" if i else "") + text)["input_ids"]
        if len(ids) >= count * length:
            break
    found = min(count, len(ids) // length)
    if found == 0:
        raise DatasetError(
            f"the text has {len(ids)} tokens",
            expected=f"at least one window of {length}",
            remedy="pass a longer text or a smaller --window-length",
        )
    return torch.tensor(ids[: found * length]).view(found, length)


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
            yield model.generate(
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


def _pieces(documents: list[str], length: int) -> list[str]:
    """Cut long documents at line ends, so that shuffling mixes them."""
    return [piece for text in documents for piece in _cut(text, length) if piece.strip()]


def _cut(text: str, length: int) -> list[str]:
    """Parts of at most `length` characters, cut at line ends where there are any."""
    parts, start = [], 0
    while start < len(text):
        end = text.rfind("\n", start + length // 2, start + length) + 1 if start + length < len(text) else len(text)
        end = end if end > start else start + length
        parts.append(text[start:end])
        start = end
    return parts


def _kind(path: Path) -> str:
    """Suffix of a text file that is understood, without that of its compression; empty for everything else."""
    kind = next((s for s in path.suffixes[::-1] if s not in (".xz", ".gz")), "")
    return kind if kind in (".txt", ".jsonl", ".json", ".parquet") else ""


def _read_text(path: Path) -> list[str]:
    readers: dict[str, Callable[[bytes], bytes]] = {".xz": lzma.decompress, ".gz": gzip.decompress}
    try:
        data = path.read_bytes()
        text = readers.get(path.suffix, bytes)(data).decode()
        return [text.replace("\r\n", "\n")]
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        raise DatasetError(f"{path} cannot be read as UTF-8 text: {error}", remedy="check the file") from error


def _read_rows(path: Path, kind: str) -> list[str]:
    from datasets import load_dataset

    loader = "parquet" if kind == ".parquet" else "json"
    try:
        rows = load_dataset(loader, data_files=str(path), split="train", streaming=True)
        return _texts(rows, str(path))
    except DatasetError:
        raise
    except Exception as error:  # `datasets` wraps parser errors in classes of its own
        raise DatasetError(f"{path} cannot be read as {kind[1:]}: {error}", remedy="check the file") from error


def _id_and_split(dataset: str) -> tuple[str, str]:
    name, _, split = dataset.partition(":")
    return name, split or "train"


def _read_hub(dataset: str) -> list[str]:
    from datasets import load_dataset

    name, split = _id_and_split(dataset)
    try:
        rows = load_dataset(name, split=split, streaming=True)
        return _texts(rows, dataset)
    except DatasetError:
        raise
    except Exception as error:  # no network, no such data set, no such split: all mean the same here
        raise DatasetError(
            f"data set {dataset!r} could not be loaded: {error}",
            expected="a Hub data set id that can be reached, or a local .txt, .jsonl or .parquet file",
            remedy="check the name and the network, or leave --dataset out to use the bundled text",
        ) from error


def _texts(rows: Any, name: str) -> list[str]:
    texts = []
    for row in islice(rows, MAX_DOCUMENTS):
        column = next((c for c in TEXT_FIELDS if isinstance(row.get(c), str)), None)
        if column is None:
            raise DatasetError(
                f"{name} has the columns {', '.join(row)}",
                expected="a text column named " + ", ".join(TEXT_FIELDS),
                remedy="rename the column that holds the text",
            )
        texts.append(row[column])
    return texts
