"""Healing a converted model: text, stages of training, held-out KL, and whether it was worth it."""

from __future__ import annotations

import gc
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from torch import Tensor
from transformers import PreTrainedModel

from clla import console
from clla.artifacts.plan import Plan
from clla.checkpoint.write import check_disk
from clla.errors import CllaError, UsageError, reason
from clla.evaluate.perplexity import Subject, compare
from clla.evaluate.report import Report, before_and_after
from clla.evaluate.retrieval import plantable
from clla.evaluate.source_cache import SourceCache
from clla.heal.sharding import launched_sharded, sharded_distiller
from clla.heal.student import Distiller, check_attention, make_student
from clla.heal.targets import fit_codec
from clla.heal.text import healing_text
from clla.heal.train import BEST, Point, Progress, Schedule, discard, load_trained, train
from clla.modeling.modeling_clla import CllaForCausalLM
from clla.modeling.quantize_clla import tensor_digest
from clla.recipe import HealConfig, Recipe, named
from clla.storage.files import read_json, write_text
from clla.text.vocabulary import check_tokens

# (share of the source's bytes from which on it holds, what is trained, tokens on CPU and on GPU)
DEFAULTS = ((0.10, "codec", 131_072, 4_000_000), (0.04, "all", 131_072, 20_000_000), (0.0, "all", 262_144, 100_000_000))
BATCH_TOKENS = {"cpu": 2_048, "cuda": 65_536}
CODEC_LR = 1e-3  # for the GPU's batch

HEAL_LENGTH = 2048  # of training sequences, where the model takes as many
REPORT_SAMPLES, REPORT_LENGTH, RETRIEVAL_TRIALS = 2, 2048, 8  # of before and after, likewise
WORTH = 0.1  # of the held-out KL, below which healing was not worth its cost
STATE_BYTES = 32  # a trained parameter: two states with Adam's moments in fp32, and twice the best state
PRECISION = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "bf16"}


@dataclass(frozen=True)
class Healing:
    """What healing did.

    Attributes:
        config: resolved.
        history: held-out KL, the start first.
        stopped: why it ended early; empty if it did not.
        before: measured before, if it was.
    """

    config: HealConfig
    history: list[Point]
    stopped: str
    before: Report | None

    @property
    def gain(self) -> float:
        """Share of the held-out KL that is gone."""
        start, best = self.history[0].held_out, min(point.held_out for point in self.history)
        return 1 - best / start if start > 0 else 0.0

    @property
    def verdict(self) -> str:
        """One sentence: what it brought, and whether it was worth it."""
        start, best = self.history[0].held_out, min(point.held_out for point in self.history)
        text = f"Healing took held-out KL from {start:.4f} to {best:.4f} in {self.history[-1].tokens:,} tokens"
        if self.gain < WORTH:
            text += ": not worth it; the converted model without healing is as good"
        return text + (f" (stopped early: {self.stopped})" if self.stopped else "")

    def to_json(self) -> dict[str, Any]:
        points = [{k: None if v != v else v for k, v in asdict(point).items()} for point in self.history]
        return {
            "config": self.config.model_dump(mode="json"),
            "history": points,
            "stopped": self.stopped,
            "verdict": self.verdict,
            "before": self.before.to_json() if self.before else None,
        }


@dataclass(frozen=True)
class HealOptions:
    """How healing runs.

    Attributes:
        work: where text and states are kept.
        resume: go on from the last state there.
        tracker: of accelerate: `tensorboard`, `wandb`, …
        logs: where the tracker writes; default: `work`.
    """

    work: Path
    resume: bool = False
    tracker: str | None = None
    logs: Path | None = None


def heal_and_measure(
    converted: CllaForCausalLM,
    teacher: PreTrainedModel,
    tokenizer: Any,
    plan: Plan,
    recipe: Recipe,
    measured: tuple[Tensor, bool | None] | None,
    options: HealOptions,
) -> tuple[CllaForCausalLM, Report | None, Healing]:
    """Heal, and measure before and after.

    Args:
        converted: where training starts; not changed.
        teacher: its source.
        tokenizer: its own.
        plan: that it runs on.
        recipe: whose `heal` is not None.
        measured: samples [N, T] to measure on and whether they are unseen, as of `unseen`; None measures nothing.
        options: how to run.

    Returns:
        The healed model, what was measured after healing, and what healing did.
    """
    assert recipe.heal is not None
    check_attention(converted.source, (layer for group in plan.groups for layer in group.layers))
    config = resolve_healing(recipe.heal, plan, recipe, teacher.device)

    around = 0 if measured is None else plantable(tokenizer, measured[0].shape[1])

    def report(model: CllaForCausalLM) -> Report | None:
        if measured is None:
            return None
        samples, unseen = measured
        return before_and_after(
            model,
            tokenizer,
            plan,
            samples,
            retrieval_context=around,
            retrieval_trials=RETRIEVAL_TRIALS,
            unseen=unseen,
            source_model=teacher,
        )

    before = report(converted)
    device = teacher.device
    healed, progress = heal(converted, teacher, tokenizer, config, options)
    stored = getattr(torch, converted.config.spec.kv_dtype)
    for parameter in healed.parameters():  # measure what will be saved
        parameter.data = parameter.data.to(stored).to(teacher.dtype)
    if launched_sharded():
        gc.collect()  # the parts: their modules and hooks refer to each other
        for model in (healed, teacher):
            model.to(device)  # type: ignore[arg-type]
    return healed, report(healed), Healing(config, progress.history, progress.stopped, before)


