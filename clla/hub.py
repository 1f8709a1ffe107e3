"""Upload to the Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from clla.errors import CllaError


def push(folder: Path, repo_id: str, *, private: bool) -> str:
    """Upload a finished checkpoint; returns its address.

    Raises:
        CllaError: no access or no network.
    """
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder))
    except Exception as error:  # classes of huggingface_hub and of its transport
        raise CllaError(
            f"{repo_id} could not be uploaded: {error}",
            expected="a token with write access",
            remedy=f"run: hf auth login; the checkpoint is complete in {folder}",
        ) from error
