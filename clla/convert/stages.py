"""One conversion's stages, each of which looks for its result in the work directory before it computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import transformers
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel

from clla import console
from clla._version import __version__
from clla.artifacts.codec import Codec
from clla.artifacts.plan import Plan
from clla.artifacts.stats import Stats
from clla.calibrate.collect import Collection, Collector, collect
from clla.calibrate.importance import PORTION
from clla.calibrate.rope_detection import rope_settings
from clla.calibrate.stream import StreamedCollector
from clla.checkpoint.assemble import attach, clla_block
from clla.checkpoint.write import check_disk
from clla.convert.factor import make_codec
from clla.errors import CorruptArtifactError, UsageError
from clla.evaluate.measured_cache import with_kept_bytes
from clla.evaluate.perplexity import Subject, compare
from clla.evaluate.seen import fingerprint
from clla.evaluate.source_cache import SourceCache
from clla.heal.run import HEAL_LENGTH, REPORT_LENGTH, REPORT_SAMPLES
from clla.plan.budget import Budget, settle_budget
from clla.plan.decoupled import DecoupledSpectra, settle_decoupled
from clla.plan.frontier import make_outlook
from clla.plan.kept_spectra import save_spectra, spectra_file
from clla.plan.make import make_plan, plan_digest
from clla.plan.metrics import needs_inputs
from clla.plan.planners import count_candidates
from clla.plan.spectra import Spectra
from clla.recipe import SHORTEST, Provenance, Recipe
from clla.source.device import pick_dtype
from clla.source.families import FAMILIES
from clla.source.lengths import reach_of
from clla.source.model import Source
from clla.source.placement import choose_placement
from clla.storage.files import digest
from clla.text.reading import read_documents
from clla.text.sequences import calibration_blocks, report_samples, self_written, token_batches
from clla.text.vocabulary import check_tokens

DEFAULT_TOKENS = {"cpu": 16_384, "cuda": 262_144}
DEFAULT_LENGTH = 2048  # of calibration sequences, much longer than an exact window
DEFAULT_BATCH = {"cpu": 1, "cuda": 4}
DEFAULT_CONTEXT, MAX_DEFAULT_CONTEXT = 4096, 32_768  # where the model names no length, and where it names a longer one
DAMAGE_SEQUENCES, DAMAGE_CHUNK = 2, 128  # that planners measure on
HIDDEN_ROOM = 0.2  # of the free memory, that hidden states may take before they are spilled to disk
T = TypeVar("T", Stats, Plan, Codec)


def resolve(recipe: Recipe, source: Source, device: torch.device) -> Recipe:
    """Fill in every derived default, check the budget against the model, and note where it ran.

    Raises:
        UsageError: the budget does not fit the model, or it has no positions for a length.
    """
    reach = reach_of(source.config)
    reach.check_option("--sequence-length", recipe.calibration.sequence_length)
    reach.check_option("--budget-context", recipe.budget.budget_context)
    if recipe.heal is not None:
        reach.check_option("heal.sequence_length", recipe.heal.sequence_length)
    longest = min(reach.tokens or DEFAULT_CONTEXT, MAX_DEFAULT_CONTEXT)
    recipe = settle_decoupled(recipe, head_dim=source.kv.head_dim)
    recipe = settle_budget(
        recipe, source_bytes=source.bytes_per_token, context=longest, layers=len(source.layers), values=source.kv.values
    )
    tokens = recipe.calibration.tokens or DEFAULT_TOKENS.get(device.type, DEFAULT_TOKENS["cuda"])
    batch_size = recipe.calibration.batch_size or DEFAULT_BATCH.get(device.type, DEFAULT_BATCH["cuda"])
    dtype = str(pick_dtype(recipe.runtime.compute_dtype, source.dtype, device)).removeprefix("torch.")
    length = recipe.calibration.sequence_length or reach.fit_sequence(DEFAULT_LENGTH, SHORTEST)
    changes: dict[str, dict[str, Any]] = {
        "calibration": {"tokens": tokens, "batch_size": batch_size, "sequence_length": length},
        "runtime": {"compute_dtype": dtype},
    }
    if recipe.heal is not None:
        changes["heal"] = {"sequence_length": recipe.heal.sequence_length or reach.fit_sequence(HEAL_LENGTH, SHORTEST)}
    filled = recipe.override(changes)
    # Not from the metadata of installed packages: clla may run from a checkout.
    versions = {"clla": __version__, **{p.__name__: str(p.__version__) for p in (torch, transformers)}}
    where = Provenance(model=source.name, revision=source.revision, versions=versions)
    return filled.model_copy(update={"provenance": where})


class Run:
    """Stages of one conversion; each looks for its result in the work directory before it computes it."""

    def __init__(
        self, source: Source, recipe: Recipe, device: torch.device, work: Path, *, hold_out: bool = True
    ) -> None:
        self.hold_out = hold_out  # False: calibrate on all of the text, when another one is measured on
        self.source, self.recipe, self.device, self.work = source, recipe, device, work
        self.tokenizer = source.load_tokenizer()
        self._model: PreTrainedModel | None = None
        self.dtype: torch.dtype = getattr(torch, recipe.runtime.compute_dtype)
        self.weight_bytes = source.parameters * self.dtype.itemsize
        self.placement = choose_placement(recipe.runtime.placement, self.weight_bytes, device)
        plan = recipe.plan
        inputs = needs_inputs(plan.metric, plan.source)
        calibration = recipe.calibration.model_dump(mode="json")
        text = fingerprint(recipe.calibration.dataset)
        self.with_queries = plan.key == "decoupled"
        queries = ("queries",) if self.with_queries else ()
        self.stats_key = digest(
            source.revision, calibration, text, hold_out, plan.max_layers_per_group, inputs,
            recipe.runtime.compute_dtype, recipe.budget.exact_window, plan.metric == "fisher", *queries,
        )  # fmt: skip
        self.plan_key = plan_digest(self.stats_key, recipe)

    def also(self, recipe: Recipe) -> Run:
        """Another recipe's stages on the same model, loaded once."""
        other = Run(self.source, recipe, self.device, self.work, hold_out=self.hold_out)
        other._model = self._model
        return other

    def model(self) -> PreTrainedModel:
        if self._model is None:
            console.say(f"Loading {self.source.name}")
            self._model = self._load(self.dtype)
        return self._model

    def model_as_stored(self) -> PreTrainedModel:
        """The source in its own dtype; its layers stay on disk where they are."""
        streamed = self.placement == "stream" and self.dtype != self.source.dtype
        return self._load(self.source.dtype) if streamed else self.model()

    def _load(self, dtype: torch.dtype) -> PreTrainedModel:
        offload = self.work / f"offload-{dtype}".replace("torch.", "")
        return self.source.load_model(dtype=dtype, device=self.device, placement=self.placement, offload=offload)

    @property
    def streams(self) -> bool:
        """Whether moments are collected layer by layer: the model or all its moments at once would not fit."""
        free = psutil.virtual_memory().available
        wide = self.source.kv.values > self.recipe.calibration.basis
        return self.placement == "stream" or wide or moment_bytes(self.source, self.recipe, streamed=False) > free

    @property
    def shard_size(self) -> str:
        """Of the weight files: where layers are read from disk no more than one of them should be in memory."""
        layers = self.source.config.get_text_config().num_hidden_layers
        return f"{max(1, self.weight_bytes // layers // 1000)}KB" if self.placement == "stream" else "5GB"

    @cached_property
    def rope(self) -> dict[str, Any] | None:
        """How the model rotates its keys."""
        trusted = self.placement == "stream" and self.source.config.model_type in FAMILIES
        return rope_settings(self.model(), self.source.layers, trusted=trusted)

    def stats(self) -> Stats:
        path = self.work / f"stats-{self.stats_key}.safetensors"
        if (found := _kept(path, Stats.load, self.stats_key, "Calibrating")) is not None:
            return found
        streams = self.streams  # decided once, as free memory changes
        if streams and PartialState().num_processes > 1:
            raise UsageError(
                "several processes for a model that is calibrated layer by layer",
                expected="one process",
                remedy="run it without accelerate launch",
            )
        calibration, plan, exact_window = self.recipe.calibration, self.recipe.plan, self.recipe.budget.exact_window
        assert exact_window is not None, "the recipe is resolved"
        wanted = Collection(
            layers=self.source.layers,
            kv=self.source.kv,
            band=plan.group_size,
            rope=self.rope,
            skip_positions=calibration.skip_positions,
            with_inputs=needs_inputs(plan.metric, plan.source),
            with_queries=self.with_queries,
            seed=calibration.seed,
            window=exact_window,
            with_metric=plan.metric == "fisher",
        )
        stats = self._streamed_stats(wanted) if streams else self._stats_at_once(wanted)
        if wanted.with_metric and stats.window < wanted.window:
            console.say("This model's attention cannot be watched: the metric counts what near queries read, too")
        if (reduction := stats.reduction) is not None:
            console.say(
                f"Moments are kept in {reduction['coordinates']} of {reduction['of']} coordinates per layer; what "
                f"these lack costs {reduction['kl']:.2g} nats per token by second order"
            )
        if PartialState().is_main_process:
            stats.save(path)
        return stats

    def _stats_at_once(self, wanted: Collection) -> Stats:
        calibration, batches = self.recipe.calibration, self.batches()
        if isinstance(batches, list):
            total = sum(batch.numel() for batch in batches)
        else:
            length = calibration.sequence_length or DEFAULT_LENGTH
            total = -(-(calibration.tokens or 0) // length) * length
        collector = Collector(self.model(), wanted, checkpointing=self.recipe.runtime.gradient_checkpointing)
        with console.progress("Calibrating (tokens)", total) as advance:
            return collect(collector, batches, made_from=self.stats_key, on_tokens=advance)

    def _streamed_stats(self, wanted: Collection) -> Stats:
        """Layer by layer; hidden states go to the work directory where they would take much of the memory."""
        batches = list(self.batches())
        text_config = self.source.config.get_text_config()
        tokens, layers, hidden = sum(b.numel() for b in batches), text_config.num_hidden_layers, text_config.hidden_size
        # Hidden states go as keys, values and gradients come; most there is when all of these are there.
        kept = 4 * (2 * self.source.kv.values + hidden * wanted.with_inputs) * len(self.source.layers)
        spilled = tokens * (2 * hidden * self.dtype.itemsize + max(layers * hidden * self.dtype.itemsize, kept))
        in_memory = self.placement != "stream" and spilled < HIDDEN_ROOM * psutil.virtual_memory().available
        folder = None if in_memory else self.work / "spill"
        if folder is not None:
            check_disk(folder, spilled, instead="read fewer --calibration-tokens")
        collector = StreamedCollector(self.model(), wanted, basis=self.recipe.calibration.basis, folder=folder)
        with console.progress("Calibrating (tokens per layer)", tokens * 2 * layers) as advance:
            return collector.collect(batches, made_from=self.stats_key, on_tokens=advance)

    def batches(self, sequence_length: int | None = None) -> list[Tensor] | Iterator[Tensor]:
        """Token ids [B, T] of the calibration text, T the recipe's unless given.

        An iterator while the model writes its own text.
        """
        c = self.recipe.calibration
        length = sequence_length or c.sequence_length
        assert c.tokens is not None and c.batch_size is not None and length is not None, "the recipe is not resolved"
        if c.dataset == "self":
            return self_written(self.model(), self.tokenizer, tokens=c.tokens, sequence_length=length, seed=c.seed)
        documents = read_documents(c.dataset)
        batches = token_batches(
            calibration_blocks(documents) if self.hold_out else documents,
            self.tokenizer,
            tokens=c.tokens,
            sequence_length=length,
            batch_size=c.batch_size,
            seed=c.seed,
        )
        for batch in batches:
            check_tokens(batch, self.source.config.get_text_config().vocab_size, self.tokenizer)
        found = sum(batch.numel() for batch in batches)
        if found < c.tokens:
            console.say(f"The text has only {found} tokens of the {c.tokens} wanted, in whole sequences")
        return batches

    def plan(self, stats: Stats, spectra: Spectra) -> Plan:
        path = self.work / f"plan-{self.plan_key}.json"
        PartialState().wait_for_everyone()
        if (found := _kept(path, Plan.load, self.plan_key, "Planning")) is not None:
            return found
        config, budget = self.recipe.plan, self.recipe.budget
        with console.progress("Planning (steps)", count_candidates(config, len(stats.layers))) as advance:
            plan = make_plan(
                stats,
                config,
                budget=Budget.of(budget, source_bytes=self.source.bytes_per_token),
                kv_itemsize=self.source.dtype.itemsize,
                kept_layers=self.source.kept_layers,
                kept_window=self.source.kept_window,
                made_from=self.plan_key,
                spectra=spectra,
                measure=self.damage(stats, spectra) if config.planner == "kvsharer" else None,
                on_step=advance,
            )
        if plan.kept_layers:  # the model is loaded for them alone
            plan = with_kept_bytes(plan, self.model(), itemsize=self.source.dtype.itemsize)
        if PartialState().is_main_process:
            plan.save(path)
            if not isinstance(spectra, DecoupledSpectra):  # of which eigenvalues alone are not enough to plan again
                save_spectra(self.work / spectra_file(self.stats_key, config), spectra, self.stats_key)
        return plan

    def damage(self, stats: Stats, spectra: Spectra) -> Callable[[Plan], float]:
        """A function that gives the KL to the source, nats per token, of the model running on a plan.

        Measured on the first calibration sequences, streamed at most `DAMAGE_CHUNK` tokens per step.
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
        found = _kept(path, Codec.load, self.plan_key, "Factoring")
        if found is not None and found.outlook:
            return found
        if found is None:
            with console.progress("Factoring (layer groups)", len(plan.groups)) as advance:
                found = make_codec(spectra, plan, stats, on_step=advance)
        own = self.recipe.plan
        result = replace(found, outlook=make_outlook(spectra, plan, own.bits, own.reading_price))
        if PartialState().is_main_process:
            result.save(path)
        return result

    def report_samples(self) -> tuple[Tensor, bool]:
        """Token ids [N, T] to measure on, and whether they are of the blocks that calibration leaves out.

        A text too short to keep enough back is measured on as a whole, and the report says so.
        """
        c, length = self.recipe.calibration, reach_of(self.source.config).fit(REPORT_LENGTH)
        return report_samples(
            c.dataset, self.tokenizer, count=REPORT_SAMPLES, length=length, fallback=c.sequence_length or DEFAULT_LENGTH
        )


def moment_bytes(source: Source, recipe: Recipe, *, streamed: bool) -> int:
    """Peak memory of moments and spectra.

    Moments and weighted moments in fp32, metric and its inverse in fp64, and, unless layers are collected one at a
    time, sums of all of them in fp64 and the tokens that are weighted at once. Beside them the moments of one largest
    group and what is made of them.
    """
    layers, n = len(source.layers), min(source.kv.values, recipe.calibration.basis)
    band = min(recipe.plan.group_size, layers)
    total = layers * n * n * (8 * band + 24 if streamed else 16 * band + 40) + 12 * (band * n) ** 2
    if not streamed:
        total += PORTION * 8 * source.kv.values * layers
    if source.kv.values > n:  # reading and writing, and one layer's whole moments
        total += 8 * source.kv.values * (layers * n + 5 * source.kv.values)
    if needs_inputs(recipe.plan.metric, recipe.plan.source):
        hidden = source.config.get_text_config().hidden_size
        total += layers * hidden * (12 * band * n + 28 * hidden)
    return total


def stats_bytes(source: Source, recipe: Recipe) -> int:
    """Size of the stats as they are written, fp32: what `Stats` says of its tensors."""
    layers, values = len(source.layers), source.kv.values
    width, band = min(values, recipe.calibration.basis), min(recipe.plan.group_size, layers)
    numbers = layers * ((band + 1) * width**2 + values)
    if values > width:
        numbers += 2 * layers * width * values
    if needs_inputs(recipe.plan.metric, recipe.plan.source):
        hidden = source.config.get_text_config().hidden_size
        numbers += layers * hidden * (hidden + band * width + 1)
    return 4 * numbers


def _kept(path: Path, load: Callable[[Path], T], made_from: str, doing: str) -> T | None:
    """The result of a stage, if an earlier run kept it, whole and made from the same."""
    if not path.exists():
        return None
    try:
        found = load(path)
    except CorruptArtifactError as error:
        console.say(f"{doing} again: {error.got}")
        return None
    if found.made_from != made_from:
        console.say(f"{doing} again: {path} was made from something else")
        return None
    return found
