"""Damaged, cut, swapped and missing files: always an error that says what to do, never another model than was saved."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, pico
from helpers import clla
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from clla.checkpoint.checksums import check_files
from clla.checkpoint.load import Checkpoint, load_checkpoint
from clla.checkpoint.write import finished_directory, write_checkpoint
from clla.errors import CllaError, CorruptArtifactError
from clla.heal.text import healing_text
from clla.recipe import HealConfig
from clla.recipes import builtin_recipes
from clla.storage.filenames import CHECKSUMS
from clla.storage.files import read_json

SMALL = ["--calibration-tokens", "1024", "--sequence-length", "128", "--budget-context", "512", "--exact-window", "16",
         "--kv-budget", "25%", "--no-eval"]  # fmt: skip
CPU = torch.device("cpu")
ORIGINALS = ("whole", "sharded", "adapter", "base")
UNCOVERED = ("README.md", "clla_plan.png")  # edited by people; read by nobody


@pytest.fixture(scope="module")
def made(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and of it a whole checkpoint, one in several files, and one with the codec alone."""
    folder = tmp_path_factory.mktemp("made")
    pico().save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    for name, options in (("whole", []), ("adapter", ["--codec-only"])):
        done = clla("convert", folder / "base", "-o", folder / name, "--dataset", text_file, *SMALL, *options)
        assert done.exit_code == 0, done.stderr
    loaded = load_checkpoint(str(folder / "whole"), device=CPU)
    with finished_directory(folder / "sharded") as out:
        write_checkpoint(out, loaded.model, loaded.tokenizer, base_model=None, max_shard_size="300KB")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def copies(made: Path, tmp_path: Path) -> Path:
    """Copies of all four; the codec-only one stands on the copied base."""
    for name in ORIGINALS:
        shutil.copytree(made / name, tmp_path / name)
    config = read_json(tmp_path / "adapter" / "config.json")
    config["base_model"]["path"] = str(tmp_path / "base")  # people may say where the base is now
    (tmp_path / "adapter" / "config.json").write_text(json.dumps(config))
    return tmp_path


def loaded(folder: Path) -> Checkpoint:
    return load_checkpoint(str(folder), device=CPU)


def flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << (bit % 8)
    return bytes(damaged)


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "empty": lambda data, dice: b"",
    "cut in the middle": lambda data, dice: data[: len(data) // 2],
    "last byte missing": lambda data, dice: data[:-1],
    "a byte too many": lambda data, dice: data + b"\0",
    "another type": lambda data, dice: b"\x89PNG\r\n\x1a\n" + data,
    "zeros": lambda data, dice: bytes(len(data)),
    "first bit": lambda data, dice: flipped(data, 0),
    "some bit": lambda data, dice: flipped(data, dice.randrange(8 * len(data))),
    "another bit": lambda data, dice: flipped(data, dice.randrange(8 * len(data))),
}


@pytest.mark.parametrize("kind", ["whole", "sharded", "adapter"])
def test_whole_checkpoints_load(kind: str, copies: Path) -> None:
    """What follows would prove little if these did not."""
    first, second = loaded(copies / kind), loaded(copies / "whole")
    for (name, a), (_, b) in zip(first.model.state_dict().items(), second.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert check_files(copies / kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "sharded", "adapter"])
def test_damage_to_any_file_is_noticed(kind: str, copies: Path) -> None:
    dice, folder = random.Random(0), copies / kind
    covered = sorted(path for path in folder.iterdir() if path.name not in UNCOVERED)
    assert {"config.json", "tokenizer.json", CHECKSUMS} < {path.name for path in covered}
    for path in covered:
        whole = path.read_bytes()
        for name, damage in DAMAGES.items():
            damaged = damage(whole, dice)
            path.write_bytes(damaged)
            if path.name in ("config.json", CHECKSUMS) and _same_json(damaged, whole):
                assert loaded(folder)  # only a blank has changed
                continue
            with pytest.raises(CllaError) as caught:
                loaded(folder)
            assert path.name in str(caught.value) or folder.name in str(caught.value), (path.name, name)
        path.unlink()
        if path.name != CHECKSUMS:
            with pytest.raises(CllaError):
                loaded(folder)
        path.write_bytes(whole)
    assert loaded(folder)


def _same_json(a: bytes, b: bytes) -> bool:
    try:
        return bool(json.loads(a) == json.loads(b))
    except ValueError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "sharded", "adapter", "base"])
