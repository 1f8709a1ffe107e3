"""Text from where it lies: documents of a file or of a Hub data set, one after another, never the whole at once.

Local files are opened as they are named: no name is a pattern, nothing passes through a cache.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import IO, Any

from clla import console
from clla.errors import DatasetError, is_unicode
from clla.storage.places import expanded

TEXT_FIELDS = ("text", "content", "document", "body")
CHATS = {"messages": "role and content", "conversations": "from and value", "conversation": "role and content"}
INSTRUCTIONS = ("instruction", "prompt", "question")  # columns that come with another for the answer
MAX_DOCUMENTS = 100_000  # of a data set, before shuffling
MAX_CHARS = 1 << 30  # of any text
PART_CHARS = 1 << 22  # a longer .txt is several documents
PIECE = 1 << 20  # bytes read at once
ROWS = 64  # of a .parquet file, read at once
HOPELESS = 1000  # first rows without any text
FORMATS = "a .txt, .jsonl, .json or .parquet file (also .gz, .xz, .bz2 or .zst)"
BOM = "\ufeff"


def _zstd(path: Path, mode: str) -> IO[bytes]:
    import pyarrow

    stream: Any = pyarrow.CompressedInputStream(path.open("rb"), "zstd")
    return BufferedReader(stream)


SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
OPENERS: dict[str, Callable[[Path, str], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _zstd}
UNREADABLE = (OSError, EOFError, ValueError, NotImplementedError, lzma.LZMAError, zlib.error)  # pyarrow's are these


@dataclass(frozen=True)
class HubDataset:
    """Attributes: repo: id on the Hub; config: of several, or None; revision: or None; split."""

    repo: str
    config: str | None
    revision: str | None
    split: str


def bundled_path() -> Path:
    """The public-domain text that ships with the package (provenance beside it)."""
    return Path(str(resources.files("clla") / "data" / "calibration.txt.xz"))


def local_file(dataset: str) -> Path | None:
    """The file that a data set is, whether it is there or not; None for the Hub and for `self`."""
    if dataset == "bundled":
        return bundled_path()
    path = expanded(dataset)
    return path if dataset != "self" and (_kind(path) or path.exists()) else None


def hub_dataset(dataset: str) -> HubDataset | None:
    """What would be read from the Hub; None for all other data sets.

    Written `user/name`, then, where wanted, `/config`, `@revision` and `:split`, in this order.
    """
    if dataset == "self" or local_file(dataset) is not None:
        return None
    found = re.fullmatch(r"([^/@:]+(?:/[^/@:]+)?)(?:/([^@:]+))?(?:@([^:]+))?(?::([^/].*))?", dataset)
    return HubDataset(found[1], found[2], found[3], found[4] or "train") if found else None


def open_text(path: Path) -> IO[bytes]:
    """A file's bytes, unpacked."""
    opened: IO[bytes] = OPENERS.get(path.suffix.lower(), open)(path, "rb")
    return opened


def read_documents(dataset: str, *, tell: bool = True) -> Iterator[str]:
    """Texts of a data set, as they are read; at most `MAX_DOCUMENTS` of rows, and `MAX_CHARS` in all.

    Rows without text are left out. A .txt file is one document, a long one several.

    Args:
        dataset: `bundled`, a .txt, .jsonl, .json or .parquet file (also packed: .gz, .xz, .bz2, .zst), or a Hub data
            set id, with or without `/config`, `@revision` and `:split`.
        tell: say how many rows were left out.

    Raises:
        DatasetError: it is missing, empty, damaged, or has no text, or most of its rows have none.
    """
    total = 0
    for text in _source_of(dataset, tell):
        if text.strip():
            yield text[: MAX_CHARS - total]
            total += len(text)
            if total >= MAX_CHARS:
                return
    if not total:
        raise DatasetError(f"{dataset} holds no text", remedy="pass a data set with text")


def load_documents(dataset: str) -> list[str]:
    """All of `read_documents`."""
    return list(read_documents(dataset))


def check_text(dataset: str) -> None:
    """Refuse, before a model is loaded, a text that is not there or cannot be read.

    Raises:
        DatasetError: as `read_documents`, up to the first document.
    """
    next(read_documents(dataset, tell=False))


