"""Names of models on the Hub, `user/repo` or `user/repo@revision`, and the commits that they mean."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from clla.errors import CllaError, UsageError
from clla.hub.errors import explain
from clla.storage.filenames import CONFIG

SOURCES = "a Hub id, a directory with config.json, a .gguf file, or 'demo'"
LISTED = 10  # revisions that an error names


def split_revision(name: str) -> tuple[str, str | None]:
    """`user/repo@revision` in two parts; what exists on disk has no revision, whatever its name.

    Raises:
        UsageError: nothing stands before or after the '@'.
    """
    repo, at, revision = name.partition("@")
    if not at or Path(name).expanduser().exists():
        return name, None
    if not repo or not revision:
        raise UsageError(
            f"{name!r} names no {'revision' if repo else 'model'}",
            expected="user/repo@revision: a branch, a tag or a commit",
            remedy="complete it, or leave out the '@'",
        )
    return repo, revision


def plain_name(name: str) -> str:
    """A model's name as a folder's: without directories, revision and suffix."""
    return Path(split_revision(name)[0]).expanduser().resolve().name.removesuffix(".gguf")


def beside(name: str, suffix: str) -> Path:
    """Where what is made of a checkpoint goes by default: beside its directory, or here for one on the Hub."""
    place = Path(name).resolve() if Path(name).is_dir() else Path(plain_name(name)).resolve()
    return place.with_name(place.name + suffix)


def find_config(repo: str, revision: str | None, *, expected: str = SOURCES) -> tuple[Path, str]:
    """Fetch the config of a model on the Hub.

    Args:
        repo: Hub id.
        revision: branch, tag or commit; None for the default branch.
        expected: what may be named, for the message.

    Returns:
        The directory of the downloaded files at that commit, and the commit.

    Raises:
        CllaError: no such model or revision, no access, or no way to the Hub and nothing downloaded before.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise CllaError(
            f"{repo} does not exist on this machine, and a model on the Hub cannot have that name",
            expected=expected,
            remedy="check the path",
        ) from error
    try:
        config = Path(hf_hub_download(repo, CONFIG, revision=revision))
    except RevisionNotFoundError as error:
        raise CllaError(
            f"{repo} has no revision {revision!r}",
            expected=f"a branch, a tag or a commit{_revisions(repo)}",
            remedy=f"check it on the model's page, or leave out @{revision}",
        ) from error
    except Exception as error:  # classes of huggingface_hub, its transport and OSError
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise CllaError(
                f"{repo}{f' at {revision}' if revision else ''} has no config.json",
                expected="a repository that holds a model in the format of transformers",
                remedy="check the name and the revision; an adapter (LoRA) must be merged into its model first",
            ) from error
        found = explain(error, f"{repo!r} is no model that can be opened")
        raise CllaError(
            f"{found.got}; nor is there a directory of that name here",
            expected=expected,
            remedy=f"{found.remedy}; offline, give a local directory",
        ) from error
    return config.parent, config.parent.name


def _revisions(repo: str) -> str:
    """Names of branches and tags, as far as the Hub tells them."""
    try:
        refs = HfApi().list_repo_refs(repo)
    except Exception:  # it is only for a message
        return ""
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    return f" of {', '.join(names[:LISTED])}{', …' if len(names) > LISTED else ''}" if names else ""
