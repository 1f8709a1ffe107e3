"""The one function that knows the order of the stages: recipe, stats, plan, codec, checkpoint, report."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from clla import console
from clla.artifacts import Codec, Plan, Stats, digest, write_text
from clla.baselines.stored import SourceCache
from clla.calibrate.collect import Collector, collect
from clla.calibrate.data import (
    fingerprint,
    load_documents,
    report_windows,
    self_written,
    split_held_out,
    token_batches,
)
from clla.calibrate.positions import rope_settings
from clla.convert.assemble import attach, clla_block
from clla.convert.checkpoint import check_disk, check_memory, check_output, finished_directory, write_checkpoint
from clla.convert.factor import make_codec
from clla.convert.healing import REPORT_LENGTH, REPORT_WINDOWS, Healing, HealOptions, check_healing, heal_and_measure
from clla.convert.planners import count_candidates, derive_window, latent_bits, make_plan
from clla.convert.spectra import Spectra
from clla.convert.surrogates import needs_inputs, surrogate_stats
from clla.errors import CorruptArtifactError, UsageError
from clla.evaluate.perplexity import Subject, compare
from clla.evaluate.report import Report, before_and_after, write_report
from clla.hub import write_card
from clla.modeling.modeling_clla import CllaForCausalLM
from clla.recipe import Provenance, Recipe, parse_budget
from clla.source import Source, open_source, pick_device, pick_dtype

DEFAULT_TOKENS = {"cpu": 16_384, "cuda": 262_144}
DEFAULT_BATCH = {"cpu": 1, "cuda": 8}
MAX_DEFAULT_CONTEXT = 32_768
DAMAGE_SEQUENCES, DAMAGE_CHUNK = 2, 128  # that planners measure on


@dataclass(frozen=True)
class Options:
    """How a conversion runs, as against what it makes.

    Attributes:
        output: directory of the checkpoint.
        device: `auto`, `cpu`, `cuda`, …
        overwrite: replace a directory that is not empty.
        resume: take up the finished stages of an interrupted run.
        work_dir: where stats, plan and codec are kept; kept after the run if given.
        adapter_only: save the codec without the source's weights.
        dry_run: stop after the plan.
        report: measure before and after.
        tracker: of accelerate, for healing.
    """

    output: Path
    device: str = "auto"
    overwrite: bool = False
    resume: bool = False
    work_dir: Path | None = None
    adapter_only: bool = False
    dry_run: bool = False
    report: bool = True
    tracker: str | None = None


@dataclass(frozen=True)
class Conversion:
    """Attributes: plan; recipe: resolved; predicted_kl; report; model: None after a dry run; healing."""

    plan: Plan
    recipe: Recipe
    predicted_kl: float
    report: Report | None
    model: CllaForCausalLM | None
    healing: Healing | None = None


def convert(name: str, recipe: Recipe, options: Options) -> Conversion:
    """Convert a model from its name to a checkpoint on disk.

    Args:
        name: Hub id, directory, .gguf file or `demo`.
        recipe: what to make.
        options: how to run.

    Raises:
        CllaError: bad input; nothing is left half-written.
    """
    source = open_source(name)
    device = pick_device(options.device)
    recipe = resolve(recipe, source, device)
    if options.adapter_only and recipe.heal is not None and recipe.heal.train != "codec":
        raise UsageError(
            "--adapter-only with healing that trains weights",
            expected="heal.train 'codec', which leaves the source's weights alone",
            remedy="pass --heal-train codec, or leave out --adapter-only",
        )
    if recipe.heal is not None:
        check_healing(
            recipe.heal,
            window=recipe.budget.window or 0,
            flush_block=recipe.plan.flush_block,
            tracker=options.tracker,
        )
    if not options.dry_run:
        check_output(options.output, Path(source.path), overwrite=options.overwrite)
        check_disk(options.output, _bytes_needed(source, adapter_only=options.adapter_only))
    check_memory(_moment_bytes(source, recipe))
    work = _work_dir(options)
    run = Run(source, recipe, device, work)

    stats = run.stats()
    spectra = weigh(stats, recipe)
    plan = run.plan(stats, spectra)
    codec = run.codec(stats, spectra, plan)
    if options.dry_run:
        if options.work_dir is None:
            shutil.rmtree(work)
        return Conversion(plan, recipe, codec.predicted_kl, None, None)

    converted = attach(run.model(), codec, run.block(plan))
    tokenizer = run.tokenizer
    report = healing = None
    measured = run.report_windows() if options.report else None
    if recipe.heal is not None:
        logs = options.output.with_name(options.output.name + "-logs")
        how = HealOptions(work / "heal", resume=options.resume, tracker=options.tracker, logs=logs)
        converted, report, healing = heal_and_measure(converted, run.model(), tokenizer, plan, recipe, measured, how)
        recipe = recipe.model_copy(update={"heal": healing.config})
    elif measured is not None:
        windows, unseen = measured
        report = before_and_after(converted, tokenizer, plan, windows, unseen=unseen)
    with finished_directory(options.output) as folder:
        for parameter in converted.parameters():  # buffers keep the precision that the model wants
            parameter.data = parameter.data.to(source.dtype)
        write_checkpoint(folder, converted, tokenizer, base_model=_base_model(source) if options.adapter_only else None)
        write_text(folder / "clla_recipe.yaml", recipe.to_yaml())
        healed = healing.to_json() if healing else None
        write_report(folder, plan, recipe, report, predicted_kl=codec.predicted_kl, healing=healed)
        write_card(folder, source.name, plan, recipe, report, tokens=stats.tokens, healing=healed)
    if options.work_dir is None:
        shutil.rmtree(work)
    return Conversion(plan, recipe, codec.predicted_kl, report, converted, healing)


def resolve(recipe: Recipe, source: Source, device: torch.device) -> Recipe:
    """Fill in every derived default, check the budget against the model, and note where it ran.

    Raises:
        UsageError: the budget does not fit the model.
    """
    budget = parse_budget(recipe.budget.kv_budget, source_bytes=source.bytes_per_token)
    context = recipe.budget.at_context
    if context is None:
        context = min(getattr(source.config, "max_position_embeddings", None) or 4096, MAX_DEFAULT_CONTEXT)
    sinks, window = recipe.budget.sinks, recipe.budget.window
    if window is None:
        window = derive_window(
            recipe.plan, budget=budget, source_bytes=source.bytes_per_token, context=context or None, sinks=sinks
        )
    latent_bits(
        recipe.plan,
        budget=budget,
        source_bytes=source.bytes_per_token,
        context=context or None,
        window=window,
        sinks=sinks,
        evict=recipe.budget.evict,
    )
    tokens = recipe.calibration.tokens or DEFAULT_TOKENS.get(device.type, DEFAULT_TOKENS["cuda"])
    batch_size = recipe.calibration.batch_size or DEFAULT_BATCH.get(device.type, DEFAULT_BATCH["cuda"])
    dtype = str(pick_dtype(recipe.runtime.compute_dtype, source.dtype, device)).removeprefix("torch.")
    filled = recipe.override(
        {
            "calibration": {"tokens": tokens, "batch_size": batch_size},
            "budget": {"at_context": context, "window": window},
            "plan": {"max_group_size": min(recipe.plan.max_group_size, len(source.layers))},
            "runtime": {"compute_dtype": dtype},
        }
    )
    versions = {package: version(package) for package in ("clla", "torch", "transformers")}
    where = Provenance(model=source.name, revision=source.revision, versions=versions)
    return filled.model_copy(update={"provenance": where})


def weigh(stats: Stats, recipe: Recipe) -> Spectra:
    """Weighted moments as the recipe's metric wants them."""
    power = recipe.plan.metric_power if recipe.plan.metric == "fisher" else 0.0
    return Spectra(surrogate_stats(stats, recipe.plan.metric), power=power, source=recipe.plan.source)


