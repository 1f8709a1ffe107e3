"""Stats, plans and codecs on disk: identical after loading, and no damage goes unnoticed."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_stats import sampled
from safetensors import safe_open
from safetensors.torch import save_file

from clla.artifacts.codec import Codec, GroupCodec
from clla.artifacts.plan import NEWER, KVShape, LayerGroup, Plan, encoded_slots, exact_bytes_of
from clla.artifacts.stats import Stats
from clla.errors import CorruptArtifactError
from clla.modeling.quantize_clla import RowLayout
from clla.modeling.spec_clla import CacheSpec
from clla.storage.files import ARTIFACT_VERSION, digest, json_digest, read_json, write_text


def make_stats() -> Stats:
    return sampled(num_layers=2, head_dim=1, hidden=3, tokens=50).stats


def make_codec() -> Codec:
    generator = torch.Generator().manual_seed(0)
    groups = []
    for size, rank in ((2, 3), (1, 0), (1, 2)):
        shapes = ((rank, 2 * size), (2 * size,), (size, 2, rank), (size, 2))
        groups.append(GroupCodec(*(torch.randn(*shape, generator=generator) for shape in shapes)))
    return Codec(tuple(groups), made_from="codec", predicted_kl=0.0123)


def make_plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "groups": (LayerGroup((0, 1), (8, 4, 2), 0.25), LayerGroup((3,), (), 0.125), LayerGroup((4, 5, 6), (3,), 0.5)),
        "kv": KVShape(2, 8),
        "kv_itemsize": 2,
        "tier_size": 8,
        "window": 32,
        "sinks": 4,
        "flush_block": 16,
        "source": "group",
        "budget_bytes": 33.25,
        "at_context": 4096,
        "made_from": "plan",
        "kept_layers": (2, 7),
    }
    return Plan(**{**values, **changes})


MAKERS: dict[str, Callable[[], Any]] = {"stats": make_stats, "codec": make_codec, "plan": make_plan}
TENSOR_KINDS = ("stats", "codec")


def loader(kind: str) -> Callable[[Path], Any]:
    return {"stats": Stats, "codec": Codec, "plan": Plan}[kind].load


def assert_same(a: Any, b: Any) -> None:
    """Equal types, values, dtypes and bits, all the way down."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    elif isinstance(a, Stats | Codec | GroupCodec):
        for field in fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Save the file's tensors again with another header."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["clla"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header)
    save_file(tensors, path, metadata={"clla": json.dumps(header)})


@pytest.mark.parametrize("kind", MAKERS)
def test_loading_gives_back_what_was_saved(kind: str, tmp_path: Path) -> None:
    artifact = MAKERS[kind]()
    path = tmp_path / "artifact"
    artifact.save(path)
    assert_same(loader(kind)(path), artifact)
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"], "nothing else is left in the directory"


def test_stats_without_inputs_and_in_other_dtypes_come_back(tmp_path: Path) -> None:
    stats = make_stats()
    values = {**vars(stats), "input_mean": None, "input_covariance": None, "input_cross": None}
    values["mean"] = stats.mean.double().mT.contiguous().mT  # not contiguous
    values["fisher"] = stats.fisher.bfloat16()
    changed = Stats(**values)
    changed.save(tmp_path / "s")
    assert_same(Stats.load(tmp_path / "s"), changed)


def test_saving_replaces_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    make_plan().save(path)
    make_plan(window=64).save(path)
    assert Plan.load(path).window == 64


def test_a_plan_is_read_from_a_larger_block() -> None:
    plan = make_plan(at_context=None)
    assert Plan.from_json({**plan.to_json(), "rope": None, "prefill_chunk": 512, "capacity": None}) == plan


