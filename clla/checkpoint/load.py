"""Open a converted checkpoint, with errors that say what to do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from pydantic import BaseModel, ValidationError, field_validator
from transformers import AutoTokenizer, PreTrainedModel

from clla import console
from clla.artifacts.plan import Plan, Positive, Whole
from clla.checkpoint.checksums import check_base, check_files
from clla.errors import CllaError, CorruptArtifactError, blamed, is_memory, reason
from clla.hub.errors import explain
from clla.hub.revision import find_config, split_revision
from clla.modeling.configuration_clla import CLLA_SCHEMA_VERSION, CllaConfig
from clla.modeling.modeling_clla import SAME_MODEL, CllaForCausalLM
from clla.modeling.quantize_clla import tensor_digest
from clla.modeling.rotary_clla import ROPE_FORMS
from clla.native.reading import read_by_native_code
from clla.recipe import Recipe, load_recipe
from clla.source.device import pick_dtype
from clla.source.lengths import Reach, reach_of
from clla.source.model import Source, check_complete, check_directory, model_folder, open_source
from clla.storage.filenames import CHECKSUMS, CONFIG, RECIPE
from clla.storage.files import mistakes_in, read_json


@dataclass(frozen=True)
class Checkpoint:
    """Attributes: model; tokenizer; plan, as its config holds it; folder of its files."""

    model: CllaForCausalLM
    tokenizer: Any
    plan: Plan
    folder: Path


def load_checkpoint(path: str, *, device: torch.device, dtype: str = "auto") -> Checkpoint:
    """A converted model from a directory or the Hub, its files checked against their checksums.

    The codec always has one. Every other file has one too, weights included, unless an earlier version wrote them;
    so has the base model of a codec-only checkpoint.

    Args:
        path: directory or Hub id, with or without `@revision`.
        device: where to put it.
        dtype: `auto` keeps the checkpoint's where that is fast on this device.

    Raises:
        CorruptArtifactError: damaged, incomplete, or written by a newer version.
        CllaError: it is no converted checkpoint.
    """
    read_by_native_code()
    pick_dtype(dtype, torch.float32, device)  # a wrong word is told first
    folder = checkpoint_folder(path)
    check_folder(folder)
    checked = check_files(folder)
    plan = read_plan(folder)
    try:
        config = CllaConfig.from_pretrained(folder)
        stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        compute = pick_dtype(dtype, stored, device)
        loaded: Any = CllaForCausalLM.from_pretrained(
            folder, config=config, dtype=compute, output_loading_info=True, ignore_mismatched_sizes=True
        )
        model, info = loaded
        check_complete(info, path)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        _check_base_model(config.base_model)
    except CllaError:
        raise
    except Exception as error:  # safetensors, huggingface_hub and transformers raise classes of their own
        if is_memory(error):
            raise
        raise CorruptArtifactError(
            f"{path} cannot be loaded: {reason(error)}",
            expected="a complete checkpoint written by clla convert",
            remedy="copy or download it again, or convert the source model again",
        ) from error
    if not checked:
        console.say(f"{path} has no {CHECKSUMS}: of its weights only the codec is checked")
    codec = {k: v.to(stored) for k, v in model.codec.state_dict().items()}
    wanted = config.spec.codec_sha256
    exact = compute in (stored, torch.float32)  # nothing is lost on the way to it and back
    if exact and wanted is not None and tensor_digest(codec) != wanted:
        raise CorruptArtifactError(
            f"the codec in {path} does not have the checksum that its config names",
            expected=f"sha256 {wanted[:16]}…",
            remedy="copy or download the checkpoint again",
        )
    return Checkpoint(model.to(device).eval().requires_grad_(False), tokenizer, plan, folder)


class _Rope(BaseModel):
    form: str
    plain_layers: list[Whole]

    @field_validator("form")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in ROPE_FORMS:
            raise ValueError(f"expected one of {', '.join(ROPE_FORMS)}")
        return value


class _Running(BaseModel):
    """What a config's `clla` block holds beside the plan."""

    rope: _Rope | None
    kv_dtype: Literal["float32", "bfloat16", "float16"]
    prefill_chunk: Positive
    codec_sha256: str | None = None
    healed: Literal["codec", "attention", "all"] | None = None


def read_plan(folder: Path) -> Plan:
    """The plan in a checkpoint's config, the rest of its `clla` block checked, too.

    Raises:
        CorruptArtifactError: a key is missing, or its value makes no sense.
    """
    block: Any = read_json(folder / CONFIG).get("clla")
    try:
        _Running.model_validate_json(json.dumps(block), strict=True)
        return Plan.from_json(block)
    except ValueError as error:
        why = mistakes_in(error) if isinstance(error, ValidationError) else str(error)
        raise CorruptArtifactError(
            f"the clla block in {folder / CONFIG} is not as clla convert writes it: {why}",
            expected="a config that belongs to the weights beside it",
            remedy="copy or download the checkpoint again, or convert the source model again",
        ) from error