def test_one_flipped_bit_in_any_weight_is_noticed(kind: str, copies: Path) -> None:
    """In the payload of every tensor, the lowest bit of a mantissa too; for a codec alone also in its base model."""
    dice, tensors = random.Random(1), 0
    opened = copies / ("adapter" if kind == "base" else kind)
    for path in sorted((copies / kind).glob("*.safetensors")):
        whole = path.read_bytes()
        header = int.from_bytes(whole[:8], "little")
        for name, entry in json.loads(whole[8 : 8 + header]).items():
            if name == "__metadata__":
                continue
            start, stop = (8 + header + offset for offset in entry["data_offsets"])
            tensors += 1
            for bit in (8 * start, dice.randrange(8 * start, 8 * stop)):
                path.write_bytes(flipped(whole, bit))
                with pytest.raises(CorruptArtifactError, match="checksum"):
                    loaded(opened)
        path.write_bytes(whole)
    source, codec = 39, 4 * len(json.loads((opened / "config.json").read_text())["clla"]["groups"])
    assert tensors == {"whole": source + codec, "sharded": source + codec, "adapter": codec, "base": source}[kind]
    assert loaded(opened)


@pytest.mark.parametrize("name", UNCOVERED)
def test_the_card_may_be_edited(name: str, copies: Path) -> None:
    (copies / "whole" / name).write_text("changed")
    assert loaded(copies / "whole")


def test_changes_on_purpose_are_possible(copies: Path) -> None:
    """As the error says: without its line a file is not checked any longer."""
    folder = copies / "whole"
    generation = read_json(folder / "generation_config.json")
    (folder / "generation_config.json").write_text(json.dumps({**generation, "temperature": 0.5}))
    with pytest.raises(CorruptArtifactError, match="remove its line"):
        loaded(folder)
    checksums = read_json(folder / CHECKSUMS)
    del checksums["sha256"]["generation_config.json"]
    (folder / CHECKSUMS).write_text(json.dumps(checksums))
    assert loaded(folder).model.generation_config.temperature == 0.5


def test_swapped_files_are_noticed(copies: Path) -> None:
    sharded = copies / "sharded"
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    with pytest.raises(CorruptArtifactError):
        loaded(sharded)
    (copies / "whole" / "config.json").write_bytes((copies / "adapter" / "config.json").read_bytes())
    with pytest.raises(CllaError):
        loaded(copies / "whole")
    weights = load_file(copies / "adapter" / "clla_codec.safetensors")
    save_file({k: v * 2 for k, v in weights.items()}, copies / "adapter" / "clla_codec.safetensors")
    with pytest.raises(CorruptArtifactError):
        loaded(copies / "adapter")


def test_another_base_model_of_the_same_shape_is_refused(copies: Path) -> None:
    pico(seed=7).save_pretrained(copies / "base")
    with pytest.raises(CorruptArtifactError, match="not the one that the codec was made for"):
        loaded(copies / "adapter")
    result = clla("generate", copies / "adapter", "--prompt", "x", "--max-new-tokens", "2")
    assert result.exit_code == 1 and "base model" in result.stderr


def test_another_rope_in_the_base_models_config_is_refused(copies: Path) -> None:
    config = read_json(copies / "base" / "config.json")
    config["rope_parameters"]["rope_theta"] = 20000.0
    (copies / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptArtifactError, match=r"config\.json"):
        loaded(copies / "adapter")


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_configs_of_checkpoints_without_checksums_never_escape_as_another_error(kind: str, copies: Path) -> None:
    """Those that earlier versions wrote. Flipped bits and values of other types: an error of ours, or a model."""
    dice, folder = random.Random(2), copies / kind
    (folder / CHECKSUMS).unlink()
    path = folder / "config.json"
    whole, errors = path.read_bytes(), 0
    damaged = [flipped(whole, dice.randrange(8 * len(whole))) for _ in range(25)]
    odd = (None, [], {}, "x", -1, 10**30)
    config = json.loads(whole)
    for place in (config, config["clla"], config["text_config"]):
        for key in ("clla", "text_config", "model_type", "groups", "kv", "kv_dtype", "tier_size", "hidden_size"):
            if key in place:
                own, place[key] = place[key], dice.choice(odd)
                damaged.append(json.dumps(config).encode())
                place[key] = own
    for text in damaged:
        path.write_bytes(text)
        try:
            assert isinstance(loaded(folder), Checkpoint)
        except CllaError:
            errors += 1
    assert errors > len(damaged) // 3


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", CHECKSUMS])
@pytest.mark.parametrize("damage", ["empty", "cut in the middle", "another type"])
def test_the_command_line_says_what_to_do(name: str, damage: str, copies: Path) -> None:
    path = copies / "whole" / name
    path.write_bytes(DAMAGES[damage](path.read_bytes(), random.Random(3)))
    for command in (["generate", copies / "whole", "--prompt", "x"], ["eval", copies / "whole", "--num-samples", "1"],
                    ["heal", copies / "whole"]):  # fmt: skip
        result = clla(*command)
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
        assert "Error:" in result.stderr and "remedy:" in result.stderr and "Traceback" not in result.output
    assert not (copies / "whole-healed").exists()