@pytest.mark.parametrize("read", [Plan.from_json, CacheSpec.of])
def test_a_plan_that_evicts_is_refused(read: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(ValueError, match="convert again"):
        read({**make_plan().to_json(), "capacity": 24})


@pytest.mark.parametrize("kind", MAKERS)
def test_truncated_files_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    MAKERS[kind]().save(path)
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 9, len(whole) // 3, len(whole) - 17, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CorruptArtifactError):
            loader(kind)(path)


@pytest.mark.parametrize("kind", TENSOR_KINDS)
def test_a_flipped_bit_in_the_tensors_is_noticed(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    MAKERS[kind]().save(path)
    whole = path.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    for position in range(start, len(whole), 5):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(CorruptArtifactError):
            loader(kind)(path)


@pytest.mark.parametrize("kind", TENSOR_KINDS)
def test_a_flipped_bit_in_the_header_is_noticed_or_harmless(kind: str, tmp_path: Path) -> None:
    """Names, shapes, token counts and hashes stand there: a changed one must not be taken for the truth."""
    path = tmp_path / "artifact"
    artifact = MAKERS[kind]()
    artifact.save(path)
    whole = path.read_bytes()
    stop = 8 + struct.unpack("<Q", whole[:8])[0]
    wrong: list[str] = []
    for position in range(stop):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        try:
            assert_same(loader(kind)(path), artifact)
        except CorruptArtifactError:
            continue
        except (AssertionError, Exception) as error:
            wrong.append(f"{type(error).__name__} at ...{bytes(damaged[max(0, position - 12) : position + 8])!r}")
    assert not wrong, f"{len(wrong)} changes of {stop}, such as {wrong[:3]}"


@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=150)
def test_a_flipped_bit_in_a_plan_is_noticed_or_harmless(
    position: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "plan.json"
    make_plan().save(path)
    damaged = bytearray(path.read_bytes())
    damaged[position % len(damaged)] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        assert Plan.load(path) == make_plan()  # a flipped blank
    except CorruptArtifactError as error:
        assert str(path) in error.got and error.remedy


@pytest.mark.parametrize("saved", MAKERS)
@pytest.mark.parametrize("wanted", MAKERS)
def test_another_kind_is_refused(saved: str, wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    MAKERS[saved]().save(path)
    if saved == wanted:
        assert_same(loader(wanted)(path), MAKERS[saved]())
        return
    with pytest.raises(CorruptArtifactError):
        loader(wanted)(path)


@pytest.mark.parametrize("kind", TENSOR_KINDS)
def test_a_newer_version_says_to_upgrade(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    MAKERS[kind]().save(path)
    rewrite_header(path, lambda header: header.update(version=ARTIFACT_VERSION + 1))
    with pytest.raises(CorruptArtifactError, match="newer clla") as caught:
        loader(kind)(path)
    assert "upgrade" in caught.value.remedy


def test_a_newer_plan_says_to_upgrade(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"version": ARTIFACT_VERSION + 1, "layout": "unheard of"}))
    with pytest.raises(CorruptArtifactError, match="newer clla"):
        Plan.load(path)


@pytest.mark.parametrize("kind", TENSOR_KINDS)
@pytest.mark.parametrize("key", ("version", "kind", "sha256", "made_from"))
def test_a_header_without_a_field_is_refused(kind: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    MAKERS[kind]().save(path)
    rewrite_header(path, lambda header: header.pop(key))
    with pytest.raises(CorruptArtifactError):
        loader(kind)(path)


@pytest.mark.parametrize("key", [f.name for f in fields(Plan) if f.name not in NEWER] + ["version", "sha256"])
def test_a_plan_without_a_field_is_refused(key: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    make_plan().save(path)
    data = json.loads(path.read_text())
    del data[key]
    own = {k: v for k, v in data.items() if k != "sha256"}
    for changed in (data, own if key == "sha256" else {**own, "sha256": json_digest(own)}):
        path.write_text(json.dumps(changed))
        with pytest.raises(CorruptArtifactError):
            Plan.load(path)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(
    "content", [b"", b"not JSON", b"[1, 2]", b"\xff\xfe\x00", b"null", b"{}", b"[" * 10**5], ids=lambda c: repr(c[:9])
)
def test_other_files_are_refused(kind: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    path.write_bytes(content)
    with pytest.raises(CorruptArtifactError):
        loader(kind)(path)


@pytest.mark.parametrize("kind", TENSOR_KINDS)
def test_foreign_safetensors_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    for metadata in (None, {"format": "pt"}, {"clla": "not JSON"}, {"clla": "[]"}, {"clla": "{}"}):
        save_file({"mean": torch.zeros(2)}, path, metadata=metadata)
        with pytest.raises(CorruptArtifactError):
            loader(kind)(path)


@pytest.mark.parametrize("kind", MAKERS)
def test_missing_files_and_directories_are_refused(kind: str, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CorruptArtifactError):
            loader(kind)(path)


def test_json_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, '{"é": 1}')
    assert read_json(path) == {"é": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_digests_tell_parts_apart() -> None:
    assert digest("a", 1) == digest("a", 1)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    parts: list[tuple[Any, ...]] = [("a",), ("a", "b"), (["a", "b"],), ("ab",), (1,), ("1",), (None,), (0.5,)]
    assert len({digest(*p) for p in parts}) == len(parts)


@given(context=st.integers(0, 400), window=st.sampled_from((0, 1, 5, 32)), block=st.sampled_from((1, 4, 16)))
@settings(deadline=None, max_examples=60)
def test_bytes_at_equals_counting_token_by_token(context: int, window: int, block: int) -> None:
    exact = encoded = 0
    for _ in range(context):
        if window == 0:
            encoded += 1
            continue
        exact += 1
        if exact == window + block:  # a whole block leaves
            exact, encoded = exact - block, encoded + block
    assert encoded_slots(context, window, block) == encoded
    for source in ("group", "first"):
        plan = make_plan(window=window, flush_block=block, source=source)
        row = sum(RowLayout(group.tier_bits, 8).row_bytes for group in plan.groups)
        assert plan.row_bytes == row == (3 + 14) + 0 + (1 + 3)
        assert plan.source_bytes_per_token == 6 * 32 * 2
        buffer = window + block if window else 0
        assert exact <= buffer
        whole = (buffer + 4) * 384 + (buffer * row if source == "first" else 0)
        assert plan.exact_bytes == whole == exact_bytes_of(384, row, window, 4, block, source)
        newest, sinks = (buffer, 4) if encoded >= 2 * (block + 4) else (exact, min(4, encoded))
        exact_bytes = (newest + sinks) * 384 + (newest * row if source == "first" else 0)
        assert plan.bytes_at(context) == exact_bytes + encoded * row


def test_plan_sums_its_groups() -> None:
    plan = make_plan()
    assert plan.num_layers == 6 and plan.predicted_loss == 0.875
