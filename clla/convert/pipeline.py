"""The one function that knows the order of the stages: recipe, stats, plan, codec, checkpoint, report."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from clla import console
from clla.artifacts.plan import Plan
from clla.checkpoint.assemble import attach
from clla.checkpoint.checksums import WEIGHTS, base_checksums
from clla.checkpoint.write import (
    RunOptions,
    check_kept,
    check_memory,
    check_output,
    check_room,
    check_work_dir,
    finished_directory,
    tidy,
    write_checkpoint,
)
from clla.convert.stages import Run, moment_bytes, resolve, stats_bytes
from clla.errors import UsageError, resumable
from clla.evaluate.report import Report, before_and_after
from clla.evaluate.report_file import ReportFile
from clla.evaluate.seen import fitted_text, unseen
from clla.heal.run import Healing, HealOptions, check_healing, heal_and_measure
from clla.heal.sharding import launched_sharded
from clla.heal.student import check_attention
from clla.heal.text import healed_on
from clla.modeling.modeling_clla import CllaForCausalLM
from clla.plan.metrics import weigh
from clla.publish.card import write_card
from clla.publish.origin import origin_of
from clla.recipe import Recipe, load_recipe
from clla.source.device import pick_device, start_processes
from clla.source.model import Source, model_folder, open_source
from clla.storage.filenames import RECIPE
from clla.storage.files import write_text
from clla.storage.places import check_writable, expanded, holding
from clla.text.reading import check_text
from clla.text.sequences import report_text


@dataclass(frozen=True)
class Options(RunOptions):
    """How a conversion runs.

    Attributes:
        codec_only: save the codec without the source's weights.
        dry_run: stop after the plan.
        max_shard_size: bytes of a weight file; by default 5 GB, or one layer where layers are read from disk.
    """

    codec_only: bool = False
    dry_run: bool = False
    max_shard_size: int | None = None


@dataclass(frozen=True)
class Conversion:
    """What a conversion made.

    Attributes:
        output: directory of the checkpoint; not written after a dry run.
        plan: that the model runs on.
        recipe: resolved.
        predicted_kl: nats per token, by second order; what is measured was six to fourteen times that.
        report: what was measured, if it was.
        model: converted, in the dtype that was computed in; None after a dry run.
        healing: what training did, if it was trained.
    """

    output: Path
    plan: Plan
    recipe: Recipe
    predicted_kl: float
    report: Report | None
    model: CllaForCausalLM | None
    healing: Healing | None = None

    @property
    def needs_healing(self) -> bool:
        """Whether it is not to be used before it is trained: a decoupled key is too far from the source's."""
        return self.plan.decoupled and self.healing is None


def convert(name: str, recipe: Recipe, options: Options) -> Conversion:
    """Convert a model from its name to a checkpoint on disk.

    Args:
        name: Hub id, directory, .gguf file or `demo`.
        recipe: what to make.
        options: how to run.

    Raises:
        CllaError: bad input; nothing is left half-written.
    """
    processes, device = start_processes(pick_device(options.device))
    launched_sharded()  # refuses what cannot be, before weights are read
    places = {options.output, options.work} if options.work_dir else {options.output}
    with holding(*places) if processes.is_main_process else nullcontext():
        return _prepared(name, recipe, options, processes, device)


def _prepared(name: str, recipe: Recipe, options: Options, processes: PartialState, device: torch.device) -> Conversion:
    """`convert` once nobody else writes to the same places: all that can be is checked before anything is read."""
    if processes.is_main_process:
        tidy(options.output)
    check_work_dir(options.work_dir, options.output)
    if options.dry_run:
        check_writable(options.output, "--output")
    else:
        resumed = options.resume and (options.output / RECIPE).is_file()  # more is known later
        check_output(options.output, expanded(name), overwrite=options.overwrite or resumed)
    texts = {recipe.calibration.dataset, recipe.heal.dataset if recipe.heal is not None else None}
    for text in texts - {None, "self"}:
        check_text(str(text))
    source = open_source(name)
    recipe = resolve(recipe, source, device)
    if options.codec_only and recipe.heal is not None and recipe.heal.train != "codec":
        raise UsageError(
            "--codec-only with healing that trains weights",
            expected="heal.train 'codec', which leaves the source's weights alone",
            remedy="pass --heal-train codec, or leave out --codec-only",
        )
    if recipe.heal is not None:
        check_healing(
            recipe.heal,
            window=recipe.budget.exact_window or 0,
            flush_block=recipe.plan.flush_block,
            tracker=options.tracker,
        )
    if not options.dry_run:
        ours = options.resume and _is_result(options.output, recipe)
        if ours and not options.overwrite and not options.work.exists():
            raise UsageError(
                f"{options.output} is complete: there is nothing to resume",
                expected="an interrupted run",
                remedy="use it, or pass --overwrite to make it again",
            )
        check_output(options.output, expanded(name), overwrite=options.overwrite or ours)
    check_room(_bytes_needed(source, recipe, options))
    check_memory(moment_bytes(source, recipe, streamed=True))
    with _work_dir(options, processes) as work, resumable(work):
        return _convert(source, recipe, options, processes, device, work)


