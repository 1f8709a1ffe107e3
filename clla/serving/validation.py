"""What the engine can serve, decided before weights are read."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from clla.errors import CllaError, UnsupportedModelError
from clla.serving.versions import SUPPORTED, is_supported


def check_engine(version: str, config: Any) -> None:
    """Refuse versions and settings of vLLM that the cache cannot live with.

    Args:
        version: of vLLM.
        config: its `VllmConfig`.

    Raises:
        CllaError: with what to change.
    """
    if not is_supported(version):
        raise CllaError(
            f"vLLM {version} is installed; its interfaces were not tested with this version of clla",
            expected=" or ".join(f"vLLM {prefix}.x" for prefix in SUPPORTED),
            remedy=f'install it with: pip install "vllm=={SUPPORTED[-1]}.*"',
        )
    cache, parallel = config.cache_config, config.parallel_config
    unfit = {
        "--kv-cache-dtype": cache.cache_dtype != "auto",
        "--disable-hybrid-kv-cache-manager": config.scheduler_config.disable_hybrid_kv_cache_manager is True,
        "--speculative-config": config.speculative_config is not None,
        "--kv-transfer-config": config.kv_transfer_config is not None,
        "--enable-lora": config.lora_config is not None,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
    }
    for option in (option for option, given in unfit.items() if given):
        raise CllaError(
            f"{option} does not work with a compressed cache", expected="the option left out", remedy="leave it out"
        )


def check_model(config: Any) -> None:
    """Refuse checkpoints of forms that only the transformers path runs.

    Args:
        config: a `CllaConfig`.

    Raises:
        UnsupportedModelError: with the reason.
    """
    spec = config.spec
    reasons = {
        "it is a codec without its model (--codec-only)": config.base_model is not None,
        "layers with a window of their own stand beside layers that keep nothing exact": bool(spec.kept_layers)
        and not (spec.window or spec.sinks),
        f"model type {config.text_config.model_type!r} has no causal language model": (
            config.text_config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        ),
    }
    for reason in (reason for reason, found in reasons.items() if found):
        raise UnsupportedModelError(
            f"vLLM cannot serve this checkpoint: {reason}",
            expected="a causal language model with its weights",
            remedy="convert it so, or run it with transformers: clla generate",
        )
