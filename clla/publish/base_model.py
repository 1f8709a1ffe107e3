"""Which model on the Hub a checkpoint was converted from, and whether it is the same byte for byte."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from clla.checkpoint.checksums import base_checksums, file_digest
from clla.errors import CllaError, UsageError
from clla.hub.errors import explain
from clla.hub.revision import find_config, split_revision
from clla.recipe import Recipe
from clla.storage.filenames import CONFIG
from clla.storage.files import read_json

# Where the Hub's cache keeps a model says which one it is, and its commit.
CACHED = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]?$")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OLD_SINGLE, OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class HubModel:
    """A base model on the Hub.

    Attributes:
        repo: Hub id.
        commit: None where the Hub was not asked.
        sha256: checksums of its config and weights; None where the Hub was not asked.
        gguf_file: name of its weights, where it is one.
    """

    repo: str
    commit: str | None = None
    sha256: dict[str, str] | None = None
    gguf_file: str | None = None


def recorded_base(config: dict[str, Any], recipe: Recipe) -> HubModel | None:
    """The base model that a checkpoint names, as far as it says one on the Hub.

    Args:
        config: its config.json.
        recipe: its resolved recipe.
    """
    base, provenance = config.get("base_model") or {}, recipe.provenance
    if base.get("hub_revision"):
        return HubModel(base["path"], base["hub_revision"])
    for path in (base.get("path"), provenance.model if provenance else None):
        if path is not None and (found := cached_model(path)) is not None:
            return found
    if provenance is not None and provenance.on_hub:
        return HubModel(provenance.model, provenance.revision)
    return None


def cached_model(path: str) -> HubModel | None:
    """The model of a directory in the Hub's cache."""
    found = CACHED.search(path)
    return HubModel(f"{found[1]}/{found[2]}", found[3]) if found else None


def local_source(config: dict[str, Any], recipe: Recipe) -> tuple[Path, str | None] | None:
    """Directory and .gguf file of a source on this machine, if it is still there."""
    base, provenance = config.get("base_model") or {}, recipe.provenance
    if base:
        folder, gguf_file = Path(base["path"]), base.get("gguf_file")
    elif provenance is not None and not provenance.on_hub:
        path = Path(provenance.model).expanduser()
        folder, gguf_file = (path.parent, path.name) if path.suffix == ".gguf" else (path, None)
    else:
        return None
    return (folder, gguf_file) if (folder / (gguf_file or CONFIG)).is_file() else None


def find_base(
    config: dict[str, Any], recipe: Recipe, given: str | None, *, alone: bool, private: bool, ask: bool
) -> HubModel | None:
    """The base model on the Hub, compared with what was converted.

    Args:
        config: the checkpoint's config.json.
        recipe: its resolved recipe.
        given: by the user, `user/repo` or `user/repo@revision`.
        alone: the codec is pushed without weights, so the base model must be known and the same.
        private: others need not see it.
        ask: the Hub; else only names are found.

    Returns:
        None where none is known and none is needed.

    Raises:
        CllaError: none is known, it is not the one that was converted, or others cannot get it.
    """
    named, recorded = _named(given), recorded_base(config, recipe)
    if named and recorded and named.repo == recorded.repo and named.commit in (None, recorded.commit):
        named = given = None
    model = named or recorded or (_hinted(config, recipe) if alone else None)
    if model is None:
        if not alone:
            return None
        raise CllaError(
            "the codec stands on a model that is known here only by its place on this machine",
            expected="a base model on the Hub, which others can load",
            remedy="name it with --base-model user/repo[@revision]; or push a conversion with its weights",
        )
    if not ask:
        return model
    sha256 = (config.get("base_model") or {}).get("sha256")
    source = local_source(config, recipe) if model.commit is None or given is not None else None
    if sha256 is None and source is not None and (alone or given is not None):
        sha256 = base_checksums(*source)
    if alone and sha256 is None and (given is not None or model.commit is None):
        raise CllaError(
            f"whether {model.repo} is the model that was converted cannot be checked: the source is not here any more",
            expected="a checkpoint converted from a Hub id, or its source where it was",
            remedy="leave out --codec-only, or convert the Hub id again with --codec-only",
        )
    if not alone and given is None:
        return model  # recorded when it was converted
    _, commit = find_config(model.repo, model.commit, expected="the Hub id of the model that was converted")
    if alone and not private:
        check_public(model.repo)
    return HubModel(model.repo, commit, _compared(model.repo, commit, sha256), source[1] if source else None)


def _named(given: str | None) -> HubModel | None:
    if given is None:
        return None
    if given.startswith(("/", ".", "~")):
        raise UsageError(
            f"--base-model {given} is a place on this machine", expected="a Hub id", remedy="name the model on the Hub"
        )
    return HubModel(*split_revision(given))


def _hinted(config: dict[str, Any], recipe: Recipe) -> HubModel | None:
    """What the source's own config says that it is; no more than a hint, since it may be what that was made from."""
    source = local_source(config, recipe)
    if source is None or source[1] is not None:
        return None
    name = read_json(source[0] / CONFIG).get("_name_or_path")
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return HubModel(name) if name and "/" in name and not Path(name).exists() else None


def _compared(repo: str, commit: str, wanted: dict[str, str] | None) -> dict[str, str]:
    """Checksums of a model on the Hub; refused where they differ from those of the source."""
    try:
        found = hub_checksums(repo, commit, list(wanted) if wanted is not None else None)
    except Exception as error:  # classes of huggingface_hub and its transport
        raise explain(error, f"the base model {repo} cannot be looked at") from error
    wanted = wanted or {}
    if changed := [name for name in wanted if found.get(name) != wanted[name]]:
        raise CllaError(
            f"{repo} at {commit[:12]} is not the model that was converted: {', '.join(changed)} differs",
            expected="the same files byte for byte",
            remedy="name another one, or its revision, with --base-model user/repo@revision; or push with weights",
        )
    return found


def check_public(repo: str) -> None:
    """Refuse a base model that others cannot see.

    Raises:
        CllaError: it is private, or the Hub cannot be asked.
    """
    try:
        HfApi().model_info(repo, token=False)
    except Exception as error:  # classes of huggingface_hub and its transport
        if getattr(getattr(error, "response", None), "status_code", None) not in (401, 403, 404):
            raise explain(error, f"the base model {repo} cannot be looked at") from error
        raise CllaError(
            f"the base model {repo} is not public, so nobody could load a codec that stands on it",
            expected="a public base model, or a private repository for the codec",
            remedy="pass --private, or push a conversion with its weights",
        ) from error


def hub_checksums(repo: str, commit: str, names: list[str] | None) -> dict[str, str]:
    """Checksums of a model's config and weights on the Hub, most of which it tells without a download.

    Args:
        repo: Hub id.
        commit: to look at.
        names: of files; None for the config and the weights that transformers would read.

    Returns:
        SHA-256 by name, of the files that are there.
    """
    tree = HfApi().list_repo_tree(repo, revision=commit)
    files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    def fetched(name: str) -> Path:
        return Path(hf_hub_download(repo, name, revision=commit))

    if names is None:
        names = [CONFIG]
        for single, index in ((SINGLE, INDEX), (OLD_SINGLE, OLD_INDEX)):
            if single in files or index in files:
                shards = [single] if single in files else json.loads(fetched(index).read_text())["weight_map"].values()
                names += sorted(set(shards))
                break
    found = {}
    for name in names:
        if name in files:
            lfs = files[name].lfs
            found[name] = lfs.sha256 if lfs is not None else file_digest(fetched(name))
    return found
