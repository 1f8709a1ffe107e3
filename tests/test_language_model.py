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

import clla
from clla.errors import UnsupportedModelError
from clla.source.families import check_family
from clla.source.model import open_source
from clla.storage.files import read_json

TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512,
}  # fmt: skip
OWN_HEADS = {**TEXT, "head_dim": 16}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
QWEN = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14}
IDS = {"image_token_id": 262, "video_token_id": 263, "vision_start_token_id": 264, "vision_end_token_id": 265}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"text_config": {**TEXT, **SECTIONS}, "vision_config": QWEN, **IDS},
    "qwen3_vl": {
        "text_config": {**OWN_HEADS, **SECTIONS}, "vision_config": {**QWEN, "deepstack_visual_indexes": [0]}, **IDS,
    },
    "qwen3_vl_moe": {
        "text_config": {**OWN_HEADS, **SECTIONS, "num_experts": 4, "num_experts_per_tok": 2,
                        "moe_intermediate_size": 32},
        "vision_config": {**QWEN, "deepstack_visual_indexes": [0]}, **IDS,
    },
    "gemma3": {
        "text_config": {**OWN_HEADS, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 299,
    },
    "llava": {
        "text_config": {"model_type": "llama", **TEXT}, "image_token_index": 299,
        "vision_config": {"model_type": "clip_vision_model", **VISION, "projection_dim": 32},
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **OWN_HEADS, "sliding_window": None}, "image_token_index": 299,
        "vision_config": {"model_type": "pixtral", **VISION},
    },
    "idefics3": {"text_config": {"model_type": "llama", **TEXT}, "vision_config": VISION, "image_token_id": 299},
}  # fmt: skip


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