def _source_of(dataset: str, tell: bool) -> Iterator[str]:
    if dataset == "self":
        raise DatasetError(
            "'self' stands for text that the model writes while it is calibrated or healed",
            expected=f"a text to measure on: {FORMATS}, a Hub data set id or 'bundled'",
            remedy="name one",
        )
    path = local_file(dataset)
    if path is None:
        return _hub(dataset, tell)
    kind = _kind(path)
    if not path.exists():
        raise DatasetError(
            f"{path} does not exist",
            expected=f"{FORMATS}, a Hub data set id, 'bundled' or 'self'",
            remedy="check the path given to --dataset or --text",
        )
    if path.is_dir():
        raise DatasetError(f"{path} is a directory", expected=FORMATS, remedy="name one of its files")
    if not kind or not path.is_file():
        raise DatasetError(
            f"{path} is no text file that is understood", expected=FORMATS, remedy="rename or convert it"
        )
    if path.stat().st_size == 0:
        raise DatasetError(f"{path} is empty", expected="a file with text", remedy="check how it was made")
    return _guarded(path, kind, tell)


def _guarded(path: Path, kind: str, tell: bool) -> Iterator[str]:
    try:
        if kind == ".txt":
            yield from _parts(path)
        else:
            yield from _texts(_parquet_rows(path) if kind == ".parquet" else _json_rows(path), str(path), tell)
    except UNREADABLE as error:
        what = "UTF-8 text" if kind == ".txt" else kind[1:]
        raise DatasetError(f"{path} cannot be read as {what}: {error}", remedy="check the file") from error


def _kind(path: Path) -> str:
    """Suffix of a text file that is understood, without that of its compression; empty for everything else."""
    kind = next((s for s in map(str.lower, path.suffixes[::-1]) if s not in OPENERS), "")
    return kind if kind in SUFFIXES else ""


def _parts(path: Path) -> Iterator[str]:
    """A text in parts of at most `PART_CHARS` characters, cut at line ends where there are any."""
    decoder, text, offset = codecs.getincrementaldecoder("utf-8-sig")(), "", 0
    with open_text(path) as stream:
        while True:
            raw = stream.read(PIECE)
            pending = len(decoder.getstate()[0])
            try:
                text += decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise _no_utf8(path, offset - pending + error.start, error) from error
            offset += len(raw)
            while len(text) > PART_CHARS:
                end = text.rfind("\n", 0, PART_CHARS) + 1 or PART_CHARS - (text[PART_CHARS - 1] == "\r")
                yield text[:end].replace("\r\n", "\n")
                text = text[end:]
            if not raw:
                break
    yield text.replace("\r\n", "\n")


def _no_utf8(path: Path, offset: int, error: UnicodeDecodeError) -> DatasetError:
    wide = error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return DatasetError(
        f"{path} is no UTF-8 text: byte {offset:,} is {error.object[error.start]:#04x}, {error.reason}",
        expected="text in UTF-8",
        remedy=f"convert it, e.g.: iconv -f {'UTF-16' if wide else 'LATIN1'} -t UTF-8",
    )


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a file with one JSON value a line, or with one array of them."""
    offset, found = 0, 0
    with open_text(path) as stream:
        for number, raw in enumerate(stream, 1):
            value = None
            try:
                line = raw.decode().removeprefix(BOM if number == 1 else "").strip()
                value = json.loads(line) if line else None
            except UnicodeDecodeError as error:
                raise _no_utf8(path, offset + error.start, error) from error
            except (ValueError, RecursionError) as error:
                if found == 0 and (whole := _whole(path)) is not None:
                    yield from whole
                    return
                raise DatasetError(
                    f"{path}, line {number}, is no JSON: {error}",
                    expected="one object a line, or an array of objects",
                    remedy="check how the file was made, and whether it is complete",
                ) from error
            offset += len(raw)
            if not line:
                continue
            if found == 0 and isinstance(value, list):
                yield from ((f"row {i}", row) for i, row in enumerate(value, 1))
            else:
                yield f"line {number}", value
            found += 1


def _whole(path: Path) -> Iterator[tuple[str, Any]] | None:
    """Rows of a file that is one JSON value over several lines; None if it is not."""
    with open_text(path) as stream:
        try:
            value = json.loads(stream.read().decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return None
    return ((f"row {i}", row) for i, row in enumerate(value if isinstance(value, list) else [value], 1))


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a .parquet file; of other columns than the first with text only where there is none."""
    import pyarrow.parquet

    with open_text(path) as stream:
        file = pyarrow.parquet.ParquetFile(stream)
        columns = [name for name in TEXT_FIELDS if name in file.schema_arrow.names]
        number = 0
        for batch in file.iter_batches(batch_size=ROWS, columns=columns or None):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row