def resolve_healing(config: HealConfig, plan: Plan, recipe: Recipe, device: torch.device) -> HealConfig:
    """Fill in the defaults that depend on budget, device and calibration text."""
    # Decoupled keys start far from the source, whatever their size.
    share = 0.0 if plan.decoupled else plan.row_bytes / plan.source_bytes_per_token
    _, what, cpu_tokens, gpu_tokens = next(row for row in DEFAULTS if share >= row[0])
    on_cpu, length = device.type == "cpu", config.sequence_length or HEAL_LENGTH
    tokens = config.tokens or (cpu_tokens if on_cpu else gpu_tokens)
    wanted = min(BATCH_TOKENS["cpu" if on_cpu else "cuda"], tokens)
    batch_tokens = config.batch_tokens or max(wanted, length)
    # Small batches have noisy gradients: Adam's steps shrink with the square root (docs/lab-notes.md).
    codec_lr = config.codec_lr or CODEC_LR * min(1.0, batch_tokens / BATCH_TOKENS["cuda"]) ** 0.5
    return config.model_copy(
        update={
            "tokens": tokens,
            "train": config.train or what,
            "sequence_length": length,
            "codec_lr": codec_lr,
            "weight_lr": config.weight_lr or codec_lr / 10,
            "batch_tokens": batch_tokens,
            "dataset": config.dataset or recipe.calibration.dataset,
        }
    )


def check_healing(config: HealConfig, *, window: int, flush_block: int, tracker: str | None) -> None:
    """Refuse, before anything is computed, what could not be trained.

    Args:
        config: with its length.
        window: W of the plan.
        flush_block: tokens that leave the window at once.
        tracker: as in `HealOptions`.

    Raises:
        UsageError: sequences without a latent, a batch or a run below one sequence, a tracker that is not installed.
    """
    length = config.sequence_length
    assert length is not None, "the length is not resolved"
    if window and length < 2 * window + 2 * flush_block:
        raise UsageError(
            f"sequences of {length} tokens with an exact window of {window}",
            expected=f"at least {2 * window + 2 * flush_block} tokens, so that there are latents to learn from",
            remedy=f"raise {named('heal', 'sequence_length')}, or convert with a smaller exact window",
        )
    for name, value in (("batch_tokens", config.batch_tokens), ("tokens", config.tokens)):
        if value is not None and value < length:
            raise UsageError(
                f"{named('heal', name)} {value} with sequences of {length}",
                expected="at least one sequence per step and one step",
                remedy=f"raise it, or lower {named('heal', 'sequence_length')}",
            )
    if config.tokens is not None and config.batch_tokens is not None and config.tokens < config.batch_tokens:
        raise UsageError(
            f"{named('heal', 'tokens')} {config.tokens} with steps of {named('heal', 'batch_tokens')} "
            f"{config.batch_tokens}",
            expected="at least one step",
            remedy="raise the first or lower the second",
        )
    installed = [str(kind) for kind in get_available_trackers()]
    if tracker and tracker not in installed:
        raise UsageError(
            f"--report-to {tracker} is not installed",
            expected="one that is installed" + (": " + ", ".join(installed) if installed else "; none is"),
            remedy="pip install 'clla[heal]' for tensorboard, or the tracker that you name",
        )