class Run:
    """Stages of one conversion; each looks for its result in the work directory before it computes it."""

    def __init__(
        self, source: Source, recipe: Recipe, device: torch.device, work: Path, *, hold_out: bool = True
    ) -> None:
        self.hold_out = hold_out  # False: calibrate on all of the text, when another one is measured on
        self.source, self.recipe, self.device, self.work = source, recipe, device, work
        self.tokenizer = source.load_tokenizer()
        self._model: PreTrainedModel | None = None
        plan = recipe.plan
        inputs = needs_inputs(plan.metric, plan.source)
        calibration = recipe.calibration.model_dump(mode="json")
        text = fingerprint(recipe.calibration.dataset)
        self.stats_key = digest(
            source.revision, calibration, text, hold_out, plan.max_group_size, inputs, recipe.runtime.compute_dtype
        )
        self.plan_key = digest(self.stats_key, plan.model_dump(mode="json"), recipe.budget.model_dump(mode="json"))

    def model(self) -> PreTrainedModel:
        if self._model is None:
            console.say(f"Loading {self.source.name}")
            dtype = getattr(torch, self.recipe.runtime.compute_dtype)
            self._model = self.source.load_model(dtype=dtype, device=self.device)
        return self._model

    @cached_property
    def rope(self) -> dict[str, Any] | None:
        """How the model rotates its keys."""
        return rope_settings(self.model(), self.source.layers)

    def stats(self) -> Stats:
        path = self.work / f"stats-{self.stats_key}.safetensors"
        if path.exists():
            try:
                return Stats.load(path)
            except CorruptArtifactError as error:
                console.say(f"Calibrating again: {error.got}")
        calibration, plan = self.recipe.calibration, self.recipe.plan
        batches = self.batches()
        collector = Collector(
            self.model(),
            layers=self.source.layers,
            kv=self.source.kv,
            band=plan.max_group_size,
            skip_positions=calibration.skip_positions,
            rope=self.rope,
            with_inputs=needs_inputs(plan.metric, plan.source),
            seed=calibration.seed,
        )
        if isinstance(batches, list):
            total = sum(batch.numel() for batch in batches)
        else:
            total = -(-(calibration.tokens or 0) // calibration.sequence_length) * calibration.sequence_length
        with console.progress("Calibrating (tokens)", total) as advance:
            stats = collect(collector, batches, made_from=self.stats_key, on_tokens=advance)
        stats.save(path)
        return stats

    def batches(self, sequence_length: int | None = None) -> list[Tensor] | Iterator[Tensor]:
        """Token ids [B, T] of the calibration text, T the recipe's unless given.

        An iterator while the model writes its own text.
        """
        c = self.recipe.calibration
        length = sequence_length or c.sequence_length
        assert c.tokens is not None and c.batch_size is not None, "the recipe is not resolved"
        if c.dataset == "self":
            return self_written(self.model(), self.tokenizer, tokens=c.tokens, sequence_length=length, seed=c.seed)
        documents = load_documents(c.dataset)
        batches = token_batches(
            split_held_out(documents)[0] if self.hold_out else documents,
            self.tokenizer,
            tokens=c.tokens,
            sequence_length=length,
            batch_size=c.batch_size,
            seed=c.seed,
        )
        found = sum(batch.numel() for batch in batches)
        if found < c.tokens:
            console.say(f"The text has only {found} tokens of the {c.tokens} wanted, in whole sequences")
        return batches

    def plan(self, stats: Stats, spectra: Spectra) -> Plan:
        path = self.work / f"plan-{self.plan_key}.json"
        if path.exists():
            try:
                return Plan.load(path)
            except CorruptArtifactError as error:
                console.say(f"Planning again: {error.got}")
        config, budget = self.recipe.plan, self.recipe.budget
        assert budget.window is not None
        with console.progress("Planning (steps)", count_candidates(config, len(stats.layers))) as advance:
            plan = make_plan(
                stats,
                config,
                budget=parse_budget(budget.kv_budget, source_bytes=self.source.bytes_per_token),
                context=budget.at_context or None,
                window=budget.window,
                sinks=budget.sinks,
                evict=budget.evict,
                kv_itemsize=self.source.dtype.itemsize,
                kept_layers=self.source.kept_layers,
                kept_window=self.source.kept_window,
                made_from=self.plan_key,
                spectra=spectra,
                measure=self.damage(stats, spectra) if config.planner == "kvsharer" else None,
                on_step=advance,
            )
        plan.save(path)
        return plan

    def damage(self, stats: Stats, spectra: Spectra) -> Callable[[Plan], float]:
        """A function that gives the KL to the source, nats a token, of the model running on a plan.

        Measured on the first calibration sequences, streamed at most `DAMAGE_CHUNK` tokens a step.
        """
        rows = torch.cat(list(islice(self.batches(), DAMAGE_SEQUENCES)))[:DAMAGE_SEQUENCES].to(self.device)
        source = Subject(self.model(), lambda: SourceCache(self.source.config, self.source.dtype))

        def measured(plan: Plan) -> float:
            converted = attach(self.model(), make_codec(spectra, plan, stats), self.block(plan))
            subjects = {"source": source, "converted": Subject(converted, converted.new_cache)}
            found = compare(subjects, rows, chunk=min(DAMAGE_CHUNK, plan.window or DAMAGE_CHUNK))
            converted.release_source()
            return found["converted"].kl

        return measured

    def block(self, plan: Plan) -> dict[str, Any]:
        """The config's `clla` block of a plan for this source."""
        return clla_block(
            plan,
            rope=self.rope,
            kv_dtype=self.source.dtype,
            prefill_chunk=self.recipe.runtime.prefill_chunk,
        )

    def codec(self, stats: Stats, spectra: Spectra, plan: Plan) -> Codec:
        path = self.work / f"codec-{self.plan_key}.safetensors"
        if path.exists():
            try:
                return Codec.load(path)
            except CorruptArtifactError as error:
                console.say(f"Factoring again: {error.got}")
        with console.progress("Factoring (layer groups)", len(plan.groups)) as advance:
            result = make_codec(spectra, plan, stats, on_step=advance)
        result.save(path)
        return result

    def report_windows(self) -> tuple[Tensor, bool]:
        """Token ids [N, T] to measure on, and whether calibration left them out.

        A text too short to keep enough back is measured on as a whole, and the report says so.
        """
        c = self.recipe.calibration
        return report_windows(
            c.dataset, self.tokenizer, count=REPORT_WINDOWS, length=REPORT_LENGTH, fallback=c.sequence_length
        )


def _work_dir(options: Options) -> Path:
    work = options.work_dir or options.output.with_name(options.output.name + ".work")
    if work.exists() and options.work_dir is None:
        if options.resume:
            console.say(f"Resuming from {work}")
        else:
            console.say(f"Starting afresh; --resume would have taken up the unfinished run in {work}")
            shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    return work


def _moment_bytes(source: Source, recipe: Recipe) -> int:
    """Peak memory of moments and spectra: fp64 sums, fp32 moments and weighted moments, metric and its inverse."""
    layers, n = len(source.layers), source.kv.values
    band = min(recipe.plan.max_group_size, layers)
    total = layers * n * n * (16 * band + 40)
    if needs_inputs(recipe.plan.metric, recipe.plan.source):
        hidden = source.config.hidden_size
        total += layers * hidden * (12 * band * n + 28 * hidden)
    return total


def _bytes_needed(source: Source, *, adapter_only: bool) -> int:
    """Rough size of what will be written: the weights as they are now, the stats and the codec."""
    stats = len(source.layers) * 8 * source.kv.values**2 * 4
    if adapter_only or not Path(source.path).is_dir():
        return stats
    names = [source.gguf_file] if source.gguf_file else ["*.safetensors", "*.bin"]
    weights = sum(f.stat().st_size for name in names for f in Path(source.path).glob(name))
    return stats + weights * (4 if source.gguf_file else 1)


def _base_model(source: Source) -> dict[str, Any]:
    hub_revision = None if Path(source.path).exists() else source.revision
    return {"path": source.path, "gguf_file": source.gguf_file, "hub_revision": hub_revision}
