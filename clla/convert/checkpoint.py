"""Write a converted checkpoint: an ordinary HF directory with the modeling code beside the weights.

Everything is written into a partial directory that takes the final name only when it is complete.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from transformers.dynamic_module_utils import custom_object_save

from clla.checksums import write_checksums
from clla.errors import CllaError, UsageError
from clla.modeling.modeling_clla import CODEC_FILE, CllaForCausalLM
from clla.modeling.quantize_clla import tensor_digest

FREE_SPACE_MARGIN = 1.1


def check_output(path: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse an output directory that holds something.

    Args:
        path: of the output.
        source: of the model that is converted, if it is a directory.
        overwrite: replace an earlier conversion.

    Raises:
        UsageError: it is a file, part of the source, or not empty and `overwrite` was not given.
    """
    own, model = path.resolve(), source.resolve()
    if source.is_dir() and (own == model or own in model.parents or model in own.parents):
        raise UsageError(
            f"{path} and the source model in {source} lie inside each other",
            expected="a directory apart from the source",
            remedy="choose another --output",
        )
    if path.is_file():
        raise UsageError(f"{path} is a file", expected="a directory to write to", remedy="choose another --output")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{path} is not empty", expected="a new or empty directory", remedy="pass --overwrite")
    if not (path / "clla_report.json").is_file():
        raise UsageError(
            f"{path} holds something that clla did not write",
            expected="a checkpoint of an earlier conversion, for --overwrite to replace",
            remedy="choose another --output, or remove the directory yourself",
        )


def check_disk(path: Path, needed: int, *, instead: str = "save the codec alone with --adapter-only") -> None:
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


def check_memory(needed: int) -> None:
    """Refuse a model whose moments do not fit.

    Raises:
        CllaError: more bytes are needed than the machine has free.
    """
    free = psutil.virtual_memory().available
    if needed > free:
        raise CllaError(
            f"the moments of this model take about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free",
            expected="a model with grouped heads, or smaller groups: memory grows with (values a token and layer)²",
            remedy="lower --max-group-size, or use a machine with more memory",
        )


@contextmanager
def finished_directory(path: Path) -> Iterator[Path]:
    """A partial directory beside `path` that gets checksums and replaces it once the block ends without an error."""
    partial = path.with_name(path.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        write_checksums(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(partial, path)
    shutil.rmtree(old, ignore_errors=True)


def write_checkpoint(
    folder: Path,
    model: CllaForCausalLM,
    tokenizer: Any,
    *,
    base_model: dict[str, Any] | None,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
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
