"""What of a checkpoint leaves the machine: which files, and what they say without the places of this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml

from clla.checkpoint.checksums import BASE_MODEL, bytes_digest, file_digest, is_covered, known_checksums
from clla.errors import CllaError, CorruptArtifactError
from clla.hub.commits import COMMIT
from clla.modeling.modeling_clla import CODEC_FILE
from clla.publish.base_model import HubModel
from clla.publish.card import retargeted
from clla.recipe import to_yaml
from clla.storage.filenames import CHECKSUMS, CONFIG, GENERATION_CONFIG, MODEL_CARD, RECIPE, REPORT, TOKENIZER_CONFIG
from clla.storage.files import read_json

# Whatever else lies in the folder stays there.
OURS = (
    CONFIG, GENERATION_CONFIG, "clla_*", "*_clla.py", "*.safetensors", "*.safetensors.index.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*", "merges.txt", "*.model",
    "additional_chat_templates/*.jinja", MODEL_CARD, "*.png", "LICENSE*", "NOTICE*",
)  # fmt: skip
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
REPLACED = (*WEIGHT_FILES, "*_clla.py", "clla_*")  # those of an earlier push go when a new one has them no more
TEXT = (".json", ".md", ".py", ".yaml", ".jinja", ".txt", "")
DATA_FILES = (".txt", ".jsonl", ".json", ".parquet", ".xz", ".gz")
TOKENIZER_PATHS = ("name_or_path", "_name_or_path", "tokenizer_file", "vocab_file")


@dataclass
class Outgoing:
    """Attributes: files: by name, on disk or as bytes; left_out: why, by name; base: that a codec alone stands on."""

    files: dict[str, Path | bytes] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    base: HubModel | None = None

    def size(self, name: str) -> int:
        held = self.files[name]
        return len(held) if isinstance(held, bytes) else held.stat().st_size

    @property
    def total(self) -> int:
        return sum(self.size(name) for name in self.files)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path fits one of the patterns, whose `*` stays in one directory."""
    return any(name.count("/") == pattern.count("/") and fnmatch(name, pattern) for pattern in patterns)


def gather(folder: Path, repo_id: str, base: HubModel | None, *, alone: bool) -> Outgoing:
    """The files to send.

    Args:
        folder: of a whole checkpoint.
        repo_id: where they go.
        base: the source on the Hub, if it is known.
        alone: the codec without weights.

    Raises:
        CllaError: the weights were trained, so that the codec cannot do without them; or a file that is not clla's
            names a place of this machine.
        CorruptArtifactError: the codec is damaged.
    """
    found = Outgoing(base=base if alone else None)
    covered = known_checksums(folder)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in covered or matches(name, OURS):
            found.files[name] = path
        elif "/" in name:
            found.left_out[f"{name.split('/')[0]}/"] = "no part of a checkpoint"
        else:
            found.left_out[name] = "no part of a checkpoint"
    config: dict[str, Any] = read_json(folder / CONFIG)
    if alone and config.get(BASE_MODEL) is None:
        _leave_weights(found, folder, config)
    if alone:
        assert base is not None
        config[BASE_MODEL] = {**(config.get(BASE_MODEL) or {"gguf_file": base.gguf_file}), "path": base.repo}
        config[BASE_MODEL]["hub_revision"] = base.commit
        if base.sha256 is not None:
            config[BASE_MODEL]["sha256"] = base.sha256
    places = _Places(base)
    places.clean_files(found, folder, config)
    places.clean_card(found, folder, repo_id)
    places.check(found, folder)
    changed = {n: bytes_digest(n, d) for n, d in found.files.items() if isinstance(d, bytes) and is_covered(n)}
    if covered:
        sums = {name: covered[name] for name in found.files if name in covered}
    else:
        sums = {n: file_digest(p) for n, p in found.files.items() if isinstance(p, Path) and is_covered(n)}
    data = {"sha256": dict(sorted((sums | changed).items()))}
    found.files[CHECKSUMS] = json.dumps(data, indent=1).encode()
    return found


def _leave_weights(found: Outgoing, folder: Path, config: dict[str, Any]) -> None:
    """Take the codec out of a checkpoint's weights, and leave these behind."""
    from safetensors import safe_open
    from safetensors.torch import save

    from clla.modeling.quantize_clla import tensor_digest

    trained = config["clla"].get("healed")
    if trained not in (None, "codec"):
        raise CllaError(
            f"the weights of {folder} were trained ({trained}): its codec alone does not make the same model",
            expected="a checkpoint whose weights are its source's",
            remedy="leave out --codec-only; or heal with --train codec",
        )
    codec: dict[str, Any] = {}
    for name in [name for name in found.files if matches(name, WEIGHT_FILES)]:
        if name.endswith(".safetensors"):
            with safe_open(folder / name, framework="pt") as tensors:
                wanted = [key for key in tensors.keys() if key.startswith("codec.")]  # noqa: SIM118
                codec |= {key.removeprefix("codec."): tensors.get_tensor(key) for key in wanted}
        del found.files[name]
        found.left_out[name] = "weights, which the base model has"
    if tensor_digest(codec) != config["clla"].get("codec_sha256"):
        raise CorruptArtifactError(
            f"the codec in {folder} does not have the checksum that its config names",
            expected="a checkpoint as clla wrote it",
            remedy="copy or download it again",
        )
    found.files[CODEC_FILE] = save(codec, metadata={"format": "pt"})


