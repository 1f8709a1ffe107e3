"""Checksums of a checkpoint's files, so that no damaged one is taken for whole.

They cover every byte that loading reads, weights included; hashing takes about a second a gigabyte and core, several
files at once. The model card and the pictures are left out: people edit the one, and nothing reads the others.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from clla.errors import CorruptArtifactError
from clla.storage.filenames import CHECKSUMS, CONFIG, MODEL_CARD
from clla.storage.files import json_digest, read_json, write_text

BASE_MODEL = "base_model"  # key of config.json that users may change, when the weights have moved
WEIGHTS = ("*.safetensors", "*.bin")  # as transformers prefers them


def write_checksums(folder: Path) -> None:
    """Write `clla_checksums.json` for the files of a finished checkpoint."""
    covered = sorted(path.name for path in folder.iterdir() if path.is_file() and is_covered(path.name))
    write_text(folder / CHECKSUMS, json.dumps({"sha256": _digests(folder, covered)}, indent=1))


def is_covered(name: str) -> bool:
    """Whether a file of a checkpoint has a checksum."""
    return name not in (CHECKSUMS, MODEL_CARD) and not name.endswith(".png") and "/" not in name


def known_checksums(folder: Path) -> dict[str, str]:
    """What `clla_checksums.json` names; empty where there is none."""
    path = folder / CHECKSUMS
    return dict(read_json(path)["sha256"]) if path.is_file() else {}


def check_files(folder: Path) -> bool:
    """Compare the files of a checkpoint with its checksums.

    Returns:
        False where there are no checksums: an earlier version wrote it, or someone changed it on purpose.

    Raises:
        CorruptArtifactError: a file is missing or differs.
    """
    if not (folder / CHECKSUMS).is_file():
        return False
    wanted = read_json(folder / CHECKSUMS).get("sha256")
    if not isinstance(wanted, dict) or any(Path(name).name != name for name in wanted):
        raise CorruptArtifactError(
            f"{folder / CHECKSUMS} holds no checksums",
            expected="a file written by clla",
            remedy="copy or download the checkpoint again",
        )
    lacking = [name for name in sorted(wanted) if not (folder / name).is_file()]
    if lacking:
        raise CorruptArtifactError(
            f"{folder} lacks {', '.join(lacking)}",
            expected=f"the files that {CHECKSUMS} lists",
            remedy="copy or download the checkpoint again",
        )
    found = _digests(folder, sorted(wanted))
    changed = [name for name in sorted(wanted) if found[name] != wanted[name]]
    if changed:
        raise CorruptArtifactError(
            f"{', '.join(changed)} in {folder} does not have the checksum that {CHECKSUMS} names",
            expected="files as clla wrote them",
            remedy="copy or download the checkpoint again; if you changed it on purpose, remove its line there",
        )
    return True


def base_checksums(folder: Path, gguf_file: str | None) -> dict[str, str]:
    """Checksums of the config and the weights of a model, for a checkpoint that holds the codec alone."""
    if gguf_file:
        return _digests(folder, [gguf_file])
    found = (sorted(path.name for path in folder.glob(pattern)) for pattern in WEIGHTS)
    return _digests(folder, [CONFIG, *next((names for names in found if names), [])])


def check_base(folder: Path, wanted: dict[str, str], name: str) -> None:
    """Compare a base model with the checksums that the codec's checkpoint holds of it.

    Raises:
        CorruptArtifactError: it is another model, or damaged.
    """
    present = [file for file in sorted(wanted) if (folder / file).is_file()]
    found = _digests(folder, present)
    changed = [file for file in sorted(wanted) if found.get(file) != wanted[file]]
    if changed:
        raise CorruptArtifactError(
            f"the base model {name!r} is not the one that the codec was made for, or damaged: "
            f"{', '.join(changed)} does not have the checksum that the codec's config names",
            expected="the model that was converted, unchanged",
            remedy="put it there again, or convert this one",
        )


def _digests(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: file_digest(folder / name), names), strict=True))


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes; of a converted config, of its contents without the base model's place."""
    if path.name == CONFIG:
        return _config_digest(read_json(path))
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def bytes_digest(name: str, data: bytes) -> str:
    """The same, of what a file is going to hold."""
    return _config_digest(json.loads(data)) if name == CONFIG else hashlib.sha256(data).hexdigest()


def _config_digest(data: dict[str, Any]) -> str:
    if isinstance(base := data.get(BASE_MODEL), dict):
        data = data | {BASE_MODEL: {k: v for k, v in base.items() if k != "path"}}
    return json_digest(data)