def heal(
    converted: CllaForCausalLM,
    teacher: PreTrainedModel,
    tokenizer: Any,
    config: HealConfig,
    options: HealOptions,
) -> tuple[CllaForCausalLM, Progress]:
    """Train a copy of a converted model against the source it was made from.

    Launched sharded, it leaves `converted`, the teacher and the healed model on the CPU.

    Args:
        converted: where training starts; not changed.
        teacher: the source, frozen, on the device to train on.
        tokenizer: its own.
        config: resolved.
        options: how to run.

    Raises:
        CllaError: too little text, a batch smaller than one sequence, or processes that cannot shard as asked.
    """
    assert config.tokens and config.train and config.batch_tokens and config.dataset, "the config is not resolved"
    assert config.sequence_length and config.codec_lr and config.weight_lr
    length, codec_lr, spec = config.sequence_length, config.codec_lr, converted.config.spec
    window = spec.window
    check_healing(config, window=window, flush_block=spec.flush_block, tracker=options.tracker)
    work, resume = options.work, options.resume
    processes = PartialState(cpu=teacher.device.type == "cpu")
    if not resume and processes.is_main_process:
        discard(work)
    work.mkdir(parents=True, exist_ok=True)
    own = _same_run(work / "run.json", converted, config, resume=resume)
    with processes.main_process_first():
        sequences, held = healing_text(config, teacher, tokenizer, work)
    for ids in (sequences, held):
        check_tokens(ids, teacher.config.get_text_config().vocab_size, tokenizer)
    if processes.is_main_process:
        write_text(work / "run.json", json.dumps(own))
    batch = config.batch_tokens // length
    steps = min(config.tokens // length, len(sequences)) // max(1, batch)
    if batch < 1 or steps < 1:
        raise UsageError(
            f"{len(sequences)} sequences of {length} tokens to train on, in steps of {config.batch_tokens} tokens",
            expected="enough text for one step",
            remedy=f"lower {named('heal', 'batch_tokens')} or {named('heal', 'sequence_length')}, or give a longer "
            f"{named('heal', 'dataset')}",
        )
    accelerator = _accelerator(config, options, teacher)
    sharded = launched_sharded()
    if sharded:
        distiller = sharded_distiller(teacher, converted, config.train, accelerator)
    else:
        distiller = Distiller(teacher, make_student(converted, config.train))
    trained = sum(p.numel() for p in distiller.student.parameters() if p.requires_grad)
    check_disk(work, STATE_BYTES * trained, instead=f"train less: 'codec' for {named('heal', 'train')}")
    codec_steps = round(config.codec_share * steps)

    def fit_codecs() -> int:
        count = codec_steps * batch * length
        with console.progress("Fitting codecs (tokens)", count) as advance:
            fit_codec(
                distiller,
                sequences,
                steps=codec_steps,
                batch=batch,
                lr=codec_lr,
                seed=config.seed,
                accelerator=accelerator,
                on_step=advance,
            )
        return count

    schedule = Schedule(
        steps=steps - codec_steps,
        batch=batch,
        codec_lr=codec_lr,
        weight_lr=config.weight_lr,
        cache_share=config.cache_share,
        evaluations=config.evaluations,
        seed=config.seed,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    kv_dtype = getattr(torch, spec.kv_dtype)
    source = Subject(distiller.teacher, lambda: SourceCache(teacher.config, kv_dtype))
    subjects = {"source": source, "student": Subject(distiller.student, distiller.student.new_cache)}
    held, chunk = held.to(accelerator.device), window or converted.prefill_chunk

    def evaluate() -> float:
        with accelerator.autocast():
            return distiller.gathered(lambda: compare(subjects, held, chunk=chunk)["student"].kl)

    total = schedule.steps * batch * length
    with console.progress("Healing (tokens)", total) as advance:

        def on_step(step: int, tokens: int, kl: float, held_out: float, seconds: float) -> None:
            advance(tokens)
            advance.note(f"step {step}, KL {kl:.4f}, held out {held_out:.4f}, {tokens / seconds:,.0f} tokens/s")

        try:
            progress = train(
                distiller,
                sequences[codec_steps * batch :],
                schedule,
                evaluate=evaluate,
                accelerator=accelerator,
                folder=work,
                resume=resume,
                fit_codecs=fit_codecs if codec_steps else None,
                on_step=on_step,
            )
        except torch.OutOfMemoryError as error:
            raise CllaError(
                f"the device has too little memory to train '{config.train}': {reason(error)}",
                expected="teacher, student, gradients and Adam's moments on it",
                remedy=f"set {named('heal', 'gradient_checkpointing')}, give 'codec' for {named('heal', 'train')}, or "
                f"lower {named('heal', 'sequence_length')}",
            ) from error
    if options.tracker:
        accelerator.end_training()
    if sharded:
        distiller = Distiller(teacher, make_student(converted, config.train))
        load_trained(distiller, work / BEST)
    accelerator.wait_for_everyone()  # what is in `work` may go from now on
    distiller.student.requires_grad_(False)
    earlier = spec.healed
    distiller.student.config.clla["healed"] = earlier if earlier and config.train == "codec" else config.train
    return distiller.student.eval(), progress


def _accelerator(config: HealConfig, options: HealOptions, teacher: PreTrainedModel) -> Accelerator:
    """Device, precision and processes; the tracker is started."""
    accelerator = Accelerator(
        cpu=teacher.device.type == "cpu",
        mixed_precision=PRECISION[teacher.dtype],
        log_with=options.tracker,
        project_dir=str(options.logs or options.work),
    )
    if options.tracker:
        accelerator.init_trackers("clla-heal", config.model_dump(mode="json", exclude_none=True))
    return accelerator


def _same_run(path: Path, converted: CllaForCausalLM, config: HealConfig, *, resume: bool) -> dict[str, Any]:
    """What a run is made of, to be noted; one that was made of something else is not taken up.

    Raises:
        UsageError: the states in the work directory belong to another run.
    """
    own = {**config.model_dump(mode="json"), "codec": tensor_digest(converted.codec.state_dict())}
    own |= {"sharding": True} if launched_sharded() else {}  # its states hold the optimizer in another way
    if resume and path.is_file():
        stored = read_json(path)
        changed = sorted(name for name in own | stored if stored.get(name) != own.get(name))
        if changed:
            raise UsageError(
                f"the interrupted run in {path.parent} had another {', '.join(changed)}",
                expected="the same checkpoint and options as before",
                remedy="give those again, or leave out --resume",
            )
    PartialState().wait_for_everyone()  # who has not read it yet must find the old one
    return own
