"""What the package does, as functions; the commands of the same names call these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict, Unpack

from clla import console
from clla.arguments import (
    STRICT,
    Count,
    Device,
    Dtype,
    MeasuredText,
    Name,
    Natural,
    Place,
    SampleLength,
    SourceModel,
    WeightDtype,
    Word,
    checked,
    parse_size,
)
from clla.checkpoint.load import checkpoint_folder, checkpoint_reach, load_checkpoint, recipe_of, source_of
from clla.convert.pipeline import Conversion, Options
from clla.convert.pipeline import convert as run_conversion
from clla.errors import UsageError
from clla.evaluate.report import Report, before_and_after
from clla.evaluate.report_file import ReportFile
from clla.evaluate.retrieval import check_room, plantable
from clla.evaluate.seen import unseen
from clla.heal.checkpoint import CheckpointOptions, heal_checkpoint
from clla.heal.run import Healing
from clla.hub.revision import beside, plain_name
from clla.modeling.modeling_clla import CllaForCausalLM
from clla.recipe import Recipe, changes_of, load_recipe
from clla.source.device import pick_device
from clla.storage.places import expanded
from clla.text.reading import check_text
from clla.text.sequences import evaluation_samples

__all__ = [
    "Conversion",
    "HealChanges",
    "Healed",
    "Healing",
    "Recipe",
    "RecipeChanges",
    "Report",
    "RetrievalOptions",
    "convert_model",
    "evaluate_model",
    "heal_model",
    "load_model",
]

EVAL_LENGTH, EVAL_CONTEXTS, RETRIEVAL_LENGTH = 2048, (512, 2048, 8192), 4096  # where the model takes as many tokens


@dataclass(frozen=True)
class Healed:
    """Attributes: output: directory of the checkpoint; report: measured after healing, if it was; healing."""

    output: Path
    report: Report | None
    healing: Healing


class RecipeChanges(TypedDict, total=False):
    """Fields of a recipe that arguments of `convert_model` replace; see `clla recipes show --schema`."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    kv_budget: str | float | None
    budget_context: int | None
    exact_window: int | None
    num_sinks: int | None
    max_layers_per_group: int | None
    bits: str | Sequence[int] | None
    latent_input: str | None
    planner: str | None
    reading_price: float | None
    dataset: Name | None
    calibration_tokens: int | None
    sequence_length: int | None
    seed: int | None
    heal: bool
    heal_tokens: int | None
    heal_train: str | None
    report_to: Word | None
    dtype: str | None
    placement: str | None


class HealChanges(TypedDict, total=False):
    """Fields of a recipe's `heal` section; see `clla recipes show --schema`."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    tokens: int | None
    train: str | None
    codec_lr: float | None
    weight_lr: float | None
    sequence_length: int | None
    batch_tokens: int | None
    codec_share: float | None
    cache_share: float | None
    evaluations: int | None
    dataset: Name | None
    gradient_checkpointing: bool | None
    seed: int | None


class RetrievalOptions(TypedDict, total=False):
    """How codes are planted: in how many tokens, and how often."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    retrieval_context: Annotated[Count, Field(ge=128)] | None
    retrieval_trials: Count