def _hub(dataset: str, tell: bool) -> Iterator[str]:
    import datasets

    wanted = hub_dataset(dataset)
    if wanted is None:
        raise DatasetError(
            f"{dataset!r} names no data set",
            expected=f"{FORMATS}, a Hub data set id (user/name[/config][@revision][:split]), 'bundled' or 'self'",
            remedy="check the name",
        )
    try:
        rows = datasets.load_dataset(
            wanted.repo, wanted.config, split=wanted.split, revision=wanted.revision, streaming=True
        )
        yield from _texts(((f"row {i}", row) for i, row in enumerate(rows, 1)), dataset, tell)
    except DatasetError:
        raise
    except Exception as error:  # no network, no such data set, no such split: all mean the same here
        if wanted.config is None and (several := _several(wanted)):
            at = f"@{wanted.revision}" if wanted.revision else ""
            split = f":{wanted.split}" if wanted.split != "train" else ""
            raise DatasetError(
                f"data set {wanted.repo!r} has {len(several)} configurations: {', '.join(several)}",
                expected="one of them",
                remedy=f"pass e.g. {wanted.repo}/{several[0]}{at}{split} (user/name/config:split)",
            ) from error
        raise DatasetError(
            f"data set {dataset!r} could not be loaded: {error}",
            expected="a Hub data set id that can be reached (user/name[/config][@revision][:split]), or a local file: "
            + FORMATS,
            remedy="check the name and the network, or leave --dataset out to use the bundled text",
        ) from error


def _several(wanted: HubDataset) -> list[str]:
    """Configurations of a Hub data set that has more than one."""
    import datasets

    try:
        names = datasets.get_dataset_config_names(wanted.repo, revision=wanted.revision)
    except Exception:  # what failed before is told
        return []
    return list(names) if len(names) > 1 else []


def _texts(rows: Iterator[tuple[str, Any]], name: str, tell: bool) -> Iterator[str]:
    """The texts of rows, each with its place in the file; those without are counted and left out."""
    good = odd = blank = 0
    first: tuple[str, Any] | None = None  # without text

    def check() -> None:
        if odd > good:
            assert first is not None
            raise _no_text(name, *first, odd=odd, rows=good + odd + blank)

    def left_out() -> None:
        if tell and first is not None and good:
            rows = good + odd + blank
            why = f"{first[0]}, {_why(first[1])}"
            console.say(f"{odd + blank:,} of {rows:,} rows of {name} hold no text and are left out; the first: {why}")

    try:
        for place, row in islice(rows, MAX_DOCUMENTS):
            column = _column(row)
            if column is not None and row[column].strip():
                good += 1
                yield row[column]
                continue
            first = first or (place, row)
            odd, blank = odd + (column is None), blank + (column is not None)
            if good == 0 and odd >= HOPELESS:
                check()
    except GeneratorExit:
        left_out()
        raise
    check()
    if not good:
        raise DatasetError(
            f"{name} holds no text: all its {blank:,} rows are blank" if blank else f"{name} is empty: it has no rows",
            expected="a data set with text",
            remedy="check how it was made",
        )
    left_out()


def _column(row: Any) -> str | None:
    """Of a row, the first column with text."""
    if not isinstance(row, dict):
        return None
    return next((c for c in TEXT_FIELDS if isinstance(row.get(c), str) and is_unicode(row[c])), None)


def _why(row: Any) -> str:
    """Why a row has no text."""
    if not isinstance(row, dict):
        return f"which is {_type(row)} and no object"
    column = next((c for c in TEXT_FIELDS if c in row), None)
    if column is None:
        return f"which has no column {TEXT_FIELDS[0]}"
    if isinstance(row[column], str):
        return f"whose {column} {'is blank' if is_unicode(row[column]) else 'holds half a character (a surrogate)'}"
    return f"whose {column} is {_type(row[column])}"


def _type(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "true or false"
    names = {int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")


def _no_text(name: str, place: str, row: Any, *, odd: int, rows: int) -> DatasetError:
    """What is wrong with a data set most of whose rows have no text, told by the first of them."""
    expected = "a text column named " + ", ".join(TEXT_FIELDS)
    if not isinstance(row, dict) or any(column in row for column in TEXT_FIELDS):
        return DatasetError(
            f"{odd:,} of {rows:,} rows of {name} hold no text; the first: {place}, {_why(row)}",
            expected=expected,
            remedy="check how the file was made",
        )
    chat = next((column for column in CHATS if column in row), None)
    asked = next((column for column in INSTRUCTIONS if column in row), None)
    if chat is not None or (asked is not None and len(row) > 1):
        form = f"chat turns ({chat}, with {CHATS[chat]})" if chat else f"instructions ({', '.join(row)})"
        return DatasetError(
            f"{name} holds {form}, no plain text",
            expected=expected,
            remedy="write the turns as text first, one row a conversation, with the model's chat template: "
            "tokenizer.apply_chat_template(turns, tokenize=False)",
        )
    return DatasetError(
        f"{name} has the columns {', '.join(map(str, row))}",
        expected=expected,
        remedy="rename the column that holds the text",
    )
