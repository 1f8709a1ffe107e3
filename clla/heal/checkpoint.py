"""Heal a converted checkpoint: load it with its source, train, measure, write another checkpoint."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import PartialState

from clla.checkpoint.load import checkpoint_folder, checkpoint_reach, load_checkpoint, recipe_of, source_of
from clla.checkpoint.write import (
    RunOptions,
    check_kept,
    check_output,
    check_work_dir,
    finished_directory,
    tidy,
    write_checkpoint,
)
from clla.errors import resumable
from clla.evaluate.report import Report
from clla.evaluate.report_file import ReportFile
from clla.evaluate.seen import unseen
from clla.heal.run import HEAL_LENGTH, REPORT_LENGTH, REPORT_SAMPLES, Healing, HealOptions, heal_and_measure
from clla.heal.sharding import launched_sharded
from clla.heal.text import healed_on
from clla.publish.card import write_card
from clla.recipe import SHORTEST, Recipe
from clla.source.device import pick_device, start_processes
from clla.storage.filenames import RECIPE
from clla.storage.files import write_text
from clla.storage.places import expanded, holding
from clla.text.reading import check_text
from clla.text.sequences import report_samples, report_text


@dataclass(frozen=True)
class CheckpointOptions(RunOptions):
    """How a checkpoint is healed.

    Attributes:
        dtype: of the teacher and of everything that is not trained.
        teacher: the source; needed only where the checkpoint's weights are no longer the source's.
    """

    dtype: str = "auto"
    teacher: str | None = None


def heal_checkpoint(
    path: str, changes: dict[str, Any], options: CheckpointOptions
) -> tuple[Recipe, Report | None, Healing]:
    """Heal a checkpoint that `clla convert` wrote.

    Args:
        path: its directory or Hub id.
        changes: fields of the recipe's `heal` section.
        options: how to run.

    Raises:
        CllaError: bad input; nothing is left half-written.
    """
    processes, device = start_processes(pick_device(options.device))
    launched_sharded()  # refuses what cannot be, before weights are read
    places = (options.output, options.work_dir) if options.work_dir else (options.output,)
    with holding(*places) if processes.is_main_process else nullcontext():
        return _heal(path, changes, options, processes, device)


def _heal(
    path: str, changes: dict[str, Any], options: CheckpointOptions, processes: PartialState, device: torch.device
) -> tuple[Recipe, Report | None, Healing]:
    """`heal_checkpoint` once nobody else writes to the same places."""
    if processes.is_main_process:
        tidy(options.output)
    check_work_dir(options.work_dir, options.output)
    check_output(options.output, expanded(path), overwrite=options.overwrite)
    work = options.work
    if options.work_dir is None and work.exists():
        check_kept(work)
    if changes.get("dataset") not in (None, "self"):
        check_text(changes["dataset"])
    folder = checkpoint_folder(path)
    reach = checkpoint_reach(folder)
    reach.check_option("--sequence-length", changes.get("sequence_length"))
    length = changes.get("sequence_length") or reach.fit_sequence(HEAL_LENGTH, SHORTEST)
    recipe = recipe_of(folder).model_copy(update={"heal": None})
    recipe = recipe.override({"heal": {**changes, "sequence_length": length}})
    assert recipe.heal is not None
    loaded = load_checkpoint(str(folder), device=device, dtype=options.dtype)
    teacher = source_of(loaded, recipe, options.teacher, device)
    measured, text = None, recipe.heal.dataset or recipe.calibration.dataset
    earlier = ReportFile.of(folder, loaded.plan)
    fitted = earlier.fitted
    if fitted is not None:
        fitted = [*fitted, healed_on(text, loaded.tokenizer, length=length)]
    if options.report:
        wanted = reach.fit(REPORT_LENGTH)
        samples, left_out = report_samples(text, loaded.tokenizer, count=REPORT_SAMPLES, length=wanted, fallback=length)
        measured = samples, unseen(report_text(text), fitted, left_out=left_out)
    logs = options.output.with_name(options.output.name + "-logs")
    how = HealOptions(work / "heal", resume=options.resume, tracker=options.tracker, logs=logs)
    stored = getattr(torch, loaded.model.config.spec.kv_dtype)
    with resumable(work):
        model, report, healing = heal_and_measure(
            loaded.model, teacher, loaded.tokenizer, loaded.plan, recipe, measured, how
        )
    recipe = recipe.model_copy(update={"heal": healing.config})
    if not processes.is_main_process:
        return recipe, report, healing
    needed = sum(tensor.numel() for tensor in model.state_dict().values()) * stored.itemsize
    with finished_directory(options.output, needed=needed) as out:
        write_checkpoint(out, model, loaded.tokenizer, base_model=None, dtype=stored)
        write_text(out / RECIPE, recipe.to_yaml())
        replace(
            earlier,
            recipe=recipe,
            report=report,
            text=report_text(text),
            healing=healing.to_json(),
            fitted=fitted,
        ).save(out)
        write_card(out, options.output.name)
    if options.work_dir is None:
        shutil.rmtree(work)
    return recipe, report, healing
