"""Configs of tiny models for images."""

from __future__ import annotations

from typing import Any

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
