"""docs/models.md, written from what the checks of tests/test_families.py found."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clla.families import FAMILIES, NO_CACHE
from clla.source import Source

CHECKS = ("full rank", "first source", "step by step", "padding", "bytes", "save and load", "generate", "without clla")
COMMANDS = tuple(f"clla {name}" for name in ("convert", "generate", "eval", "report", "bench", "heal"))
ROTATIONS = {
    "halves": "halves",
    "halves_once": "halves",
    "pairs": "pairs",
    "pairs_of_halves": "pairs",
}
# What is special about models outside the table in `clla.families`.
SPECIAL = {
    "apertus": "QK-norm",
    "bamba": "hybrid: Mamba 2",
    "bloom": "ALiBi",
    "cohere": "attention beside the MLP",
    "cohere2": "sliding layers, the others without RoPE",
    "diffllama": "difference of two attentions",
    "exaone4": "sliding layers, the others without RoPE; QK-norm",
    "gemma3n_text": "last layers read the cache of earlier ones, sliding layers, QK-norm",
    "gemma4_text": "last layers read the cache of earlier ones, sliding layers with heads of another size, QK-norm",
    "glm": "partial rotary",
    "glm4_moe": "partial rotary, mixture of experts",
    "gpt_bigcode": "multi-query, learned positions",
    "gpt_oss": "attention sinks as weights, sliding layers, mixture of experts",
    "granitemoehybrid": "hybrid: Mamba 2, mixture of experts",
    "lfm2": "hybrid: convolutions, QK-norm",
    "llama4_text": "chunked layers, the others without RoPE, mixture of experts",
    "ministral": "sliding layers",
    "modernbert-decoder": "sliding layers",
    "mpt": "ALiBi",
    "nemotron": "partial rotary",
    "nemotron_h": "hybrid: Mamba 2, layers without attention",
    "olmo3": "norm over all heads, sliding layers",
    "olmo_hybrid": "hybrid: gated delta rule, norm over all heads",
    "olmoe": "norm over all heads, mixture of experts",
    "persimmon": "QK-norm, partial rotary",
    "phi": "partial rotary",
    "qwen2_moe": "mixture of experts",
    "qwen3_5_text": "hybrid: gated delta rule, QK-norm, output gate",
    "qwen3_next": "hybrid: gated delta rule, QK-norm, output gate, mixture of experts",
    "stablelm": "partial rotary",
    "xglm": "sinusoidal positions",
}
INTRODUCTION = """# Models

Written by the tests (`tests/test_families.py`), which put a tiny model of every family through the same checks:

- **full rank**: a conversion that cuts nothing reproduces the logits of the source.
- **first source**: the same with latents read from the attention input of a group's first layer (`plan.source`).
- **step by step**: a prompt and then token by token give the logits of one forward pass.
- **padding**: a sequence padded on the left, in a batch, gives the logits that it gives alone.
- **bytes**: the latents and the exact tokens take the bytes that the plan says.
- **save and load**: written as `clla convert` does, with the weights and with the codec alone, and loaded again: the
  same weights, bit for bit, and the same logits.
- **generate**: greedy decoding gives the tokens of the source.
- **without clla**: the same logits and tokens where only transformers and the code in the checkpoint are there.

"Keys" says how the model was found to rotate its keys; nothing of that is told to the code. Layers left alone keep the
source's own cache, which does not grow with the context. Other models are tried: after loading, a few tokens run
through a lossless cache of ours, and if the logits are not those of the source the model is refused.

Healing (`clla heal`) is not available for Falcon and Gemma 2, whose attention cannot be observed.

"""
AFTER = """
## Refused

By the config alone, before weights are read:

{refused}

Also refused: encoder-decoder models, heads of other kinds (masked language models and so on), Falcon with
`new_decoder_architecture`, quantized weights (except GGUF, which is unpacked), models in which every layer has a
bounded cache, and rotations that change while a sequence grows: `dynamic`, and `longrope` beyond its original length,
as in the 128k versions of Phi-3 and in Phi-4-mini. The message says what to set for contexts up to that length.

After loading, because the model does something else than its config says:

{tried}

## Models with images or sound

A checkpoint such as `Gemma3ForConditionalGeneration` holds a language model among others. Save that first, and convert
what was saved:

```python
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

whole = AutoModelForImageTextToText.from_pretrained(MODEL, dtype="auto")
text = AutoModelForCausalLM.from_config(whole.config.get_text_config(), dtype=whole.dtype)
text.model, text.lm_head = whole.model.language_model, whole.lm_head
text.save_pretrained("text-model")  # and the tokenizer: AutoTokenizer.from_pretrained(MODEL).save_pretrained(…)
```
"""


@dataclass
class Table:
    """What was found, family by family."""

    families: dict[str, tuple[str, str, str]] = field(default_factory=dict)  # by name: special, keys, left alone
    checks: dict[str, dict[str, str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    tried: dict[str, str] = field(default_factory=dict)

    def begin(self, name: str, kind: str, rope: dict[str, Any] | None, source: Source) -> None:
        """Note a family that converts."""
        keys = "not rotated"
        if rope is not None:
            keys = "rotated in " + ROTATIONS[rope["form"]]
            if rope["plain_layers"]:
                keys += f", not in layers {', '.join(map(str, rope['plain_layers']))}"
        kinds = getattr(source.config, "layer_types", None)
        alone = sorted({kinds[i] for i in source.kept_layers} - set(NO_CACHE)) if kinds else []
        self.families[name] = ({**SPECIAL, **FAMILIES}.get(kind, "–"), keys, ", ".join(alone).replace("_", " ") or "–")

    def passed(self, name: str, check: str, verdict: str = "ok") -> None:
        """Note a check that a family passed."""
        assert check in (*CHECKS, *COMMANDS)
        self.checks.setdefault(name, {})[check] = verdict

    def write(self, names: list[str], path: Path) -> None:
        """Write the file, if every family of `names` went through every check."""
        complete = all(self.checks.get(name, {}).keys() == set(CHECKS) for name in names)
        if not complete or not self.refused or not self.tried:
            return
        header = ["model", "special", "keys", "left alone", *CHECKS]
        rows = [
            [f"`{name}`", *self.families[name], *(self.checks[name][check] for check in CHECKS)]
            for name in sorted(names)
        ]
        lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
        after = AFTER.format(refused=_listed(self.refused), tried=_listed(self.tried))
        path.write_text(INTRODUCTION + "\n".join(lines) + "\n" + after, encoding="utf-8")


def _listed(reasons: dict[str, str]) -> str:
    """One line for each reason, with the models it holds for."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in sorted(reasons.items()):
        by_reason.setdefault(reason, []).append(f"`{name}`")
    return "\n".join(f"- {', '.join(names)}: {reason}" for reason, names in sorted(by_reason.items()))


TABLE = Table()
