"""Write a converted checkpoint: an ordinary HF directory with the modeling code beside the weights.

Everything is written into a partial directory that takes the final name only when it is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from clla.errors import CllaError, UsageError
from clla.modeling.modeling_clla import CODEC_FILE, CllaForCausalLM
from clla.modeling.quantize_clla import tensor_digest

FREE_SPACE_MARGIN = 1.1


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse an output directory that holds something.

    Raises:
        UsageError: it is a file, or not empty and `overwrite` was not given.
    """
    if path.is_file():
        raise UsageError(f"{path} is a file", expected="a directory to write to", remedy="choose another --output")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UsageError(f"{path} is not empty", expected="a new or empty directory", remedy="pass --overwrite")


def check_disk(path: Path, needed: int) -> None:
    """Refuse to start what cannot be finished.

    Raises:
        CllaError: fewer bytes are free than `needed` with a margin.
    """
    parent = next(p for p in (path, *path.parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed * FREE_SPACE_MARGIN:
        raise CllaError(
            f"{parent} has {free / 1e9:.2f} GB free",
            expected=f"about {needed * FREE_SPACE_MARGIN / 1e9:.2f} GB",
            remedy="free some space, choose another --output, or save the codec alone with --adapter-only",
        )


@contextmanager
def finished_directory(path: Path) -> Iterator[Path]:
    """A partial directory beside `path` that replaces it once the block ends without an error."""
    partial = path.with_name(path.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    old = path.with_name(path.name + ".old")
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
    max_shard_size: str = "5GB",
) -> None:
    """Weights or codec, config with `auto_map`, remote code, tokenizer and generation config.

    Args:
        folder: an existing directory.
        model: the converted model.
        tokenizer: the source's.
        base_model: where the source's weights are, to save the codec alone; None saves everything.
        max_shard_size: of the weight files.
    """
    codec = {k: v.detach().cpu().contiguous() for k, v in model.codec.state_dict().items()}
    model.config.clla["codec_sha256"] = tensor_digest(codec)
    model.config.base_model = base_model
    model.config.architectures = [type(model).__name__]
    type(model.config).register_for_auto_class()
    type(model).register_for_auto_class("AutoModelForCausalLM")
    if base_model is None:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    else:
        from transformers.dynamic_module_utils import custom_object_save

        save_file(codec, folder / CODEC_FILE, metadata={"format": "pt"})
        config: Any = model.config
        custom_object_save(model, folder, config=config)
        config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
