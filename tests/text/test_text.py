"""Calibration text: every format, every way it can be wrong, and reproducible sequences."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clla.errors import DatasetError
from clla.evaluate.seen import fingerprint
from clla.text.reading import bundled_path, load_documents, read_documents
from clla.text.sequences import (
    calibration_blocks,
    evaluation_samples,
    held_out_blocks,
    self_written,
    token_batches,
    whole_samples,
)

BOS, EOS, FIRST_WORD = 1, 2, 10
TEXTS = ["The first text.\nIt has two lines.", "Ein zweiter – mit Umlauten: äöü.", "third"]


class WordTokenizer:
    """Word `w7` is token 17; with `bos`, a start token stands before every text."""

    def __init__(self, *, bos: bool = False, eos: bool = True) -> None:
        self.bos = bos
        self.bos_token_id = BOS if bos else None
        self.eos_token_id = EOS if eos else None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        prefix = [BOS] if self.bos and add_special_tokens else []
        return {"input_ids": prefix + [FIRST_WORD + int(word[1:]) for word in text.split()]}


def numbered(first: int, count: int) -> str:
    return "\n".join(f"w{i}" for i in range(first, first + count))


def documents(count: int, words: int) -> list[str]:
    """Documents whose words are all different, one a line."""
    return [numbered(i * words, words) for i in range(count)]


def ids_in(batches: list[Tensor]) -> list[int]:
    return [i for i in torch.cat(batches).flatten().tolist() if i >= FIRST_WORD]


def rows(texts: list[str], column: str = "text") -> str:
    return "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts))


WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda p: p.write_text(rows(TEXTS), encoding="utf-8"),
    "rows.jsonl.xz": lambda p: p.write_bytes(lzma.compress(rows(TEXTS).encode())),
    "rows.jsonl.gz": lambda p: p.write_bytes(gzip.compress(rows(TEXTS).encode())),
    "content.jsonl": lambda p: p.write_text(rows(TEXTS, "content"), encoding="utf-8"),
    "rows.parquet": lambda p: pd.DataFrame({"id": [1, 2, 3], "text": TEXTS}).to_parquet(p),
    "blank.jsonl": lambda p: p.write_text(rows(["  \n", *TEXTS, ""]), encoding="utf-8"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_rows_are_read(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert load_documents(str(tmp_path / name)) == TEXTS


@pytest.mark.parametrize("name", ("a.txt", "a.txt.xz", "a.txt.gz", "with.dots.txt"))
def test_text_files_are_one_document(name: str, tmp_path: Path) -> None:
    raw = TEXTS[1].encode()
    content = {".xz": lzma.compress, ".gz": gzip.compress}.get(Path(name).suffix, bytes)(raw)
    (tmp_path / name).write_bytes(content)
    assert load_documents(str(tmp_path / name)) == [TEXTS[1]]


def test_the_bundled_text_is_there() -> None:
    assert bundled_path().is_file()
    (text,) = load_documents("bundled")
    assert len(text) > 100_000


@pytest.mark.parametrize("name", ("none.txt", "none.jsonl", "none.jsonl.xz", "none.parquet"))
def test_missing_files_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist") as caught:
        load_documents(str(tmp_path / name))
    assert name in caught.value.got


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.txt", b""),
        ("blank.txt", b" \n\t\n"),
        ("empty.jsonl", b""),
        ("blank.jsonl", b'{"text": "  "}\n'),
        ("broken.jsonl", b'{"text": "a"\n}}}'),
        ("latin.txt", "Größe".encode("latin-1")),
        ("noxz.txt.xz", b"this is not xz"),
        ("nogz.txt.gz", b"this is not gzip"),
        ("noxz.jsonl.xz", b"this is not xz"),
        ("short.txt.xz", lzma.compress(TEXTS[0].encode() * 50)[:-20]),
        ("short.txt.gz", gzip.compress(TEXTS[0].encode() * 50)[:-12]),
        ("no.parquet", b"this is not parquet"),
        ("empty.parquet", b""),
        ("words.csv", b"text\nhello\n"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_without_readable_text_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError) as caught:
        load_documents(str(tmp_path / name))
    assert name in caught.value.got and caught.value.remedy


def test_rows_without_a_text_column_list_the_columns(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(rows(TEXTS, "words"))
    with pytest.raises(DatasetError, match="id, words"):
        load_documents(str(tmp_path / "rows.jsonl"))


def test_a_directory_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is a directory"):
        load_documents(str(tmp_path))


def test_the_same_seed_gives_the_same_sequences() -> None:
    def batches(seed: int) -> Tensor:
        texts = documents(40, 20)
        found = token_batches(texts, WordTokenizer(), tokens=320, sequence_length=32, seed=seed, batch_size=2)
        return torch.cat(found)

    assert torch.equal(batches(5), batches(5))
    assert not torch.equal(batches(5), batches(6))


def test_documents_are_shuffled_and_packed() -> None:
    """Every sequence is cut from whole documents in a shuffled order, an end token between two of them."""
    texts = documents(30, 5)
    (batch,) = token_batches(texts, WordTokenizer(), tokens=100, sequence_length=50, batch_size=2)
    assert batch.shape == (2, 50)
    order = []
    for sequence in batch.tolist():
        parts = " ".join(map(str, sequence)).split(f" {EOS} ")
        for part in parts:
            ids = [int(i) for i in part.split()]
            document = (ids[0] - FIRST_WORD) // 5
            whole = [FIRST_WORD + document * 5 + i for i in range(5)]
            assert ids == whole[: len(ids)] and (len(ids) == 5 or part == parts[-1])
            order.append(document)
    assert len(set(order)) == len(order) and order != sorted(order)


@given(
    sequence_length=st.integers(4, 40),
    tokens=st.integers(1, 300),
    batch_size=st.integers(1, 4),
    words=st.integers(1, 60),
    bos=st.booleans(),
    eos=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_batches_have_the_shape_and_prefix_that_were_asked_for(
    sequence_length: int, tokens: int, batch_size: int, words: int, bos: bool, eos: bool
) -> None:
    texts = documents(1500 // words + 1, words)
    batches = token_batches(
        texts,
        WordTokenizer(bos=bos, eos=eos),
        tokens=tokens,
        sequence_length=sequence_length,
        batch_size=batch_size,
    )
    sequences = torch.cat(batches)
    assert sequences.shape[1] == sequence_length and len(sequences) <= -(-tokens // sequence_length)
    assert sequences.dtype == torch.int64
    assert all(len(batch) == batch_size for batch in batches[:-1]) and 0 < len(batches[-1]) <= batch_size
    assert bool(((sequences[:, 0] == BOS) == bos).all()) and not bool((sequences[:, 1:] == BOS).any())
    assert eos or not bool((sequences == EOS).any())
    words_used = ids_in(batches)
    assert len(set(words_used)) == len(words_used), "no text is used twice"


def test_held_out_blocks_are_not_calibrated_on() -> None:
    """The split does not depend on sequence length or seed, and together the parts are the whole text."""
    texts = [numbered(0, 60_000), numbered(60_000, 60_000)]
    kept, held = list(calibration_blocks(texts)), list(held_out_blocks(texts))
    assert sum(map(len, kept)) + sum(map(len, held)) == sum(map(len, texts))
    assert 0.04 < sum(map(len, held)) / sum(map(len, texts)) < 0.08
    assert not set(held) & set(kept)
    assert list(calibration_blocks(["short"])) == ["short"] and not list(held_out_blocks(["short"]))


def test_every_token_is_used_when_many_are_wanted() -> None:
    """The rests of pieces are packed too, once all pieces were begun."""
    texts = documents(12, 300)
    total = sum(len(text.split()) for text in texts)
    batches = token_batches(texts, WordTokenizer(), tokens=10**6, sequence_length=64)
    assert sum(batch.numel() for batch in batches) > 0.95 * total


def test_long_documents_are_mixed_with_others() -> None:
    """A long document does not fill all sequences, and its pieces lose no word in between."""
    texts = [numbered(0, 3000), numbered(3000, 3000)]
    batches = token_batches(texts, WordTokenizer(), tokens=64 * 20, sequence_length=64)
    assert 0.1 < sum(i >= FIRST_WORD + 3000 for i in ids_in(batches)) / len(ids_in(batches)) < 0.9
    for sequence in torch.cat(batches).tolist():
        steps = [b - a for a, b in pairwise(sequence) if EOS not in (a, b)]
        assert set(steps) == {1}


def test_short_text_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"shorter than one sequence \(10 tokens\)") as caught:
        token_batches([numbered(0, 10)], WordTokenizer(eos=False), tokens=64, sequence_length=32)
    assert "32" in caught.value.expected


@pytest.mark.parametrize("bos", (False, True))
def test_whole_samples_are_the_text_in_order(bos: bool) -> None:
    tokenizer = WordTokenizer(bos=bos)
    texts = documents(6, 11)
    stream = [i for text in texts for i in tokenizer(text)["input_ids"]]
    windows = whole_samples(texts, tokenizer, count=4, length=8)
    assert windows.flatten().tolist() == stream[:32] and windows.shape == (4, 8)
    everything = whole_samples(texts, tokenizer, count=1000, length=8)
    assert everything.flatten().tolist() == stream[: len(stream) // 8 * 8]


def test_whole_samples_join_documents_by_a_blank_line() -> None:
    class Characters(WordTokenizer):
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) for c in text]}

    windows = whole_samples(["ab", "cd"], Characters(), count=1, length=6)
    assert "".join(map(chr, windows[0].tolist())) == "ab\n\ncd"


def test_whole_samples_of_too_short_a_text_are_refused() -> None:
    with pytest.raises(DatasetError, match="the text has 7 tokens"):
        whole_samples([numbered(0, 7)], WordTokenizer(), count=2, length=8)


class Echo:
    """A model that writes random tokens with torch's generator."""

    device = torch.device("cpu")
    config = SimpleNamespace(name_or_path="echo")

    def generate(self, prompt: Tensor, *, max_new_tokens: int, **options: object) -> Tensor:
        assert options["do_sample"] and options["min_new_tokens"] == max_new_tokens
        return torch.cat((prompt, torch.randint(FIRST_WORD, 1000, (len(prompt), max_new_tokens))), dim=1)