def test_damaged_recipes_are_usage_errors(copies: Path) -> None:
    recipe, dice = copies / "recipe.yaml", random.Random(4)
    whole = builtin_recipes()["compact"].read_bytes()
    texts = [b"", b"\xff\xfe", b"- a", b"when: 2024-13-45", b"calibration: {tokens: " + b"9" * 5000 + b"}", b"[" * 3000]
    texts += [b"plan: {bits: [yes]}", b"heal: {codec_lr: .inf}", b"schema_version: 99", whole[: len(whole) // 2 + 3]]
    for text in [*texts, bytes(dice.randrange(256) for _ in range(200))]:
        recipe.write_bytes(text)
        result = clla("convert", copies / "base", "-o", copies / "out", "--recipe", recipe, "--dry-run")
        assert result.exit_code == 2 and "Error:" in result.stderr and "Traceback" not in result.output, text[:40]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["empty", "cut in the middle", "another type", "zeros"])
def test_sources_that_cannot_be_read(name: str, damage: str, copies: Path, text_file: Path) -> None:
    path = copies / "base" / name
    path.write_bytes(DAMAGES[damage](path.read_bytes(), random.Random(5)))
    result = clla("convert", copies / "base", "-o", copies / "out", "--dataset", text_file, *SMALL)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    assert "Error:" in result.stderr and "remedy:" in result.stderr
    assert not (copies / "out").exists()


def test_stages_kept_of_another_run_are_not_taken_up(copies: Path, text_file: Path) -> None:
    """Files of one work directory under the names of another: computed again, with the same result."""
    common = ["convert", copies / "base", "-o", copies / "out", "--dry-run", "--json", "--dataset", text_file, *SMALL]
    first = json.loads(clla(*common, "--work-dir", copies / "first").stdout)
    clla(*common, "--work-dir", copies / "second", "--seed", "5")
    for kind in ("stats-*", "plan-*", "codec-*"):
        (mine,), (other,) = (copies / "first").glob(kind), (copies / "second").glob(kind)
        assert mine.name != other.name
        shutil.copyfile(other, mine)
    again = clla(*common, "--work-dir", copies / "first")
    assert json.loads(again.stdout)["plan"] == first["plan"]
    assert again.stderr.count("was made from something else") == 3


def test_a_source_that_changed_in_the_middle_is_calibrated_on_again(copies: Path, text_file: Path) -> None:
    """Two fine-tuned models often share the size and both ends of their files."""
    common = ["convert", copies / "base", "-o", copies / "out", "--dry-run", "--json", "--dataset", text_file, *SMALL]
    first = json.loads(clla(*common, "--work-dir", copies / "work").stdout)
    path = copies / "base" / "model.safetensors"
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    tensors[names[len(names) // 2]] *= 1.5
    ends = path.read_bytes()[: 1 << 16], path.read_bytes()[-(1 << 16) :]
    save_file(tensors, path, metadata={"format": "pt"})
    assert ends == (path.read_bytes()[: 1 << 16], path.read_bytes()[-(1 << 16) :])
    second = json.loads(clla(*common, "--work-dir", copies / "work").stdout)
    assert second["plan"]["made_from"] != first["plan"]["made_from"]


@pytest.mark.parametrize("damage", ["empty", "cut in the middle", "last byte missing", "zeros", "some bit"])
def test_damaged_text_of_healing_is_packed_again(damage: str, text_file: Path, tmp_path: Path) -> None:
    tokenizer, model = byte_tokenizer(), pico()
    config = HealConfig(dataset=str(text_file), tokens=2048, sequence_length=64)
    first = healing_text(config, model, tokenizer, tmp_path)
    (path,) = tmp_path.glob("text-*")
    path.write_bytes(DAMAGES[damage](path.read_bytes(), random.Random(6)))
    for _ in range(2):
        again = healing_text(config, model, tokenizer, tmp_path)
        assert all(map(torch.equal, first, again))
