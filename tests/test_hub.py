"""Upload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from clla.errors import CllaError
from clla.hub import push


def test_push_uploads_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kw: calls.append((repo_id, kw["private"])))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, *, repo_id, folder_path: f"{repo_id}@{folder_path}")
    assert push(tmp_path, "me/model", private=True) == f"me/model@{tmp_path}"
    assert calls == [("me/model", True)]


def test_push_without_access_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: HfApi, *args: Any, **kwargs: Any) -> None:
        raise OSError("401")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(CllaError, match="hf auth login"):
        push(tmp_path, "me/model", private=False)