@checked
def convert_model(
    model: Place,
    *,
    output: Place | None = None,
    recipe: Place | Recipe = "balanced",
    device: Word = "auto",
    dry_run: bool = False,
    resume: bool = False,
    work_dir: Place | None = None,
    evaluate: bool = True,
    max_shard_size: str | None = None,
    codec_only: bool = False,
    overwrite: bool = False,
    **changes: Unpack[RecipeChanges],
) -> Conversion:
    """Convert a model to shared latents within a KV byte budget, and write a checkpoint.

    Args:
        model: Hub id, directory, .gguf file or `demo`.
        output: directory of the checkpoint; default `./MODEL-clla`.
        recipe: built-in name, YAML file or `Recipe`.
        device: auto, cpu, cuda, …
        dry_run: stop after the plan: no checkpoint is written, and statistics and plan only to `work_dir`.
        resume: take up the finished stages of an interrupted run.
        work_dir: keep statistics and plans here: another budget then takes seconds.
        evaluate: measure before and after.
        max_shard_size: of the weight files, e.g. '5GB' or '2GiB'.
        codec_only: save the codec without the source's weights.
        overwrite: replace an earlier conversion in `output`.
        **changes: what replaces fields of the recipe (`RecipeChanges`): `kv_budget` ('6.25%', 0.0625 or '1440B' per
            token), `budget_context`, `exact_window`, `num_sinks`, `max_layers_per_group`, `bits` ('2,4,8' or
            (2, 4, 8)), `latent_input`, `planner`, `reading_price`, `dataset`, `calibration_tokens`, `sequence_length`,
            `seed`, `dtype` to compute in, `placement`. `heal=True` trains briefly against the source afterwards, with
            `heal_tokens`, `heal_train`, and trackers of accelerate to `report_to`.

    Returns:
        A `Conversion`: `output`, `plan`, resolved `recipe`, `predicted_kl`, the `report` of what was measured,
        `healing`, and `model`, the converted one in the dtype that was computed in (the checkpoint has the source's).
        After a dry run `report`, `healing` and `model` are None.

    Raises:
        CllaError: bad input, a limit, or an argument of another type or out of range; nothing is left half-written.

    Example:
        >>> done = clla.convert_model("MODEL", kv_budget="25%", calibration_tokens=8192, evaluate=False)
        >>> print(done.output, done.plan.row_bytes, "bytes per token")
    """
    base = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))
    options = dict(changes)
    heal, tracker = options.pop("heal", False), changes.get("report_to")
    options.pop("report_to", None)
    wanted = changes_of(options)
    trained = wanted.pop("heal", {})
    chosen = base.override({**wanted, **({"heal": trained} if heal or base.heal is not None else {})})
    if chosen.heal is None and (trained or tracker is not None):
        raise UsageError("--heal-tokens, --heal-train or --report-to without healing", remedy="add --heal")
    if max_shard_size is not None and codec_only:
        raise UsageError(
            "--max-shard-size with --codec-only", expected="one of them: no weights are saved", remedy="leave one out"
        )
    folder = expanded(output or f"{plain_name(str(model))}-clla").resolve()
    run = Options(
        output=folder,
        device=device,
        overwrite=overwrite,
        resume=resume,
        work_dir=_path(work_dir),
        codec_only=codec_only,
        dry_run=dry_run,
        report=evaluate,
        tracker=tracker,
        max_shard_size=None if max_shard_size is None else parse_size(max_shard_size, "--max-shard-size"),
    )
    return run_conversion(str(model), chosen, run)


@checked
def heal_model(
    checkpoint: Place,
    *,
    output: Place | None = None,
    source_model: Name | None = None,
    report_to: Word | None = None,
    device: Word = "auto",
    dtype: Dtype = "auto",
    resume: bool = False,
    work_dir: Place | None = None,
    evaluate: bool = True,
    overwrite: bool = False,
    **changes: Unpack[HealChanges],
) -> Healed:
    """Train a converted model briefly against its source, and write another checkpoint.

    Args:
        checkpoint: directory or Hub id.
        output: directory of the healed checkpoint; default `CHECKPOINT-healed`.
        source_model: what it was converted from; default: the checkpoint's own weights, or where they came from.
        report_to: a tracker of accelerate: tensorboard, wandb, …
        device: auto, cpu, cuda, …
        dtype: of all that is not trained: auto, float32, bfloat16 or float16.
        resume: go on from the last saved step.
        work_dir: keep text and states here.
        evaluate: measure before and after.
        overwrite: replace an earlier checkpoint in `output`.
        **changes: fields of the recipe's `heal` section (`HealChanges`): `tokens` to train on, what to `train`,
            `codec_lr`, `weight_lr`, `sequence_length`, `batch_tokens`, `codec_share`, `cache_share`, `evaluations`,
            `dataset`, `gradient_checkpointing`, `seed`.

    Returns:
        A `Healed`: `output`, the `report` of what was measured afterwards, and `healing`, the course of the training
        with what was measured before.

    Raises:
        CllaError: bad input, or a limit; nothing is left half-written.

    Example:
        >>> done = clla.heal_model("MODEL-clla", tokens=2048, sequence_length=512, batch_tokens=512, evaluate=False)
        >>> print(done.healing.verdict)
    """
    folder = expanded(output or beside(str(checkpoint), "-healed")).resolve()
    options = CheckpointOptions(
        output=folder,
        device=device,
        dtype=dtype,
        teacher=source_model,
        overwrite=overwrite,
        resume=resume,
        work_dir=_path(work_dir),
        report=evaluate,
        tracker=report_to,
    )
    _, after, healing = heal_checkpoint(str(checkpoint), dict(changes), options)
    return Healed(folder, after, healing)


