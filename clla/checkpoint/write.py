"""Write a converted checkpoint: an ordinary HF directory with the modeling code beside the weights.

Everything is written into a partial directory that takes the final name only when it is complete.
"""

from __future__ import annotations

import copy
import glob
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from transformers.dynamic_module_utils import custom_object_save

from clla.checkpoint.checksums import known_checksums, write_checksums
from clla.errors import CllaError, UsageError
from clla.modeling.modeling_clla import CODEC_FILE, CllaForCausalLM
from clla.modeling.quantize_clla import tensor_digest
from clla.storage.filenames import (
    CHECKSUMS,
    EXPORT_REPORT,
    HEALING_PICTURE,
    MODEL_CARD,
    PLAN_PICTURE,
    QUALITY_PICTURE,
    REPORT,
)
from clla.storage.places import check_writable, writing

UNLISTED = (MODEL_CARD, PLAN_PICTURE, QUALITY_PICTURE, HEALING_PICTURE, "__pycache__")  # have no checksums
PARTIAL, OLD = ".partial", ".old"  # of directories beside the output, with a random part before
KEPT = ("stats-*", "plan-*", "codec-*", "spectra-*", "heal", "spill", "offload-*")  # in a work directory
FREE_SPACE_MARGIN = 1.1


@dataclass(frozen=True)
class RunOptions:
    """How a checkpoint is made, as against what it becomes.

    Attributes:
        output: its directory.
        device: `auto`, `cpu`, `cuda`, …
        overwrite: replace a directory that is not empty.
        resume: take up the finished stages of an interrupted run.
        work_dir: where parts of the run are kept; kept after the run if given.
        report: measure before and after.
        tracker: of accelerate, for healing.
    """

    output: Path
    device: str = "auto"
    overwrite: bool = False
    resume: bool = False
    work_dir: Path | None = None
    report: bool = True
    tracker: str | None = None

    @property
    def work(self) -> Path:
        """Where parts of the run are kept."""
        return self.work_dir or self.output.with_name(self.output.name + ".work")