class _Places:
    """Takes places of this machine out of what is sent: the Hub id takes their place where one is known."""

    def __init__(self, base: HubModel | None) -> None:
        self.base = base
        self.seen: dict[str, str] = {}  # what was taken out, and what stands there now

    def clean_files(self, found: Outgoing, folder: Path, config: dict[str, Any]) -> None:
        """Config, recipe, report and what the tokenizer notes."""
        recipe = yaml.safe_load((folder / RECIPE).read_text("utf-8")) if RECIPE in found.files else {}
        provenance = recipe.get("provenance") or {}
        if provenance:
            self._name_source(provenance)
        self._replace(found, RECIPE, recipe, self.clean(recipe), _yaml)
        self._replace(found, CONFIG, read_json(folder / CONFIG), self.clean(config), _json(2))
        for name, indent in ((GENERATION_CONFIG, 2), (REPORT, 1)):
            if name in found.files:
                data = read_json(folder / name)
                self._replace(found, name, data, self.clean(data), _json(indent))
        if TOKENIZER_CONFIG in found.files:  # of its other strings some are text that only looks like a path
            data = read_json(folder / TOKENIZER_CONFIG)
            paths = {key: self.clean(value, key) for key, value in data.items() if key in TOKENIZER_PATHS}
            self._replace(found, TOKENIZER_CONFIG, data, data | paths, _json(2))

    def _replace(self, found: Outgoing, name: str, before: Any, after: Any, written: Callable[[Any], bytes]) -> None:
        if name in found.files and before != after:
            found.files[name] = written(after)

    def _name_source(self, provenance: dict[str, Any]) -> None:
        """Note all ways in which the source's place may be written."""
        name = provenance["model"]
        on_hub = COMMIT.fullmatch(provenance["revision"]) is not None
        if not on_hub and (_is_absolute(name) or name.startswith(".") or ("/" in name and Path(name).exists())):
            whole = str(Path(name).expanduser().resolve())
            self.seen |= {name: self._instead(name), whole: self._instead(name)}

    def _instead(self, place: str) -> str:
        return self.base.repo if self.base is not None else f"{_last(place)} (local)"

    def clean(self, data: Any, key: str = "") -> Any:
        """A copy without places."""
        if isinstance(data, dict):
            cleaned = {k: self.clean(v, k) for k, v in data.items()}
            if key == "provenance" and self.base is not None and cleaned.get("model") == self.base.repo:
                cleaned["revision"] = self.base.commit or cleaned["revision"]
            return cleaned
        if isinstance(data, list):
            return [self.clean(value, key) for value in data]
        if not isinstance(data, str):
            return data
        if data in self.seen:
            return self.seen[data]
        if key == "dataset":
            beside = "/" in data and (Path(data).suffix in DATA_FILES or Path(data).exists())
            if not beside and not _is_absolute(data):
                return data
            self.seen[data] = _last(data)
        elif _is_absolute(data) and "\n" not in data:
            is_source = key in ("model", "path", "_name_or_path", "name_or_path")
            self.seen[data] = self._instead(data) if is_source else _last(data)
        else:
            return data
        return self.seen[data]

    def clean_card(self, found: Outgoing, folder: Path, repo_id: str) -> None:
        """Places in the card, and its examples, which load the model from where it lies now."""
        if MODEL_CARD not in found.files:
            return
        before = text = (folder / MODEL_CARD).read_text("utf-8")
        for place in sorted(self.seen, key=len, reverse=True):
            instead = self.seen[place].replace("\\", r"\\")
            text = re.sub(rf"(?<![\w./~-]){re.escape(place)}(?![\w-])", instead, text)
        text = retargeted(text, repo_id)
        text = text.replace(str(folder), folder.name)
        if text != before:
            found.files[MODEL_CARD] = text.encode()

    def check(self, found: Outgoing, folder: Path) -> None:
        """What nobody expected to name a place is not sent.

        Raises:
            CllaError: it does.
        """
        places = [place.encode() for place in (*self.seen, str(folder)) if _is_absolute(place)]
        for name, held in found.files.items():
            if Path(name).suffix in TEXT and name != CHECKSUMS:
                data = held if isinstance(held, bytes) else held.read_bytes()
                for place in places:
                    if place in data:
                        raise CllaError(
                            f"{name} names {place.decode()}, a place on this machine",
                            expected="files that name none",
                            remedy="take it out, or move the file elsewhere",
                        )


def _is_absolute(text: str) -> bool:
    """A path from the root, the home directory or a drive, with something below it."""
    return re.match(r"(/|~[\w.-]*/|[A-Za-z]:[\\/])[^/\\\s]", text) is not None


def _last(path: str) -> str:
    """Last part of a path, whichever way its slashes lean."""
    return PureWindowsPath(path).name


def _yaml(data: dict[str, Any]) -> bytes:
    return to_yaml(data).encode()


def _json(indent: int) -> Callable[[Any], bytes]:
    return lambda data: (json.dumps(data, indent=indent, ensure_ascii=False) + "\n").encode()
