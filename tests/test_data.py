"""Calibration text: every format, every way it can be wrong, and reproducible sequences."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clla.calibrate.data import calibration_blocks, held_out_blocks, self_written, token_batches, whole_windows
from clla.calibrate.reading import bundled_path, load_documents
from clla.errors import DatasetError

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
    with pytest.raises(DatasetError, match="no text file"):
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
def test_whole_windows_are_the_text_in_order(bos: bool) -> None:
    tokenizer = WordTokenizer(bos=bos)
    texts = documents(6, 11)
    stream = [i for text in texts for i in tokenizer(text)["input_ids"]]
    windows = whole_windows(texts, tokenizer, count=4, length=8)
    assert windows.flatten().tolist() == stream[:32] and windows.shape == (4, 8)
    everything = whole_windows(texts, tokenizer, count=1000, length=8)
    assert everything.flatten().tolist() == stream[: len(stream) // 8 * 8]


def test_whole_windows_join_documents_by_a_blank_line() -> None:
    class Characters(WordTokenizer):
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) for c in text]}

    windows = whole_windows(["ab", "cd"], Characters(), count=1, length=6)
    assert "".join(map(chr, windows[0].tolist())) == "ab\n\ncd"


def test_whole_windows_of_too_short_a_text_are_refused() -> None:
    with pytest.raises(DatasetError, match="the text has 7 tokens"):
        whole_windows([numbered(0, 7)], WordTokenizer(), count=2, length=8)


class Echo:
    """A model that writes random tokens with torch's generator."""

    device = torch.device("cpu")

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
