"""Language models taken out of models for images: the same logits, and a checkpoint that is accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer
from helpers import clla as command
from helpers import tokens
from model_table import TABLE
from transformers import AutoConfig, AutoModelForImageTextToText
from vision_models import CONFIGS

import clla
from clla.errors import UnsupportedModelError
from clla.source.families import check_family
from clla.source.model import open_source
from clla.storage.files import read_json


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_language_model_of_a_model_for_images(kind: str, tmp_path: Path) -> None:
    """As the refusal says; Mistral 3 with its default tying, Llava with a head of its own."""
    torch.manual_seed(0)
    whole: Any = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **CONFIGS[kind])).eval()
    whole.save_pretrained(tmp_path / "whole")
    byte_tokenizer().save_pretrained(tmp_path / "whole")
    refused = command("convert", tmp_path / "whole", "-o", tmp_path / "out")
    assert refused.exit_code == 1 and "clla.extract_language_model('MODEL', 'text-model')" in refused.stderr
    folder = clla.extract_language_model(tmp_path / "whole", tmp_path / "text-model")
    source = open_source(str(folder))
    model = source.load_model(dtype=torch.float32, device=torch.device("cpu"))
    ids = tokens(2, 40)
    torch.testing.assert_close(model(ids).logits, whole(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    tied = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    assert read_json(folder / "config.json")["tie_word_embeddings"] == tied
    TABLE.extracted.add(kind)
    assert source.load_tokenizer()("abc")["input_ids"] == byte_tokenizer()("abc")["input_ids"]


def test_what_has_no_language_model_of_its_own(pico_dir: Path, tmp_path: Path) -> None:
    """The refusal does not promise what then fails."""
    with pytest.raises(UnsupportedModelError, match="no class for its language model alone"):
        check_family(AutoConfig.for_model("glm4v"))
    AutoConfig.for_model("glm4v").save_pretrained(tmp_path / "glm4v")
    with pytest.raises(UnsupportedModelError, match="glm4v_text"):
        clla.extract_language_model(tmp_path / "glm4v", tmp_path / "out")
    with pytest.raises(clla.CllaError, match="a language model already"):
        clla.extract_language_model(pico_dir, tmp_path / "out")
    with pytest.raises(clla.CllaError, match="no model that can be opened"):
        clla.extract_language_model(tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()
