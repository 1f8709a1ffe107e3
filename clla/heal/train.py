"""The training loop of healing: distillation in parallel, then on the model's own cache; saved, resumable.

The order of the data and the choice of each step's chunk depend on the seed and the step alone, so a run that is
taken up again does what an unbroken one would have done.

Shape legend: N sequences, B sequences per step, T tokens.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn

from clla.errors import CorruptArtifactError, UsageError
from clla.heal.attention import drawn_view
from clla.heal.sharding import cut_like, is_sharded, prepare, to_main
from clla.heal.steps import component_sizes, relative_steps
from clla.heal.student import Distiller
from clla.storage.files import load_verified, save_verified
from clla.storage.places import writing

BEST, TRAINED = "best.safetensors", "trained.safetensors"
STEP = "step-{:08d}"
MICRO_TOKENS = 16_384  # a forward pass; longer batches take several
CACHED_CHUNK = 64  # tokens per step on the own cache where there is no window
DIVERGED = 10  # times the held-out KL of the start; less than that may come back while the learning rate is high


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps: in all.
        batch: B, over all processes.
        codec_lr: highest learning rate of the codec.
        weight_lr: of the weights.
        cache_share: last share of the steps that runs chunk by chunk on the model's own cache.
        evaluations: how often held-out KL is measured, and everything is saved.
        seed: of the chunks.
        gradient_checkpointing: compute layers twice instead of keeping their activations.
    """

    steps: int
    batch: int
    codec_lr: float
    weight_lr: float
    cache_share: float
    evaluations: int
    seed: int = 0
    gradient_checkpointing: bool = False

    @property
    def cached_from(self) -> int:
        """The first step on the own cache."""
        return self.steps - round(self.cache_share * self.steps)

    def pace(self, step: int) -> float:
        """Share of the highest learning rate: a short warm-up, then a cosine down to a twentieth."""
        warm = max(1, min(100, self.steps // 10))
        if step < warm:
            return (step + 1) / warm
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))

    def is_due(self, step: int) -> bool:
        """Whether held-out KL is measured after this step."""
        return step * self.evaluations // self.steps > (step - 1) * self.evaluations // self.steps


@dataclass(frozen=True)
class Point:
    """Attributes: step; tokens; kl: mean of training since the last point; held_out: KL; tokens_per_second."""

    step: int
    tokens: int
    kl: float
    held_out: float
    tokens_per_second: float


class Progress:
    """Where a run stands; saved with it. `stopped` says why it ended early."""

    def __init__(self) -> None:
        self.step = 0
        self.history: list[Point] = []
        self.stopped = ""

    @property
    def start_kl(self) -> float:
        return self.history[0].held_out

    @property
    def read(self) -> int:
        """Tokens of stage 1."""
        return max(point.tokens for point in self.history if point.step == 0)

    @property
    def best(self) -> Point:
        return min(self.history, key=lambda point: point.held_out)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "history": [asdict(point) for point in self.history], "stopped": self.stopped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.stopped = state["step"], state["stopped"]
        self.history = [Point(**point) for point in state["history"]]