def checkpoint_folder(name: str) -> Path:
    """The directory of a checkpoint; one on the Hub is downloaded first, at one commit.

    Args:
        name: directory or Hub id, with or without `@revision`.

    Raises:
        CllaError: it is neither, or no converted model.
    """
    folder = Path(name).expanduser()
    if folder.exists():
        return folder
    repo, revision = split_revision(name)
    found, commit = find_config(repo, revision, expected="a checkpoint written by clla convert: a directory or Hub id")
    check_folder(found, repo)  # before its weights are fetched
    try:
        return Path(snapshot_download(repo, revision=commit))
    except Exception as error:  # classes of huggingface_hub, its HTTP client and OSError
        raise explain(error, f"{name} cannot be downloaded") from error


def checkpoint_reach(folder: Path) -> Reach:
    """The tokens that a checkpoint takes, from its config alone.

    Args:
        folder: from `checkpoint_folder`.

    Raises:
        CllaError: it is no converted model, or its config is damaged.
    """
    check_folder(folder)
    with blamed(
        f"{folder}/config.json cannot be read",
        expected="a complete checkpoint written by clla convert",
        remedy="copy or download it again, or convert the source model again",
        kind=CorruptArtifactError,
    ):
        config = CllaConfig.from_pretrained(folder)
    return reach_of(config.text_config)


def recipe_of(folder: Path) -> Recipe:
    """The resolved recipe beside the weights; the default one for a checkpoint without."""
    path = folder / RECIPE
    if path.is_file():
        return load_recipe(str(path))
    console.say(f"{folder} has no clla_recipe.yaml: the defaults are taken")
    return Recipe()


def source_of(loaded: Checkpoint, recipe: Recipe, name: str | None, device: torch.device) -> PreTrainedModel:
    """The source of a checkpoint: its own weights, unless they were trained or another model is named.

    Args:
        loaded: the checkpoint.
        recipe: which says where the source was.
        name: of the source, instead.
        device: where to put it.

    Raises:
        CllaError: the weights were trained and the source is not to be found, or it is another model.
    """
    trained = loaded.model.config.spec.healed in ("attention", "all")
    if name is None and not trained:
        return loaded.model.source
    name = name or (recipe.provenance.source if recipe.provenance else None)
    if name is None:
        raise CllaError(
            "the weights of this checkpoint were trained, and it does not say what they were before",
            expected="the source model, to compare with",
            remedy="name it with --source-model",
        )
    source = _open_named(name)
    for field in SAME_MODEL:
        wanted, found = getattr(loaded.model.config.text_config, field), getattr(source.config, field)
        if wanted != found:
            raise CllaError(
                f"{name} has {field} {found}, the checkpoint {wanted}",
                expected="the model that was converted",
                remedy="name it with --source-model",
            )
    return source.load_model(dtype=loaded.model.source.dtype, device=device)


def _check_base_model(base: dict[str, Any] | None) -> None:
    """The checkpoint that a codec stands on must be the one that was converted, byte for byte."""
    if base is None or "sha256" not in base:
        return
    check_base(model_folder(base["path"], base.get("hub_revision")), base["sha256"], base["path"])


def _open_named(name: str) -> Source:
    try:
        return open_source(name)
    except CllaError as error:
        raise CllaError(
            error.got, expected=error.expected, remedy="name the source model with --source-model"
        ) from error


def check_folder(folder: Path, name: str | None = None) -> None:
    """Tell a damaged checkpoint, a newer one and one that is not ours apart before anything is loaded.

    Args:
        folder: of its files.
        name: for the messages, where it is not the folder's.
    """
    name = name or str(folder)
    check_directory(folder, name)
    config = read_json(folder / CONFIG)
    if config.get("model_type") != "clla":
        raise CllaError(
            f"{name} holds a {config.get('model_type')!r} model that is not converted",
            expected="a checkpoint written by clla convert",
            remedy=f"run: clla convert {name}",
        )
    block = config.get("clla")
    version = block.get("schema_version") if isinstance(block, dict) else None
    if not isinstance(version, int):
        raise CorruptArtifactError(
            f"{name}/config.json names no schema version", expected="a clla block", remedy="convert again"
        )
    if version > CLLA_SCHEMA_VERSION:
        raise CorruptArtifactError(
            f"{name} was written with schema {version}",
            expected=f"{CLLA_SCHEMA_VERSION} or older",
            remedy="upgrade with: pip install -U clla",
        )