def _convert(
    source: Source, recipe: Recipe, options: Options, processes: PartialState, device: torch.device, work: Path
) -> Conversion:
    """`convert` once all is checked that can be before anything is read; what can be taken up again stays in `work`."""
    run = Run(source, recipe, device, work)
    if run.placement == "stream" and recipe.heal is not None:
        raise UsageError(
            "healing a model whose layers are read from disk",
            expected="a model that fits in memory, with its gradients",
            remedy="convert it without --heal, and run clla heal on a machine that holds it",
        )

    if recipe.heal is not None:
        check_attention(run.model(), source.layers)
    stats = run.stats()
    spectra = weigh(stats, recipe, device)
    plan = run.plan(stats, spectra)
    codec = run.codec(stats, spectra, plan)
    processes.wait_for_everyone()
    if options.dry_run or (recipe.heal is None and not processes.is_main_process):
        return Conversion(options.output, plan, recipe, codec.predicted_kl, None, None)

    converted = attach(run.model_as_stored(), codec, run.block(plan))
    tokenizer = run.tokenizer
    report = healing = None
    fitted, text = [fitted_text(recipe.calibration.dataset)], report_text(recipe.calibration.dataset)
    if recipe.heal is not None:
        learned, length = recipe.heal.dataset or recipe.calibration.dataset, recipe.heal.sequence_length
        assert length is not None, "the recipe is not resolved"
        fitted.append(healed_on(learned, tokenizer, length=length))
    measured = None
    if options.report and run.placement != "stream":
        samples, left_out = run.report_samples()
        measured = samples, unseen(text, fitted, left_out=left_out)
    elif options.report:
        console.say("Nothing is measured, since layers are read from disk; where the model fits: clla eval")
    if recipe.heal is not None:
        logs = options.output.with_name(options.output.name + "-logs")
        how = HealOptions(work / "heal", resume=options.resume, tracker=options.tracker, logs=logs)
        converted, report, healing = heal_and_measure(converted, run.model(), tokenizer, plan, recipe, measured, how)
        recipe = recipe.model_copy(update={"heal": healing.config})
    elif measured is not None:
        samples, known = measured
        report = before_and_after(converted, tokenizer, plan, samples, unseen=known)
    if not processes.is_main_process:
        return Conversion(options.output, plan, recipe, codec.predicted_kl, report, converted, healing)
    needed = sum(tensor.numel() for tensor in converted.state_dict().values()) * source.dtype.itemsize
    with finished_directory(options.output, needed=needed) as folder:
        write_checkpoint(
            folder,
            converted,
            tokenizer,
            base_model=_base_model(source) if options.codec_only else None,
            dtype=source.dtype,
            max_shard_size=options.max_shard_size or run.shard_size,
        )
        write_text(folder / RECIPE, recipe.to_yaml())
        ReportFile(
            plan,
            recipe,
            report,
            text,
            healing=healing.to_json() if healing else None,
            origin=origin_of(source).to_json(),
            calibration_tokens=stats.tokens,
            fitted=fitted,
            predicted_kl=codec.predicted_kl,
            reduction=stats.reduction,
            outlook=codec.outlook,
        ).save(folder)
        write_card(folder, options.output.name)
    if options.work_dir is None:
        shutil.rmtree(work)
    return Conversion(options.output, plan, recipe, codec.predicted_kl, report, converted, healing)


@contextmanager
def _work_dir(options: Options, processes: PartialState) -> Iterator[Path]:
    """Where an unfinished run keeps its parts; gone afterwards if it has none, or after a dry run that made it."""
    work = options.work
    if not processes.is_main_process:
        yield work
        return
    before = work.exists()
    for left in work.glob("*.partial"):  # of a run that was killed while it wrote
        if left.match("stats-*") or left.match("codec-*"):
            left.unlink()
    if before and options.work_dir is None:
        check_kept(work)
        if options.resume:
            console.say(f"Resuming from {work}")
        elif not options.dry_run:
            console.say(f"Starting afresh; --resume would have taken up the unfinished run in {work}")
            shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    try:
        yield work
        if options.dry_run and options.work_dir is None and not before:
            shutil.rmtree(work)
    finally:
        if options.work_dir is None and work.exists() and not any(work.iterdir()):
            work.rmdir()


def _is_result(output: Path, recipe: Recipe) -> bool:
    """Whether a directory holds what this run makes: it was interrupted after the last rename, or not at all."""
    path = output / RECIPE
    if not path.is_file():
        return False
    found = load_recipe(str(path))
    healed = found.heal is not None and recipe.heal is not None  # healing fills in its defaults later
    return found.model_copy(update={"heal": recipe.heal} if healed else {}) == recipe


def _bytes_needed(source: Source, recipe: Recipe, options: Options) -> dict[Path, int]:
    """Size of what will be written: stats, unless they are there, and the weights as they are now."""
    work = options.work
    kept = sum(file.stat().st_size for file in work.glob("stats-*.safetensors"))
    needed = {work: max(0, stats_bytes(source, recipe) - kept)}
    if not options.dry_run:
        needed[options.output] = 0 if options.codec_only else _weights_bytes(source)
    return needed


def _weights_bytes(source: Source) -> int:
    """Of a model on this machine, as it will be written; 0 for one on the Hub, whose download tells."""
    if not Path(source.path).is_dir():
        return 0
    names = [source.gguf_file] if source.gguf_file else WEIGHTS
    weights = sum(f.stat().st_size for name in names for f in Path(source.path).glob(name))
    return weights * (4 if source.gguf_file else 1)


def _base_model(source: Source) -> dict[str, Any]:
    return {
        "path": source.path,
        "gguf_file": source.gguf_file,
        "hub_revision": source.commit,
        "sha256": base_checksums(model_folder(source.path, source.commit), source.gguf_file),
    }
