"""transformers' Auto classes learn of converted checkpoints."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from clla.modeling.configuration_clla import CllaConfig
from clla.modeling.modeling_clla import CllaForCausalLM
from clla.native.reading import read_by_native_code


def register() -> None:
    """Let `AutoModelForCausalLM.from_pretrained` load converted checkpoints without remote code; safe to call twice.

    On a CPU latents are then read by compiled code, where there is a compiler (see `clla.native`).

    Example:
        >>> clla.register()
        >>> model = transformers.AutoModelForCausalLM.from_pretrained("MODEL-clla")
    """
    AutoConfig.register("clla", CllaConfig, exist_ok=True)
    AutoModelForCausalLM.register(CllaConfig, CllaForCausalLM, exist_ok=True)
    read_by_native_code()
