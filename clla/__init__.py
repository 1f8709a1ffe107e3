"""clla: convert language models to Cross-Layer Latent Attention (arXiv 2410.15252).

`import clla` makes `AutoModelForCausalLM.from_pretrained` understand converted checkpoints without
remote code.
"""

from __future__ import annotations

import sys
from pathlib import Path

__version__ = "0.1.0"


def register() -> None:
    """Register the converted architecture with transformers' Auto classes; safe to call twice."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from clla.modeling.configuration_clla import CllaConfig
    from clla.modeling.modeling_clla import CllaForCausalLM

    AutoConfig.register("clla", CllaConfig, exist_ok=True)
    AutoModelForCausalLM.register(CllaConfig, CllaForCausalLM, exist_ok=True)


# The command line must answer --help without importing torch; its commands register when they need to.
# (sys.argv[0] is "-m" while `python -m clla` imports the package.)
if Path(sys.argv[0]).name not in ("clla", "clla.exe", "-m"):
    register()
