"""docs/models.md, and whether it says what the checks of tests/end_to_end (families, family_commands) find.

A test run changes nothing: a cell or a page that differs from what was found fails it. `make models-page` writes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from clla.source.families import FAMILIES, NO_CACHE
from clla.source.model import Source

CHECKS = ("full rank", "first source", "step by step", "padding", "bytes", "save and load", "generate", "without clla")
COMMANDS = tuple(f"clla {name}" for name in ("convert", "generate", "eval", "report", "bench", "heal"))
COLUMNS = (*CHECKS, *COMMANDS)
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
REMEDY = "If that is right: make models-page"
ROTATIONS = {
    "halves": "halves",
    "halves_once": "halves",
    "pairs": "pairs",
    "pairs_of_halves": "pairs",
}
# What is special about models outside the table in `clla.source.families`.
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

Written from what the tests find (`make models-page`), which put a tiny model of every family through the same checks:

- **full rank**: a conversion that cuts nothing reproduces the logits of the source.
- **first source**: the same with latents read from a group's first layer (`plan.latent_input: first_layer`).
- **step by step**: a prompt and then token by token give the logits of one forward pass.
- **padding**: a sequence padded on the left, in a batch, gives the logits that it gives alone.
- **bytes**: the latents and the exact tokens take the bytes that the plan says.
- **save and load**: written as `clla convert` does, with the weights and with the codec alone, and loaded again: the
  same weights, bit for bit, and the same logits.
- **generate**: greedy decoding gives the tokens of the source.
- **without clla**: the same logits and tokens where only transformers and the code in the checkpoint are there.
- **clla convert** and the columns after it: the command runs; `convert` with its report, `heal` with the codec alone.
  "no: own attention" says that `heal` refuses it, since its attention does not go through transformers' interface.
  Of caches that are measured, all bytes are those that the plan says, windows and states of layers left alone included.

Where no length is given, calibration, reports, `eval`, `bench`, `compare`, `heal` and `generate` keep to what a model
takes: the positions of GPT-2 and OPT and the biases of MPT end, other models were trained up to
`max_position_embeddings`. Beyond an end a length is refused; beyond the trained length it is used with a warning.

"Keys" says how the model was found to rotate its keys; nothing of that is told to the code. Layers left alone keep the
source's own cache, which does not grow with the context. Other models are tried: after loading, a few tokens run
through a lossless cache of ours, and if the logits are not those of the source the model is refused.

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
import clla

clla.extract_language_model("MODEL", "text-model")
```

It takes the language model out by transformers' own classes, with its tokenizer, compares its logits with those of the
whole and writes nothing if they differ. Tried with
{extracted}.
The language models within Qwen2-VL, Qwen2.5-VL and
Qwen3-VL have no class of their own: for text they are Qwen2 and Qwen3 models, and are saved as such. What has neither
(GLM-4V) is refused.
"""


@dataclass
class Table:
    """What was found, family by family."""

    families: dict[str, tuple[str, str, str]] = field(default_factory=dict)  # by name: special, keys, left alone
    checks: dict[str, dict[str, str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    tried: dict[str, str] = field(default_factory=dict)
    extracted: set[str] = field(default_factory=set)  # models for images whose language model was taken out
    writing: bool = False  # the page is written, whatever it says

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
        """Note a check that a family passed; the page must say so, unless it is being written."""
        assert check in COLUMNS
        self.checks.setdefault(name, {})[check] = verdict
        if not self.writing:
            said = tracked_cells().get((name, check))
            assert said == verdict, f"docs/models.md says {said!r} of {name}, {check}: {verdict!r}. {REMEDY}"

    def render(self, names: list[str]) -> str | None:
        """The page; None if not every family of `names` went through every check."""
        complete = all(self.checks.get(name, {}).keys() == set(COLUMNS) for name in names)
        if not complete or not self.refused or not self.tried or not self.extracted:
            return None
        header = ["model", "special", "keys", "left alone", *COLUMNS]
        rows = [
            [f"`{name}`", *self.families[name], *(self.checks[name][check] for check in COLUMNS)]
            for name in sorted(names)
        ]
        lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
        kinds = ", ".join(f"`{kind}`" for kind in sorted(self.extracted))
        after = AFTER.format(refused=_listed(self.refused), tried=_listed(self.tried), extracted=kinds)
        return INTRODUCTION + "\n".join(lines) + "\n" + after


@cache
def tracked_cells() -> dict[tuple[str, str], str]:
    """What docs/models.md says of each family and check."""
    found: dict[tuple[str, str], str] = {}
    header: list[str] = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("| ") else []
        if cells and cells[0] == "model":
            header = cells
        for column, cell in zip(header, cells, strict=False):
            found[cells[0].strip("`"), column] = cell
    return found


def _listed(reasons: dict[str, str]) -> str:
    """One line for each reason, with the models it holds for."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in sorted(reasons.items()):
        by_reason.setdefault(reason, []).append(f"`{name}`")
    return "\n".join(f"- {', '.join(names)}: {reason}" for reason, names in sorted(by_reason.items()))


TABLE = Table()
