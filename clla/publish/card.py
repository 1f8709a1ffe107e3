"""The model card of a converted checkpoint, written from what lies in its folder: report, config and pictures."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from clla.publish.card_facts import Facts, read_facts
from clla.publish.card_sections import how, limits, memory, quality, usage
from clla.storage.filenames import MODEL_CARD
from clla.storage.files import write_text
from clla.text.reading import hub_dataset

TAGS = ["clla", "kv-cache-compression"]
CITATION = """## Citation

```bibtex
@misc{clla2024,
  title         = {Lossless KV Cache Compression to 2\\%},
  year          = {2024},
  eprint        = {2410.15252},
  archivePrefix = {arXiv},
  url           = {https://arxiv.org/abs/2410.15252}
}
```"""
COMMANDS = r'from_pretrained\("|vllm serve |clla eval |clla heal '  # of a card, what stands before the model's name


def render(folder: Path, name: str) -> str:
    """README.md of a converted checkpoint: metadata for the Hub, and what a reader wants to know.

    Args:
        folder: of the checkpoint.
        name: under which the card's code loads it: a Hub id or a directory.

    Raises:
        CllaError: the folder has no valid report.
    """
    facts = read_facts(folder, name)
    share = 100 * facts.made.plan.row_bytes / facts.made.plan.source_bytes_per_token
    title = f"# {facts.origin.title}, keys and values at {share:.2f} %"
    sections = (title, usage(facts), memory(facts), quality(facts), how(facts), limits(facts), CITATION)
    return f"---\n{metadata(facts).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def write_card(folder: Path, name: str) -> None:
    """Write `README.md` of a checkpoint, as `render` has it."""
    write_text(folder / MODEL_CARD, render(folder, name))
    ModelCard.load(folder / MODEL_CARD)  # fails on a card that the Hub would not read


def retargeted(text: str, repo_id: str) -> str:
    """A card whose code loads the checkpoint from another place; the rest, edited or not, stays as it is.

    Args:
        text: of the card.
        repo_id: where the checkpoint will be.
    """
    if (found := re.search(r'from_pretrained\("([^"]+)"', text)) is None:
        return text
    return re.sub(rf"({COMMANDS}){re.escape(found[1])}(?![\w./-])", lambda match: match[1] + repo_id, text)


def metadata(facts: Facts) -> ModelCardData:
    """What the Hub sorts and links by; results only of data sets that have an id there."""
    origin, base = facts.origin, facts.origin.hub_id
    texts = [
        facts.made.recipe.calibration.dataset,
        facts.made.healing["config"]["dataset"] if facts.made.healing else "bundled",
    ]
    datasets = list(dict.fromkeys(found.repo for text in texts if (found := hub_dataset(text))))
    results = _results(facts)
    return ModelCardData(
        base_model=base,
        base_model_relation=("finetune" if facts.made.healing else "quantized") if base else None,
        license=origin.license,
        license_name=origin.license_name,
        license_link=origin.license_link,
        language=list(origin.language) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        datasets=datasets or None,
        model_name=f"{origin.title}, compressed cache" if results else None,
        eval_results=results or None,
    )


def _results(facts: Facts) -> list[EvalResult]:
    """Perplexities of converted model and source, where the text has an id on the Hub and calibration left it out."""
    report = facts.made.report
    found = hub_dataset(facts.made.text) if facts.made.text and report is not None and report.unseen else None
    if found is None or report is None:
        return []
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=found.repo,
            dataset_name=f"{found.repo}, part left out of the calibration",
            dataset_config=found.config,
            dataset_split=found.split,
            dataset_revision=found.revision,
            dataset_args={"samples": report.windows, "context": report.context, "chunk": report.chunk},
            metric_type="perplexity",
            metric_name=label,
            metric_value=report.quality[name]["perplexity"],
        )
        for name, label in (("converted", "perplexity"), ("source", "perplexity of the source"))
    ]