def train(
    distiller: Distiller,
    sequences: Tensor,
    schedule: Schedule,
    *,
    evaluate: Callable[[], float],
    accelerator: Accelerator,
    folder: Path,
    resume: bool = False,
    fit_codecs: Callable[[], int] | None = None,
    on_step: Callable[[int, int, float, float, float], None] = lambda *_: None,
) -> Progress:
    """Train the student; afterwards it holds the state of least held-out KL.

    Args:
        distiller: teacher and student, sharded or not.
        sequences: token ids [N, T], read in order.
        schedule: how long and how fast.
        evaluate: held-out KL of the student as it is.
        accelerator: decides device, precision, processes and tracker.
        folder: where states are kept.
        resume: go on from the last state in `folder`.
        fit_codecs: stage 1, which returns how many tokens it read.
        on_step: called after each step with its number, tokens, training KL, the last held-out KL, and its seconds.

    Raises:
        UsageError: too little text, or a batch that the processes cannot share.
    """
    world, batch = accelerator.num_processes, schedule.batch
    if len(sequences) < schedule.steps * batch or batch % world:
        raise UsageError(
            f"{len(sequences)} sequences for {schedule.steps} steps of {batch} on {world} processes",
            expected="enough text, and a batch that divides evenly",
            remedy="lower heal.tokens, or choose heal.batch_tokens a multiple of processes times sequence length",
        )
    student = distiller.student
    if schedule.gradient_checkpointing:
        enable_checkpointing(student.source)
    optimizer = torch.optim.AdamW(parameter_groups(distiller, schedule), betas=(0.9, 0.95), weight_decay=0.0)
    paces = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.pace)
    sizes = component_sizes(distiller)
    prepared, optimizer = prepare(accelerator, distiller, optimizer)
    progress = Progress()
    accelerator.register_for_checkpointing(progress, paces)
    hooks = [
        accelerator.register_save_state_pre_hook(partial(_save_trained, distiller)),
        accelerator.register_load_state_pre_hook(partial(_load_trained, distiller)),
    ]
    if resume and (last := last_state(folder)) is not None:
        accelerator.load_state(str(last))
    if not progress.history:
        progress.history.append(Point(0, 0, math.nan, evaluate(), 0.0))
        _save_best(distiller, accelerator, folder, progress)
        if fit_codecs is not None:
            read = fit_codecs()
            progress.history.append(Point(0, read, math.nan, evaluate(), 0.0))
            if progress.best is progress.history[-1]:
                _save_best(distiller, accelerator, folder, progress)
    rank, since, kls, trained = accelerator.process_index, time.monotonic(), [], 0
    while progress.step < schedule.steps and not progress.stopped:
        step, began = progress.step, time.monotonic()
        rows = sequences[step * batch : (step + 1) * batch].long()
        ids = rows[rank * (batch // world) : (rank + 1) * (batch // world)].to(accelerator.device)
        kl = float(accelerator.reduce(_one_step(prepared, ids, step, schedule, accelerator), reduction="mean"))
        if not math.isfinite(kl):
            progress.stopped = f"the loss of step {step} is {kl}"
            break
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        with relative_steps(sizes):
            optimizer.step()
        paces.step()
        optimizer.zero_grad()
        progress.step, trained = step + 1, trained + rows.numel()
        kls.append(kl)
        seconds = time.monotonic() - began
        if schedule.is_due(step + 1):
            speed = trained / (time.monotonic() - since)
            held_out = evaluate()
            point = Point(step + 1, progress.read + (step + 1) * rows.numel(), sum(kls) / len(kls), held_out, speed)
            improved = held_out < progress.best.held_out
            progress.history.append(point)
            accelerator.log({k: v for k, v in asdict(point).items() if k != "step"}, step=step + 1)
            if improved:
                _save_best(distiller, accelerator, folder, progress)
            hopeless = held_out > progress.start_kl and 2 * (step + 1) > schedule.steps
            if hopeless or not held_out < DIVERGED * progress.start_kl:
                progress.stopped = (
                    f"held-out KL rose from {progress.start_kl:.4f} to {held_out:.4f} in {step + 1} steps"
                )
            save_state(accelerator, folder, progress.step)
            since, kls, trained = time.monotonic(), [], 0
        on_step(step + 1, rows.numel(), kl, progress.history[-1].held_out, seconds)
    for hook in hooks:
        hook.remove()
    load_trained(distiller, folder / BEST)
    return progress


def enable_checkpointing(model: Any) -> None:
    """Compute layers twice instead of keeping their activations; transformers renamed the switch in 5.24."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def parameter_groups(distiller: Distiller, schedule: Schedule) -> list[dict[str, Any]]:
    """Trained parameters with their learning rates: the codec's, and the weights' if there are any."""
    student = distiller.student
    found = [
        {"params": [p for p in module.parameters() if p.requires_grad], "lr": lr}
        for module, lr in ((student.codec, schedule.codec_lr), (student.source, schedule.weight_lr))
    ]
    return [group for group in found if group["params"]]


def _one_step(prepared: nn.Module, ids: Tensor, step: int, schedule: Schedule, accelerator: Accelerator) -> Tensor:
    """Gradients of one batch [B, T]; its mean KL."""
    distiller: Any = accelerator.unwrap_model(prepared)
    spec, length = distiller.student.config.spec, ids.shape[1]
    if step < schedule.cached_from:
        view = drawn_view(spec, length, seed=schedule.seed, step=step)
        total = torch.zeros((), device=ids.device)
        parts = ids.split(max(1, MICRO_TOKENS // length))
        distiller.student.source.train(schedule.gradient_checkpointing)  # there is no dropout that is not zero
        for part in parts:
            # Of a sharded student, gradients that wait to be exchanged would be whole ones.
            waits = part is not parts[-1] and not is_sharded(distiller)
            with accelerator.no_sync(prepared) if waits else nullcontext():
                with accelerator.autocast():
                    loss = prepared(part, view=view) * (len(part) / len(ids))
                accelerator.backward(loss)
            total += loss.detach()
        distiller.student.source.eval()  # recomputed layers would run without the cache
        distiller.release()
        return total
    with accelerator.autocast():
        hidden, _ = distiller.gathered(partial(distiller.teach, ids, with_kv=False))
    cache, total = distiller.gathered(distiller.student.new_cache), torch.zeros((), device=ids.device)
    chunk = spec.window or CACHED_CHUNK
    for start in range(0, length, chunk):
        part = ids[:, start : start + chunk]
        wanted = hidden[:, start : start + chunk]
        with accelerator.autocast():
            loss = prepared(part, cache=cache, teacher_hidden=wanted, start=start) * (part.shape[1] / length)
        accelerator.backward(loss)
        total += loss.detach()
    return total


def trained_tensors(distiller: Distiller) -> dict[str, Tensor]:
    """The student's trained parameters by name."""
    return {name: p.data for name, p in distiller.student.named_parameters() if p.requires_grad}


def _save_best(distiller: Distiller, accelerator: Accelerator, folder: Path, progress: Progress) -> None:
    tensors = {name: to_main(tensor) for name, tensor in trained_tensors(distiller).items()}
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        save_verified(folder / BEST, tensors)
    accelerator.wait_for_everyone()


def _save_trained(distiller: Distiller, models: list[Any], weights: list[Any], folder: str) -> None:
    """Of all the weights only what is trained goes into a state."""
    weights.clear()
    tensors = {name: to_main(tensor) for name, tensor in trained_tensors(distiller).items()}
    if PartialState().is_main_process:
        save_verified(Path(folder) / TRAINED, tensors)


def _load_trained(distiller: Distiller, models: list[Any], folder: str) -> None:
    models.clear()
    load_trained(distiller, Path(folder) / TRAINED)


def load_trained(distiller: Distiller, path: Path) -> None:
    """Give the student the trained tensors of a file.

    Raises:
        CorruptArtifactError: it is missing, damaged or of another run.
    """
    try:
        tensors = load_verified(path)
        for name, parameter in trained_tensors(distiller).items():
            parameter.copy_(cut_like(tensors[name], parameter))
    except (CorruptArtifactError, KeyError, RuntimeError) as error:
        raise CorruptArtifactError(
            f"{path} cannot be used: {error}",
            expected="a state of this run",
            remedy="start again without --resume",
        ) from error


def save_state(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Write everything that a resumed run needs beside its place, and rename it; older states go."""
    final = folder / STEP.format(step)
    beside = final.with_name(final.name + ".partial")
    with writing(beside):
        accelerator.save_state(str(beside), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for file in beside.rglob("*"):
            if file.is_file():
                _sync(file)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(beside, final)
        for old in _states(folder)[:-1]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def last_state(folder: Path) -> Path | None:
    """The newest whole state."""
    return next(iter(_states(folder)[::-1]), None)


def discard(folder: Path) -> None:
    """Remove the states of an earlier run."""
    for path in folder.glob("step-*"):
        if path.is_dir():
            shutil.rmtree(path)
    (folder / BEST).unlink(missing_ok=True)


def _states(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and path.suffix != ".partial")
