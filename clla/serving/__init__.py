"""vLLM plugin: `vllm serve` runs converted checkpoints on an engine as it is installed (docs/serving.md)."""

from __future__ import annotations

from typing import Any

ARCHITECTURE = "CllaForCausalLM"


def register() -> None:
    """Entry point of `vllm.general_plugins`: make the converted architecture known; safe to call twice.

    vLLM calls it in each of its processes, also where other models are served: it must neither fail nor cost much.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from clla.registration import register as register_in_transformers

    register_in_transformers()
    ModelRegistry.register_model(ARCHITECTURE, "clla.serving.model:CllaForCausalLM")
    MODELS_CONFIG_MAP.setdefault(ARCHITECTURE, EngineConfig)  # type: ignore[arg-type]


class EngineConfig:
    """What vLLM asks about a model before its engine starts, in the process the user started."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing to change."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse what cannot be served; cut prompts as transformers does while several requests share a step.

        Raises:
            CllaError: with the reason.
        """
        from clla.serving.pipeline_parallel import check_stages
        from clla.serving.validation import check_engine, check_model
        from clla.serving.versions import version_of_vllm

        check_engine(version_of_vllm(), vllm_config)
        model = vllm_config.model_config
        check_model(model.hf_config)
        check_stages(vllm_config)
        scheduler = vllm_config.scheduler_config
        if not scheduler.long_prefill_token_threshold:
            scheduler.long_prefill_token_threshold = min(model.hf_config.spec.prefill_chunk, model.max_model_len)