def test_self_written_text_has_the_size_wanted_and_follows_the_seed() -> None:
    def written(seed: int, tokenizer: WordTokenizer) -> list[Tensor]:
        return list(self_written(Echo(), tokenizer, tokens=100, sequence_length=16, batch_size=3, seed=seed))

    state = torch.random.get_rng_state()
    batches = written(0, WordTokenizer(bos=True))
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's generator is left alone"
    assert [tuple(batch.shape) for batch in batches] == [(3, 16), (3, 16), (1, 16)]
    assert bool((torch.cat(batches)[:, 0] == BOS).all())
    assert not torch.equal(batches[0], batches[1])
    assert torch.equal(torch.cat(batches), torch.cat(written(0, WordTokenizer(bos=True))))
    assert not torch.equal(torch.cat(batches), torch.cat(written(1, WordTokenizer(bos=True))))
    assert bool((torch.cat(written(0, WordTokenizer()))[:, 0] == EOS).all())
    with pytest.raises(DatasetError, match="no start token"):
        written(0, WordTokenizer(eos=False))


def test_line_ends_of_other_systems_are_translated(tmp_path: Path) -> None:
    path = tmp_path / "windows.txt"
    path.write_bytes(b"one\r\ntwo\r\n")
    assert load_documents(str(path)) == ["one\ntwo\n"]


