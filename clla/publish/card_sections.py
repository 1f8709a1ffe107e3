"""The sections of a model card. Every figure comes from the report or follows from its plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clla.artifacts.plan import Plan
from clla.evaluate.plan_tables import groups_table
from clla.publish.card_facts import Facts
from clla.publish.origin import HUB
from clla.storage.filenames import HEALING_PICTURE, PLAN_PICTURE, QUALITY_PICTURE
from clla.tables import Table
from clla.text.reading import hub_dataset

CONTEXTS = (2048, 8192, 32768)  # at which bytes are planned, and the model's own longest
BUNDLED = "the English text that comes with `clla` (prose and technical documents, public domain)"
CODE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
{prompt}
output = model.generate(**inputs, max_new_tokens=40)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```"""
PLAIN = 'inputs = tokenizer("The cache of a language model is", return_tensors="pt")'
CHAT = """messages = [{"role": "user", "content": "Why is the sky blue?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""
VLLM = """With vLLM, where your version of `clla` has the plugin for it:

```sh
pip install "clla[vllm]"
vllm serve {name}
```"""


def usage(facts: Facts) -> str:
    """What it is, and how to load it."""
    plan, groups = facts.made.plan, len(facts.made.plan.groups)
    shared = f"{groups} layer groups share a quantized latent each" if groups > 1 else "All layers share one latent"
    parts = [
        f"{facts.source} with its key-value cache compressed by `clla`: Cross-Layer Latent Attention "
        f"([arXiv 2410.15252](https://arxiv.org/abs/2410.15252)). {shared}, {plan.row_bytes:,} bytes per token where "
        f"the source keeps {plan.source_bytes_per_token:,}; {_exact(plan)}. {_weights(facts)}",
        "## Use",
        CODE.format(name=facts.name, prompt=CHAT if facts.chat else PLAIN),
        "`generate()` uses the compressed cache by itself: greedy, sampling, beams, padded batches, several turns. The "
        "code that runs it is in this repository, hence `trust_remote_code=True`; with the package `clla` installed, "
        "`clla.register()` does instead.",
    ]
    if facts.codec_only:
        parts.append(_codec_only(facts))
    return "\n\n".join([*parts, VLLM.format(name=facts.name)])


def memory(facts: Facts) -> str:
    """Bytes per token by context, planned and measured, and from where on anything is gained."""
    plan, longest = facts.made.plan, facts.origin.longest_context
    measured = facts.made.report.cache_bytes if facts.made.report else {}
    rows = []
    for context in sorted({c for c in (*CONTEXTS, longest or 0) if 0 < c <= (longest or c)} | measured.keys()):
        kept = plan.kept_bytes_at(context)
        source, planned = (
            (total + kept) / context for total in (plan.source_bytes_per_token * context, plan.bytes_at(context))
        )
        found = f"{measured[context]['bytes_per_token']:,.0f}" if context in measured else ""
        rows.append((f"{context:,}", f"{source:,.0f}", f"{planned:,.0f}", f"{100 * planned / source:.2f} %", found))
    parts = [
        "## Cache",
        "Bytes per token of one sequence, exact tokens and scales included:",
        Table.of(("context", "source", "planned", "of the source", "measured"), rows).markdown(),
        _gain(plan),
    ]
    if plan.kept_layers:
        counted = "; it is counted in the table" if plan.kept_bytes_at(plan.kept_window) else ""
        layers = ", ".join(map(str, plan.kept_layers))
        parts.append(f"Layers {layers} are as they were: their cache is bounded by {plan.bound}{counted}.")
    return "\n\n".join([*parts, *_picture(facts, PLAN_PICTURE, "Latent components and bits of each layer group")])


def quality(facts: Facts) -> str:
    """Perplexity, KL and retrieval of source and converted model, and how they were measured."""
    report = facts.made.report
    if report is None:
        return f"## Quality\n\nNothing was measured when this was written. `clla eval {facts.name}` does."
    seen = {
        True: "which calibration left out",
        False: "which **calibration had read too**",
        None: "of which it is **not known whether calibration had read it**",
    }[report.unseen]
    parts = [
        "## Quality",
        report.quality_table(facts.made.before).markdown(),
        f"{report.windows} samples of {report.context:,} tokens of {text_of(facts.made.text)}, {seen}; each from an "
        f"empty cache, {report.chunk:,} tokens per forward pass, read through the cache as in generation. All rows "
        "come from one run. KL is that from the source's predictions to the row's, mean over all tokens.",
    ]
    if report.retrieval:
        codes = report.retrieval_table().markdown()
        parts += ["A five-digit code planted in the text and asked for at its end:", codes]
    return "\n\n".join([*parts, *_picture(facts, QUALITY_PICTURE, "Perplexity against cache bytes")])


def how(facts: Facts) -> str:
    """The recipe as a sentence and as tables, and what healing did."""
    plan, recipe = facts.made.plan, facts.made.recipe
    tokens = facts.made.calibration_tokens or recipe.calibration.tokens or 0
    at = f" at {plan.at_context:,} tokens" if plan.at_context else ", latents alone"
    settings = [
        ["budget", f"{recipe.budget.kv_budget} of the source's cache{at}"],
        [
            "latent from",
            "keys and values of the whole group" if plan.source == "group" else "its first layer's attention input",
        ],
        ["exact", f"newest {plan.window:,} to {plan.window + plan.flush_block:,} tokens, first {plan.sinks}"],
        ["metric, planner", f"{recipe.plan.metric}, {recipe.plan.planner}"],
        ["calibration", f"{tokens:,} tokens of {text_of(recipe.calibration.dataset)}, seed {recipe.calibration.seed}"],
    ]
    if recipe.provenance:
        settings.append(["versions", ", ".join(f"{k} {v}" for k, v in recipe.provenance.versions.items())])
    parts = [
        "## How it was made",
        "Second moments of keys and values and the Fisher metric of the loss were taken on the calibration text; they "
        "decide which layers share a latent, how long it is and how many bits each component gets. "
        "`clla_recipe.yaml` repeats the conversion, `clla_report.json` holds every figure.",
        Table.of((), settings, words=2).markdown(),
        groups_table(plan).markdown(),
    ]
    if facts.made.healing:
        parts += [_healing(facts.made.healing), *_picture(facts, HEALING_PICTURE, "Held-out KL while healing")]
    return "\n\n".join(parts)


def limits(facts: Facts) -> str:
    """What is lost, and what nobody measured."""
    report, points = facts.made.report, []
    if report is not None:
        rise = 100 * (report.quality["converted"]["perplexity"] / report.quality["source"]["perplexity"] - 1)
        points.append(
            f"On the text above, {report.context:,} tokens at a time, perplexity is {abs(rise):.2f} % "
            f"{'above' if rise >= 0 else 'below'} the source's. Longer contexts, other texts and tasks may lose more "
            "and were not measured."
        )
        if not report.retrieval:
            points.append("Whether facts far back are still found was not measured.")
    else:
        points.append("Its loss against the source was not measured.")
    points.append(
        f"It was fitted to {text_of(facts.made.recipe.calibration.dataset)}. Other languages and kinds of text lie "
        "further from what the latents keep best."
    )
    origin = facts.origin
    if origin.license is None:
        base = f"[base model's]({HUB}/{origin.hub_id})" if origin.hub_id else "base model's"
        points.append(f"No licence was found with the source: check the {base} before you use or share this.")
    else:
        points.append("Licence and intended use are the base model's.")
    return "## Limits\n\n" + "\n".join(f"- {point}" for point in points)


def text_of(dataset: str | None) -> str:
    """A text as the recipe names it, in words; of a local file only its name."""
    if dataset is None:
        return "a text that the report does not name"
    if dataset in ("bundled", "self"):
        return BUNDLED if dataset == "bundled" else "text that the model wrote itself"
    if found := hub_dataset(dataset):
        config = f"configuration `{found.config}`, " if found.config else ""
        return f"[{found.repo}]({HUB}/datasets/{found.repo}) ({config}split `{found.split}`)"
    return f"a local file, `{Path(dataset).name}`"


def _exact(plan: Plan) -> str:
    kept = [f"the newest {plan.window:,} tokens"] if plan.window else []
    kept += [f"the first {plan.sinks}"] if plan.sinks else []
    return (" and ".join(kept) + " stay exact") if kept else "no token stays exact"


def _weights(facts: Facts) -> str:
    if facts.codec_only:
        return "This repository holds the codec alone; the weights are the base model's."
    trained = facts.made.healing["config"]["train"] if facts.made.healing else "codec"
    if facts.made.plan.decoupled and not facts.made.healing:
        return "The weights are those of the source. **Keys are decoupled: of no use before `clla heal` trained them.**"
    if trained == "codec":
        return "The model's weights are those of the source."
    return f"The model was trained briefly against the source (`{trained}`: {_trained(trained)})."


def _trained(what: str) -> str:
    return {"codec": "the codec", "attention": "codec and attention", "all": "codec and all weights"}[what]


def _codec_only(facts: Facts) -> str:
    if facts.origin.hub_id:
        return f"Loading it fetches the weights from {facts.source}, in the revision that was converted."
    return (
        f"Loading it needs the weights of {facts.source}, unchanged, in the place that `config.json` names as "
        "`base_model.path`: write yours there. Their checksums are compared by `clla`."
    )


def _gain(plan: Plan) -> str:
    least = plan.break_even
    if least is None:
        return "At this budget nothing is gained over the source's cache."
    said = (
        f"The exact tokens take up to {plan.exact_bytes:,.0f} bytes per sequence. Sequences below {least:,} tokens "
        "gain nothing: all their tokens are exact."
    )
    if plan.codec_bytes is None:
        return said
    megabytes, whole = plan.codec_bytes / 1e6, plan.break_even_beside(plan.codec_bytes)
    return (
        f"{said} The codec's weights take {megabytes:,.1f} MB beside the model's: with them memory is saved from "
        f"{whole:,} tokens on."
    )


def _healing(healing: dict[str, Any]) -> str:
    config = healing["config"]
    return (
        f"Healing trained {_trained(config['train'])} on {text_of(config['dataset'])}, with the source's predictions "
        f"as targets. {healing['verdict']}."
    )


def _picture(facts: Facts, name: str, words: str) -> list[str]:
    return [f"![{words}]({name})"] if name in facts.pictures else []