@checked
def evaluate_model(
    checkpoint: Place,
    *,
    text: MeasuredText = "bundled",
    num_samples: Count = 4,
    sequence_length: SampleLength = None,
    chunk: Count | None = None,
    attend_top_k: Natural | None = None,
    contexts: Annotated[Sequence[Count], Field(min_length=1)] | None = None,
    retrieval: bool = True,
    source_model: SourceModel = None,
    device: Device = "auto",
    dtype: WeightDtype = "auto",
    **planted: Unpack[RetrievalOptions],
) -> Report:
    """Measure perplexity, KL, retrieval and cache bytes of a converted model against its source.

    Args:
        checkpoint: directory or Hub id.
        text: to measure on: a file, a Hub data set, or `bundled`, of which that part is taken that calibration
            leaves out. The report's `unseen` says what the checkpoint's record tells of it.
        num_samples: samples of text.
        sequence_length: tokens per sample; default 2048, or what the model takes.
        chunk: tokens per forward pass; default: the exact window.
        attend_top_k: old tokens read in full, 0 for all. Measures what decoding does, in forward passes of as few
            tokens as that needs; without it prompts are measured, which read everything.
        contexts: lengths in tokens at which caches are measured; default 512, 2048 and 8192, as far as the model goes.
        retrieval: also plant codes and ask for them.
        source_model: what it was converted from, where the weights were trained; default: from the recipe.
        device: auto, cpu, cuda, …
        dtype: auto, float32, bfloat16 or float16.
        **planted: `retrieval_context`, tokens in which a code is planted (default 4096, or what the model takes), and
            `retrieval_trials` (default 8).

    Returns:
        A `Report`: what was measured of both models, by name.

    Raises:
        CllaError: no such checkpoint, it is damaged, the model has no positions for a length, or there is too little
            text.

    Example:
        >>> report = clla.evaluate_model("MODEL-clla", num_samples=1, sequence_length=256, retrieval=False)
        >>> print(report.quality["converted"]["perplexity"] / report.quality["source"]["perplexity"])
    """
    retrieval_context, retrieval_trials = planted.get("retrieval_context"), planted.get("retrieval_trials", 8)
    where = pick_device(device)
    check_text(text)
    folder = checkpoint_folder(str(checkpoint))
    reach = checkpoint_reach(folder)
    reach.check_option("--sequence-length", sequence_length)
    reach.check_option("--contexts", max(contexts) if contexts else None)
    reach.check_option("--retrieval-context", retrieval_context if retrieval else None)
    loaded = load_checkpoint(str(folder), device=where, dtype=dtype)
    if attend_top_k is not None:
        chunk = _select(loaded.model, attend_top_k, chunk)
    trained = source_model is not None or loaded.model.config.spec.healed is not None
    source = source_of(loaded, recipe_of(loaded.folder), source_model, where) if trained else None
    length = sequence_length or reach.fit(EVAL_LENGTH)
    around = 0  # tokens around a planted code
    if retrieval and retrieval_context is not None:
        check_room(loaded.tokenizer, around := retrieval_context)
    elif retrieval:
        around = plantable(loaded.tokenizer, reach.fit(RETRIEVAL_LENGTH))
    ids = evaluation_samples(text, loaded.tokenizer, count=num_samples, length=length)
    with console.progress("Measuring (samples)", len(ids)) as advance:
        return before_and_after(
            loaded.model,
            loaded.tokenizer,
            loaded.plan,
            ids,
            chunk=chunk,
            contexts=tuple(map(reach.fit, EVAL_CONTEXTS)) if contexts is None else tuple(contexts),
            retrieval_context=around,
            retrieval_trials=retrieval_trials,
            unseen=unseen(text, ReportFile.of(loaded.folder, loaded.plan).fitted, left_out=text == "bundled"),
            source_model=source,
            on_step=advance,
        )


@checked
def load_model(checkpoint: Place, *, device: Word = "auto", dtype: Dtype = "auto") -> tuple[CllaForCausalLM, Any]:
    """A converted model, ready to generate, and its tokenizer; all files are compared with their checksums.

    Args:
        checkpoint: directory or Hub id.
        device: auto, cpu, cuda, …
        dtype: auto, float32, bfloat16 or float16.

    Returns:
        Model and tokenizer.

    Raises:
        CllaError: no such checkpoint, or it is damaged.

    Example:
        >>> model, tokenizer = clla.load_model("MODEL-clla")
        >>> ids = tokenizer("The sky is", return_tensors="pt").input_ids
        >>> print(tokenizer.decode(model.generate(ids, max_new_tokens=8)[0]))
    """
    loaded = load_checkpoint(str(checkpoint), device=pick_device(device), dtype=dtype)
    return loaded.model, loaded.tokenizer


def _select(model: CllaForCausalLM, tokens: int, chunk: int | None) -> int:
    """Have a model select tokens; tokens per step at which it does so."""
    model.attend_top_k = tokens
    most = model.reading_tokens
    if chunk is not None and chunk > most:
        raise UsageError(
            f"steps of {chunk} tokens read all old ones", expected=f"at most {most}", remedy=f"pass --chunk {most}"
        )
    return min(most, chunk or most)


def _path(path: str | Path | None) -> Path | None:
    return expanded(path) if path is not None else None