# Names, rows and sizes.


@pytest.mark.parametrize(
    "name",
    [
        "train[1]",
        "what?",
        "a*b",
        "**",
        "{a,b}",
        "[!a]",
        "a@b",
        "http:",
        "a#b",
        "with space",
        "%20",
        "-x",
        "$HOME",
    ],
)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
def test_names_are_no_patterns(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file, and of the directory that it is in, absolute and relative; others lie beside it."""

    def write(path: Path, text: str) -> None:
        path.parent.mkdir(exist_ok=True)
        if kind == ".parquet":
            path.write_bytes(pd.DataFrame({"text": [text]}).to_parquet())
        else:
            path.write_text(text if kind == ".txt" else rows([text]))

    for path in (tmp_path / "train1" / f"a{kind}", tmp_path / f"whatX{kind}", tmp_path / f"b{kind}"):
        write(path, "the text of another file")
    monkeypatch.chdir(tmp_path)
    for right in (Path(name) / f"a{kind}", Path(name) / f"{name}{kind}", Path(f"{name}{kind}")):
        write(right, f"the right text of {right}")
        for path in (str(right), str(tmp_path / right)):
            assert load_documents(path) == [f"the right text of {right}"]
            data = right.read_bytes()
            assert fingerprint(path) == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("pack", [".gz", ".xz", ".bz2", ".zst", ".GZ"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".TXT", ".Jsonl", ".JSON"])
def test_packed_files_are_unpacked(kind: str, pack: str, tmp_path: Path) -> None:
    raw = (TEXTS[0] if kind.lower() == ".txt" else rows([TEXTS[0]])).encode()
    packers: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress,
        ".xz": lzma.compress,
        ".bz2": bz2.compress,
        ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
    }
    packed = packers[pack.lower()](raw)
    (tmp_path / f"a{kind}{pack}").write_bytes(packed)
    assert load_documents(str(tmp_path / f"a{kind}{pack}")) == [TEXTS[0]]
    assert fingerprint(str(tmp_path / f"a{kind}{pack}")) == hashlib.sha256(raw).hexdigest()
    (tmp_path / f"cut{kind}{pack}").write_bytes(packed[:-6])
    with pytest.raises(DatasetError, match="cut"):
        load_documents(str(tmp_path / f"cut{kind}{pack}"))


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        ({"text": None}, "whose text is null"),
        ({"id": 3}, "which has no column text"),
        ({"text": 5}, "whose text is a number"),
        ({"text": " "}, "whose text is blank"),
        ({"text": "half \ud83d"}, "whose text holds half a character"),
        ({"text": ["a"]}, "whose text is a list"),
        ("words", "which is a string and no object"),
        ([1], "which is a list and no object"),
    ],
)
def test_rows_without_text_are_left_out_and_counted(
    odd: Any, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(odd if i in (3, 7) else {"text": f"line {i}"}) for i in range(1, 41)))
    assert len(load_documents(str(path))) == 38
    said = " ".join(capsys.readouterr().err.split())
    assert "2 of 40 rows of" in said and f"the first: line 3, {why}" in said


def test_null_rows_of_parquet_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pd.DataFrame({"id": [1, 2, 3], "text": ["a", None, "b"]}).to_parquet(tmp_path / "a.Parquet")
    assert load_documents(str(tmp_path / "a.Parquet")) == ["a", "b"]
    assert "row 2, whose text is null" in " ".join(capsys.readouterr().err.split())


TURNS = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": TURNS}, r"chat turns \(messages"),
        ({"conversations": [{"from": "human", "value": "hi"}]}, r"chat turns \(conversations"),
        ({"instruction": "do", "input": "", "output": "done"}, r"instructions \(instruction, input, output"),
        ({"text": None}, "3 of 3 rows .* hold no text; the first: line 1, whose text is null"),
        ({"number": 1}, "columns number"),
        ("words", "line 1, which is a string"),
    ],
)
def test_files_without_text_say_what_they_hold(row: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(row)] * 3))
    with pytest.raises(DatasetError, match=said) as caught:
        load_documents(str(path))
    assert ("apply_chat_template" in caught.value.remedy) == ("chat" in said or "instructions" in said)


def test_a_file_most_of_whose_rows_are_odd_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' + '{"text": null}\n' * 2)
    with pytest.raises(DatasetError, match="2 of 3 rows"):
        load_documents(str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet", "rows.parquet", "lines.jsonl", "a.txt.gz"])
def test_empty_files_are_called_so(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    if name == "rows.parquet":
        pd.DataFrame({"text": pd.Series([], dtype=str)}).to_parquet(tmp_path / name)
    if name == "lines.jsonl":
        (tmp_path / name).write_bytes(b"\n\n")
    with pytest.raises(DatasetError, match="is empty"):
        load_documents(str(tmp_path / name))


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_byte_order_mark_is_no_text(kind: str, tmp_path: Path) -> None:
    text = TEXTS[1] if kind == "txt" else rows([TEXTS[1]])
    (tmp_path / f"a.{kind}").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_documents(str(tmp_path / f"a.{kind}")) == [TEXTS[1]]


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_what_is_no_utf8_is_named_with_its_place(kind: str, tmp_path: Path) -> None:
    good = (rows(["grün"]) * 50_000).encode()
    (tmp_path / f"a.{kind}").write_bytes(good + b'{"text": "gr\xfcn"}\n')
    with pytest.raises(DatasetError, match=f"byte {len(good) + 12:,} is 0xfc"):
        load_documents(str(tmp_path / f"a.{kind}"))
    (tmp_path / f"b.{kind}").write_text("hello", encoding="utf-16")
    with pytest.raises(DatasetError, match="no UTF-8") as caught:
        load_documents(str(tmp_path / f"b.{kind}"))
    assert "UTF-16" in caught.value.remedy


def test_json_over_several_lines_and_broken_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in (json.dumps([{"text": t} for t in TEXTS]), json.dumps([{"text": t} for t in TEXTS], indent=1)):
        path.write_text(text)
        assert load_documents(str(path)) == TEXTS
    path.write_text(rows(TEXTS) + '{"text": "cut')
    with pytest.raises(DatasetError, match="line 4, is no JSON"):
        load_documents(str(path))


class Counting(WordTokenizer):
    """Notes how many characters it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.read = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        self.read += len(text)
        return super().__call__(text, add_special_tokens)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "one row"])
