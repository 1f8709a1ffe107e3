"""JSON and safetensors files with versions and checksums, written beside their place and renamed."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clla.errors import CorruptArtifactError
from clla.modeling.quantize_clla import tensor_digest
from clla.storage.places import writing

ARTIFACT_VERSION = 1


def mistakes_in(error: ValidationError) -> str:
    """Where something is wrong and what, one after the other."""
    return "; ".join(f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors())


def digest(*parts: Any) -> str:
    """Hex digest (16 characters) of JSON-serialisable parts."""
    return json_digest(parts)[:16]


def json_digest(data: Any) -> str:
    """SHA-256 of what is JSON-serialisable; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that a reader never sees half of it.

    Raises:
        CllaError: the system refused to write.
    """
    with _replacing(path, len(text)) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def _replacing(path: Path, size: int) -> Iterator[Path]:
    """A file of a name of its own beside `path`, about `size` bytes, which takes its place if the block ends well."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with writing(path, needed=size):
            yield partial
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CorruptArtifactError: the file is missing or not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, str(error)) from error
    if not isinstance(data, dict):
        raise damaged(path, f"it holds a {type(data).__name__}, not an object")
    return data


def save_verified(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any] | None = None) -> None:
    """Write tensors with a checksum over them and `meta`, beside their place, and rename the file.

    Raises:
        CllaError: the system refused to write.
    """
    header = dict(meta or {})
    header["sha256"] = _checksum(header, tensors)
    with _replacing(path, sum(tensor.nbytes for tensor in tensors.values())) as partial:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"clla": json.dumps(header)})
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())


def load_verified(path: Path) -> dict[str, Tensor]:
    """Tensors that `save_verified` wrote.

    Raises:
        CorruptArtifactError: the file is missing, damaged or something else.
    """
    header, tensors = _read(path)
    _verify(path, header, tensors)
    return tensors


def save_tensors(path: Path, tensors: dict[str, Tensor], kind: str, meta: dict[str, Any]) -> None:
    """Write tensors of some kind with their version and a checksum."""
    save_verified(path, tensors, {"kind": kind, "version": ARTIFACT_VERSION, **meta})


def load_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote: tensors and `meta`.

    Raises:
        CorruptArtifactError: the file is missing, damaged, of another kind, or newer.
    """
    header, tensors = _read(path)
    meta = _meta(path, header, kind)
    _verify(path, header, tensors)
    return tensors, meta


def read_header(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """`meta` and the shapes of the tensors, which are not read.

    Raises:
        CorruptArtifactError: the file is missing, of another kind, or newer.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("clla", "{}"))
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise damaged(path, str(error)) from error
    return _meta(path, header, kind), shapes


def _meta(path: Path, header: dict[str, Any], kind: str) -> dict[str, Any]:
    check_version(path, header.get("version"))
    if header.get("kind") != kind:
        raise damaged(path, f"it is no {kind} file")
    return {k: v for k, v in header.items() if k not in ("kind", "version", "sha256")}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("clla", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise damaged(path, str(error)) from error
    if not isinstance(header, dict):
        raise damaged(path, "its header is no object")
    return header, tensors


def _verify(path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    own = {k: v for k, v in header.items() if k != "sha256"}
    if header.get("sha256") != _checksum(own, tensors):
        raise damaged(path, "its checksum does not match its contents")


def _checksum(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    text = json.dumps(header, sort_keys=True) + tensor_digest(tensors)
    return hashlib.sha256(text.encode()).hexdigest()


def check_version(path: Path, version: Any) -> None:
    """Refuse a file without a version, or of a newer one.

    Raises:
        CorruptArtifactError: it cannot be read.
    """
    if not isinstance(version, int):
        raise damaged(path, "it names no version")
    if version > ARTIFACT_VERSION:
        raise CorruptArtifactError(
            f"{path} was written by a newer clla (version {version})",
            expected=f"version {ARTIFACT_VERSION} or older",
            remedy="upgrade with: pip install -U clla",
        )


def damaged(path: Path, why: str) -> CorruptArtifactError:
    """The error of a file of ours that cannot be read, for the reason `why`."""
    return CorruptArtifactError(
        f"{path} cannot be read: {why}",
        expected="a file written by clla",
        remedy="delete it and run the conversion again, or copy it again from where it came",
    )


def tensors_of(artifact: Any) -> dict[str, Tensor]:
    """The tensors among an object's attributes, contiguous, by name."""
    return {k: v.contiguous() for k, v in vars(artifact).items() if isinstance(v, Tensor)}
