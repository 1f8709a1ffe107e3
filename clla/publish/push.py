"""Upload to the Hub."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
)
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import enable_progress_bars, validate_repo_id

from clla import console
from clla.checkpoint.checksums import check_files
from clla.checkpoint.load import check_folder, recipe_of
from clla.errors import CllaError
from clla.hub.errors import explain, no_write_access
from clla.publish.base_model import find_base
from clla.publish.contents import REPLACED, Outgoing, gather, matches
from clla.storage.filenames import CHECKSUMS, CONFIG
from clla.storage.files import read_json


@dataclass(frozen=True)
class Push:
    """What is pushed where.

    Attributes:
        folder: the checkpoint.
        repo_id: of the repository.
        private: make it private, where it is new.
        codec_only: the codec without the weights.
        revision: branch to push to; None for the default one.
        base_model: Hub id of the source, where the checkpoint does not say it.
    """

    folder: Path
    repo_id: str
    private: bool = False
    codec_only: bool = False
    revision: str | None = None
    base_model: str | None = None

    @property
    def command(self) -> str:
        """That does it once more."""
        options = ["--private"] * self.private + ["--codec-only"] * self.codec_only
        for name, value in (("--revision", self.revision), ("--base-model", self.base_model)):
            options += [name, value] if value is not None else []
        return shlex.join(["clla", "push", str(self.folder), self.repo_id, *options])


@dataclass(frozen=True)
class Pushed:
    """Attributes: url: of the repository; commit; removed: files that an earlier push had left there."""

    url: str
    commit: str
    removed: list[str]


def check_access(repo_id: str, *, private: bool) -> str:
    """Whether the token may write to a repository; nothing is created.

    Args:
        repo_id: `namespace/name`, or a name alone for the user's own namespace.
        private: it should be private.

    Returns:
        The id with its namespace.

    Raises:
        CllaError: no token or a wrong one, no right to write, a bad name, another's namespace, a public repository
            where a private one is wanted, or no way to the Hub.
    """
    doing = f"nothing can be pushed to {repo_id}"
    try:
        validate_repo_id(repo_id)
        if constants.HF_HUB_OFFLINE:
            raise OfflineModeIsEnabled
        api = HfApi()
        user = api.whoami()
        token = (user.get("auth") or {}).get("accessToken") or {}
        if token.get("role") == "read":
            raise no_write_access(doing, "the token may only read")
        repo_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
        _check_namespace(repo_id.split("/")[0], user, doing)
        try:
            info = api.model_info(repo_id)
        except RepositoryNotFoundError:
            return repo_id
        if private and not info.private:
            raise CllaError(
                f"{repo_id} exists and is public: --private would be ignored",
                expected="a new or a private repository",
                remedy="choose another name, or make it private in its settings",
            )
        if "write" in signature(api.auth_check).parameters:  # else it asks only whether it may be read
            api.auth_check(repo_id, write=True)
        return repo_id
    except Exception as error:  # classes of huggingface_hub and of its transport
        raise explain(error, doing) from error


def prepare(what: Push, *, ask: bool) -> Outgoing:
    """The files that a push sends, after the checkpoint was compared with its checksums.

    Args:
        what: is pushed.
        ask: the Hub for the base model of a codec; else only names are found.

    Raises:
        CllaError: a bad name, the checkpoint is damaged, or its codec cannot be pushed alone.
    """
    try:
        validate_repo_id(what.repo_id)
    except HFValidationError as error:
        raise explain(error, f"nothing can be pushed to {what.repo_id}") from error
    check_folder(what.folder)
    if not check_files(what.folder):
        console.say(f"{what.folder} has no {CHECKSUMS}: whether it is damaged is not known")
    config = read_json(what.folder / CONFIG)
    alone = what.codec_only or config.get("base_model") is not None
    recipe = recipe_of(what.folder)
    base = find_base(config, recipe, what.base_model, alone=alone, private=what.private, ask=ask)
    return gather(what.folder, what.repo_id, base, alone=alone)


def push(what: Push) -> tuple[Outgoing, Pushed]:
    """Upload a finished checkpoint in one commit, so that nobody ever loads half of it.

    With `create_commit` and not `upload_folder`, which may cut a folder into several commits, and sends files only as
    they are on disk. `upload_large_folder` does so too, keeps its books in the checkpoint's directory, and is gone in
    huggingface_hub 2. Big files that the Hub has already, also from an interrupted upload, are not sent again.

    Raises:
        CllaError: it cannot be, or was interrupted; the checkpoint on disk is as it was.
    """
    check_folder(what.folder)
    repo_id = check_access(what.repo_id, private=what.private)
    what = replace(what, repo_id=repo_id)
    outgoing = prepare(what, ask=True)
    api = HfApi()
    if not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()
    try:
        url = api.create_repo(repo_id, private=what.private, exist_ok=True)
        if what.revision in (None, constants.DEFAULT_REVISION):
            _check_own(repo_id)
        else:
            api.create_branch(repo_id, branch=what.revision, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=what.revision)
        old = [name for name in there if name not in outgoing.files and matches(name, REPLACED)]
        operations = [CommitOperationAdd(name, held) for name, held in sorted(outgoing.files.items())]
        done = api.create_commit(
            repo_id,
            [*operations, *(CommitOperationDelete(name) for name in old)],
            commit_message="Upload checkpoint converted with clla",
            revision=what.revision,
        )
    except KeyboardInterrupt as error:
        error.add_note(f"the checkpoint on disk is whole, and what arrived is not sent twice by: {what.command}")
        raise
    except Exception as error:  # classes of huggingface_hub, of its transport and of its storage
        raise explain(
            error, f"{repo_id} could not be uploaded", again=f"run, which sends only what is missing: {what.command}"
        ) from error
    return outgoing, Pushed(str(url), str(done.oid), old)


def _check_namespace(name: str, user: dict[str, Any], doing: str) -> None:
    roles = {user["name"]: "admin"} | {org["name"]: org.get("roleInOrg", "") for org in user.get("orgs", ())}
    role = next((role for own, role in roles.items() if own.casefold() == name.casefold()), None)
    if role is None:
        raise CllaError(
            f"{doing}: the namespace {name} is not yours",
            expected=f"one of {', '.join(roles)}",
            remedy="correct the name, or log in to another account with: hf auth login",
        )
    if role == "read":
        raise no_write_access(doing, f"you may only read in the organization {name}")


def _check_own(repo_id: str) -> None:
    """Refuse to put a checkpoint over another model."""
    try:
        config = read_json(Path(hf_hub_download(repo_id, CONFIG)))
    except EntryNotFoundError:
        return
    if config.get("model_type") != "clla":
        raise CllaError(
            f"{repo_id} holds a {config.get('model_type')!r} model that is not converted",
            expected="a new repository, or one of an earlier push",
            remedy="choose another name, or a branch of its own with --revision",
        )
