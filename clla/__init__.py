"""clla: convert language models to Cross-Layer Latent Attention (arXiv 2410.15252).

`import clla` makes `AutoModelForCausalLM.from_pretrained` understand converted checkpoints without
remote code. `clla.convert`, `heal`, `evaluate` and `load` do what the commands do (docs/python-api.md).
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clla.errors import CllaError

if TYPE_CHECKING:
    from clla.api import convert as convert
    from clla.api import evaluate as evaluate
    from clla.api import heal as heal
    from clla.api import load as load
    from clla.language_model import extract_language_model as extract_language_model

__version__ = "0.1.0"
__all__ = ["CllaError", "__version__", "convert", "evaluate", "extract_language_model", "heal", "load", "register"]
CALLED = ("convert", "evaluate", "heal", "load")  # modules that can be called (clla.calling), imported when needed


def register() -> None:
    """Register the converted architecture with transformers' Auto classes; safe to call twice."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from clla.modeling.configuration_clla import CllaConfig
    from clla.modeling.modeling_clla import CllaForCausalLM

    AutoConfig.register("clla", CllaConfig, exist_ok=True)
    AutoModelForCausalLM.register(CllaConfig, CllaForCausalLM, exist_ok=True)


def __getattr__(name: str) -> Any:
    if name in CALLED:
        return importlib.import_module(f"clla.{name}")
    if name == "extract_language_model":
        return importlib.import_module("clla.language_model").extract_language_model
    raise AttributeError(f"module 'clla' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *CALLED, "extract_language_model"})


# The command line must answer --help without importing torch; its commands register when they need to.
# (sys.argv[0] is "-m" while `python -m clla` imports the package.)
if Path(sys.argv[0]).name not in ("clla", "clla.exe", "-m"):
    register()
