"""The model card of a converted checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from clla.artifacts import Plan, write_text
from clla.evaluate.report import LABELS, Report
from clla.recipe import Recipe

BODY = """
# {title}

{base} with its key-value cache compressed by `clla` (Cross-Layer Latent Attention,
[arXiv 2410.15252](https://arxiv.org/abs/2410.15252)): neighbouring layers share one quantized latent a token.

| | bytes a token |
|---|---|
| source cache | {source:,} |
| latents | {latents:,} ({latents_share:.2f} %) |
| in all at {context:,} tokens, exact window included | {total:,.0f} ({total_share:.2f} %) |

{measured}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{path}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{path}", trust_remote_code=True)
ids = tokenizer("The cache is", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))
```

`generate()` uses the compressed cache by itself. With `clla` installed, `import clla` replaces
`trust_remote_code=True`.

## How it was made

{groups} layer groups of up to {largest} layers, window {window}, {sinks} sinks, latent source
`{source_kind}`, calibrated on {tokens} tokens of `{dataset}`. {training}
`clla_recipe.yaml` repeats the conversion, `clla_report.json` holds every figure.

![plan](clla_plan.png)
"""


NO_TRAINING = "The weights are those of the source; no training."
TRAINING = "Then trained against the source (KL on its predictions; trained: {train}). {verdict}."


def write_card(
    folder: Path,
    name: str,
    plan: Plan,
    recipe: Recipe,
    report: Report | None,
    *,
    tokens: int | None,
    healing: dict[str, Any] | None = None,
) -> None:
    """README.md of a converted checkpoint.

    Args:
        folder: the checkpoint.
        name: the source model as the user gave it.
        plan: what was planned.
        recipe: resolved.
        report: what was measured, if anything.
        tokens: that calibration read, where known.
        healing: what it did, from `Healing.to_json`.
    """
    hub_id = name if "/" in name and not Path(name).exists() else None
    data = ModelCardData(
        base_model=hub_id,
        base_model_relation=("finetune" if healing else "quantized") if hub_id else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["clla", "kv-cache-compression"],
    )
    context = plan.at_context or 8192
    total, source = plan.bytes_at(context) / context, plan.source_bytes_per_token
    title = Path(name).stem if hub_id is None else hub_id.split("/")[-1]
    body = BODY.format(
        title=f"{title}, cache at {100 * total / source:.3g} %",
        base=name if hub_id else title,
        source=source,
        latents=plan.row_bytes,
        latents_share=100 * plan.row_bytes / source,
        context=context,
        total=total,
        total_share=100 * total / source,
        measured=_measured(report),
        path=folder.name.removesuffix(".partial"),
        groups=len(plan.groups),
        largest=max(len(group.layers) for group in plan.groups),
        window=plan.window,
        sinks=plan.sinks,
        source_kind=plan.source,
        tokens=f"{tokens or recipe.calibration.tokens or 0:,}",
        training=TRAINING.format(**healing["config"], verdict=healing["verdict"]) if healing else NO_TRAINING,
        dataset=Path(recipe.calibration.dataset).name,  # no local path leaves the machine
    )
    write_text(folder / "README.md", f"---\n{data.to_yaml()}\n---\n{body}")
    ModelCard.load(folder / "README.md")  # fails on a card that the Hub would not read


def _measured(report: Report | None) -> str:
    if report is None:
        return ""
    seen = ", left out of the calibration" if report.unseen else " of the calibration text"
    rows: list[Any] = [
        f"Measured on {report.windows} windows of {report.context} tokens{seen}:",
        "",
        "| | perplexity | cache bytes a token |",
        "|---|---|---|",
    ]
    for name, row in report.quality.items():
        rows.append(f"| {LABELS[name]} | {row['perplexity']:.3f} | {row['bytes_per_token']:,.0f} |")
    return "\n".join(rows)
