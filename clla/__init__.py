"""clla: convert language models to Cross-Layer Latent Attention (arXiv 2410.15252).

`convert_model`, `heal_model`, `evaluate_model` and `load_model` do what the commands do (docs/python-api.md).
`register` makes `AutoModelForCausalLM.from_pretrained` load converted checkpoints without remote code. Nothing heavy
is imported before one of them is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from clla._version import __version__
from clla.errors import CllaError

if TYPE_CHECKING:
    from clla.api import (
        Conversion,
        HealChanges,
        Healed,
        Healing,
        Recipe,
        RecipeChanges,
        Report,
        RetrievalOptions,
        convert_model,
        evaluate_model,
        heal_model,
        load_model,
    )
    from clla.checkpoint.language_model import extract_language_model
    from clla.registration import register

__all__ = [
    "CllaError",
    "Conversion",
    "HealChanges",
    "Healed",
    "Healing",
    "Recipe",
    "RecipeChanges",
    "Report",
    "RetrievalOptions",
    "__version__",
    "convert_model",
    "evaluate_model",
    "extract_language_model",
    "heal_model",
    "load_model",
    "register",
]
ELSEWHERE = {"extract_language_model": "clla.checkpoint.language_model", "register": "clla.registration"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(ELSEWHERE.get(name, "clla.api")), name)
    raise AttributeError(f"module 'clla' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