def test_no_more_of_a_long_text_is_read_than_is_measured_on(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clla.text.reading.PART_CHARS", part := 100_000)
    text = numbered(0, 100_000)
    path = tmp_path / f"a.{'txt' if kind == 'txt' else 'jsonl'}"
    path.write_text(text if kind == "txt" else rows([text] if kind == "one row" else text.split("\n")))
    tokenizer = Counting()
    windows = evaluation_samples(str(path), tokenizer, count=2, length=512)
    assert windows.flatten().tolist() == list(range(FIRST_WORD, FIRST_WORD + 1024))
    assert tokenizer.read < 40_000
    assert len(next(read_documents(str(path)))) <= (len(text) if kind == "one row" else part)


def test_words_longer_than_expected_are_read_on(tmp_path: Path) -> None:
    text = "\n".join(f"w{i:0100d}" for i in range(3000))
    assert whole_samples([text], WordTokenizer(), count=2, length=1000).shape == (2, 1000)


def test_long_texts_are_cut_into_documents_that_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clla.text.reading.PART_CHARS", 250_000)
    text = numbered(0, 100_000)
    (tmp_path / "a.txt").write_text(text)
    parts = load_documents(str(tmp_path / "a.txt"))
    assert len(parts) == 3 and "".join(parts) == text and all(part.endswith("\n") for part in parts[:-1])


def test_pieces_held_are_spread_over_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clla.text.sequences.HELD_CHARS", 50_000)
    batches = token_batches(documents(2000, 20), WordTokenizer(), tokens=4096, sequence_length=64)
    words = torch.tensor(ids_in(batches)) - FIRST_WORD
    shares = torch.histc(words.float(), bins=4, min=0, max=40_000) / len(words)
    assert bool((shares > 0.15).all()) and sum(batch.numel() for batch in batches) == 4096


# Data sets of the Hub, by a stand-in for `datasets`.


class Hub:
    """What `datasets` would find: configurations of a repository."""

    def __init__(self, *configs: str) -> None:
        self.configs, self.asked = configs, []  # type: ignore[var-annotated]

    def load(self, repo: str, config: str | None, *, split: str, revision: str | None, streaming: bool) -> Any:
        self.asked.append((repo, config, split, revision))
        assert streaming
        if config is None and len(self.configs) > 1:
            raise ValueError("Config name is missing.")
        return [{"text": "one"}, {"text": ""}, {"text": "two"}]

    def names(self, repo: str, *, revision: str | None) -> list[str]:
        return list(self.configs)


@pytest.mark.parametrize(
    ("dataset", "asked"),
    [
        ("maker/texts", ("maker/texts", None, "train", None)),
        ("squad", ("squad", None, "train", None)),
        ("maker/texts:test", ("maker/texts", None, "test", None)),
        ("maker/texts/raw-v1:test[:10%]", ("maker/texts", "raw-v1", "test[:10%]", None)),
        ("maker/texts@refs/convert/parquet:test", ("maker/texts", None, "test", "refs/convert/parquet")),
        ("maker/texts/raw@abc", ("maker/texts", "raw", "train", "abc")),
    ],
)
def test_hub_data_sets_are_named_whole(dataset: str, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub("raw-v1")
    monkeypatch.setattr("datasets.load_dataset", hub.load)
    assert load_documents(dataset) == ["one", "two"] and hub.asked == [asked]


def test_configurations_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub("raw-v1", "raw-v2")
    monkeypatch.setattr("datasets.load_dataset", hub.load)
    monkeypatch.setattr("datasets.get_dataset_config_names", hub.names)
    with pytest.raises(DatasetError, match="2 configurations: raw-v1, raw-v2") as caught:
        load_documents("maker/texts@main:test")
    assert "maker/texts/raw-v1@main:test" in caught.value.remedy
    assert load_documents("maker/texts/raw-v2:test") == ["one", "two"]
    with pytest.raises(DatasetError, match="names no data set"):
        load_documents("https://example.org/x")