def check_output(path: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse an output directory that cannot be written, or that holds something; nothing is read for it.

    Args:
        path: of the output.
        source: of the model that is converted, a directory or a file, if it is on this machine.
        overwrite: replace an earlier conversion.

    Raises:
        UsageError: it is a file, is or holds the source, cannot be written, or is not empty and `overwrite` was not
            given or would remove something that clla did not write.
    """
    own, model = path.resolve(), source.resolve()
    if source.exists() and own in (model, *model.parents):
        raise UsageError(
            f"{path} {'is' if own == model else 'holds'} the source {source}, which would be replaced",
            expected="a directory without the source",
            remedy="choose another --output",
        )
    if path.is_file():
        raise UsageError(f"{path} is a file", expected="a directory to write to", remedy="choose another --output")
    if path.is_mount():
        raise UsageError(
            f"{path} is where a disk is mounted, which cannot be replaced by a finished directory",
            expected="a directory",
            remedy=f"choose one in it: --output {path / 'model'}",
        )
    check_writable(path, "--output")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{path} is not empty", expected="a new or empty directory", remedy="pass --overwrite")
    if foreign := _foreign(path):
        raise UsageError(
            f"{path} holds something that clla did not write: {foreign}",
            expected="a checkpoint of an earlier conversion, for --overwrite to replace",
            remedy="choose another --output, or move it away yourself",
        )


def check_work_dir(work: Path | None, output: Path) -> None:
    """Refuse a work directory in the output, with which it would be replaced, or one that cannot be written to.

    Raises:
        UsageError: it is so.
    """
    if work is None:
        return
    own = work.resolve()
    if output.resolve() in (own, *own.parents):
        raise UsageError(
            f"--work-dir {work} lies in the output {output}",
            expected="a directory apart from it",
            remedy="choose another --work-dir",
        )
    if work.is_file():
        raise UsageError(f"--work-dir {work} is a file", expected="a directory", remedy="choose another --work-dir")
    check_writable(work / "stats", "--work-dir")


def check_kept(work: Path) -> None:
    """A directory of the name that a run would take, and delete, must be of an earlier run.

    Raises:
        UsageError: something else lies in it.
    """
    foreign = [file.name for file in work.iterdir() if not any(map(file.match, KEPT))]
    if foreign:
        raise UsageError(
            f"{work}, where this run would keep its parts, holds something that clla did not write: {min(foreign)}",
            expected="no such directory, or that of an unfinished run",
            remedy="choose another --output, or name a --work-dir",
        )


def _foreign(folder: Path) -> str | None:
    """A name in a directory that is not of a checkpoint or an export of ours."""
    names = sorted(file.name for file in folder.iterdir())
    if REPORT not in names and EXPORT_REPORT not in names:
        return names[0]
    listed = known_checksums(folder)
    ours = {*listed, CHECKSUMS, *UNLISTED}
    return next((name for name in names if listed and name not in ours), None)


def check_disk(path: Path, needed: int, *, instead: str = "save the codec alone with --codec-only") -> None:
    """Refuse to start what cannot be finished.

    Args:
        path: to write to.
        needed: bytes.
        instead: what needs less.

    Raises:
        CllaError: fewer bytes are free than `needed` with a margin.
    """
    parent = next(p for p in (path, *path.parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed * FREE_SPACE_MARGIN:
        raise CllaError(
            f"{parent} has {free / 1e9:.2f} GB free",
            expected=f"about {needed * FREE_SPACE_MARGIN / 1e9:.2f} GB",
            remedy=f"free some space, choose another --output, or {instead}",
        )


def check_room(needed: dict[Path, int]) -> None:
    """`check_disk` of several places, of which some may lie on the same disk.

    Args:
        needed: bytes by path.
    """
    disks: dict[int, list[Path]] = {}
    for path in needed:
        parent = next(p for p in (path, *path.parents) if p.exists())
        disks.setdefault(parent.stat().st_dev, []).append(path)
    for paths in disks.values():
        check_disk(paths[0], sum(needed[path] for path in paths))


def check_memory(needed: int) -> None:
    """Refuse a model whose moments do not fit.

    Raises:
        CllaError: more bytes are needed than the machine has free.
    """
    free = psutil.virtual_memory().available
    if needed > free:
        raise CllaError(
            f"the moments of this model take about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free",
            expected="a model with grouped heads, or smaller groups: memory grows with (values per token and layer)²",
            remedy="lower --max-layers-per-group, or use a machine with more memory",
        )


@contextmanager
def finished_directory(path: Path, *, needed: int | None = None) -> Iterator[Path]:
    """A partial directory beside `path` that gets checksums and replaces it once the block ends without an error.

    Args:
        path: held by this run alone (`clla.storage.places.holding`).
        needed: bytes that are going to be written, for the message where that fails.

    Raises:
        CllaError: the system refused to write.
    """
    name = secrets.token_hex(4)
    partial, old = (path.with_name(f"{path.name}.{name}{suffix}") for suffix in (PARTIAL, OLD))
    try:
        with writing(path, needed=needed):
            partial.mkdir(parents=True)
            yield partial
            write_checksums(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():
        os.replace(path, old)
    os.replace(partial, path)
    shutil.rmtree(old, ignore_errors=True)


def tidy(path: Path) -> None:
    """Remove what a killed run left beside `path`, and put back what it was about to replace.

    Args:
        path: held by this run alone.
    """
    for left in path.parent.glob(f"{glob.escape(path.name)}.*"):
        if re.fullmatch(rf"\.[0-9a-f]{{8}}({re.escape(PARTIAL)}|{re.escape(OLD)})", left.name[len(path.name) :]):
            if left.suffix == OLD and not path.exists():
                os.replace(left, path)
            else:
                shutil.rmtree(left)


def write_checkpoint(
    folder: Path,
    model: CllaForCausalLM,
    tokenizer: Any,
    *,
    base_model: dict[str, Any] | None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Weights or codec, config with `auto_map`, remote code, tokenizer and generation config; the model stays as it is.

    Args:
        folder: an existing directory.
        model: the converted model.
        tokenizer: the source's.
        base_model: where the source's weights are, to save the codec alone; None saves everything.
        dtype: of the weights that are written; the model's unless given.
        max_shard_size: of the weight files.
    """
    dtype = dtype or model.dtype
    model.config.architectures = [type(model).__name__]
    if base_model is None:
        state = None if model.dtype == dtype else _state_in(model, dtype)
        model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
        config: Any = copy.deepcopy(model.config)
    else:
        codec = {name.removeprefix("codec."): matrix.to(dtype) for name, matrix in model.codec_tensors().items()}
        config = copy.deepcopy(model.config)
        config.clla["codec_sha256"] = tensor_digest(codec)
        config.base_model = base_model
        save_file(codec, folder / CODEC_FILE, metadata={"format": "pt"})
        custom_object_save(model, folder, config=config)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
    config.dtype = dtype
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _state_in(model: CllaForCausalLM, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state dict with parameters in another dtype; buffers keep the precision that the model wants."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    cast: dict[int | str, torch.Tensor] = {}  # by address, so that what is tied stays so
    return {
        name: cast.setdefault(tensor.data_ptr() or name, tensor.to(dtype)) if name in parameters else tensor
        for name, tensor in model.state_dict().items()
    }
