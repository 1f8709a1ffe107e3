"""Run by each of two processes: a sharded distiller has the loss, gradients and held-out KL of a whole one.

Arguments: precision (`no` or `bf16`), then names of pico models, each with the source of its latents and what is
trained (`llama:first:all`).
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from accelerate import Accelerator
from conftest import pico
from helpers import converted_of, plan_of, stats_of, tokens
from torch.distributed.tensor import DTensor

from clla.evaluate.perplexity import Subject, compare
from clla.evaluate.source_cache import SourceCache
from clla.heal.attention import view_of
from clla.heal.sharding import is_sharded, sharded_distiller, whole
from clla.heal.steps import component_sizes
from clla.heal.student import Distiller, make_student

LENGTH = 60


def backward(distiller: Distiller, accelerator: Accelerator, parts: Any) -> float:
    """Mean loss of parts [B, T] of a batch, and its gradients."""
    s: Any = distiller.student.config.clla
    view = view_of(LENGTH, window=s["window"], flush_block=s["flush_block"], sinks=s["sinks"], chunk=16)
    losses = []
    for part in parts:
        with accelerator.autocast():
            loss = distiller(part, view=view) / len(parts)
        loss.backward()
        losses.append(loss.detach())
    distiller.release()
    return float(accelerator.reduce(torch.stack(losses).sum(), reduction="mean"))


def held_out(distiller: Distiller, accelerator: Accelerator) -> float:
    teacher, student = distiller.teacher, distiller.student
    source = Subject(teacher, lambda: SourceCache(teacher.config, torch.float32))
    subjects = {"source": source, "student": Subject(student, student.new_cache)}
    with accelerator.autocast():
        return distiller.gathered(lambda: compare(subjects, tokens(1, 40, 5), chunk=16)["student"].kl)


def check(accelerator: Accelerator, name: str, source: str, what: str) -> None:
    exact = accelerator.mixed_precision == "no"
    model = pico(name) if exact else pico(name).to(torch.bfloat16)
    stats = stats_of(pico(name))
    converted = converted_of(model, plan_of(stats, model, source=source, bits=(2, 2)), stats, prefill_chunk=24)
    converted.codec.to(model.dtype)
    ids, rank, loud = tokens(4, LENGTH), accelerator.process_index, f"{name} {source} {what}"
    with torch.no_grad():
        before = converted(ids).logits
    plain = Distiller(converted.source, make_student(converted, what))
    expected = held_out(plain, accelerator), backward(plain, accelerator, [ids])
    sharded = sharded_distiller(converted.source, converted, what, accelerator)
    assert is_sharded(sharded) and not any(map(is_sharded, plain.modules()))
    assert sum(map(is_sharded, sharded.modules())) == 2 * model.config.num_hidden_layers + 1
    found = held_out(sharded, accelerator), backward(sharded, accelerator, ids[2 * rank : 2 * rank + 2].split(1))
    for a, b in zip(found, expected, strict=True):
        assert math.isclose(a, b, rel_tol=1e-4 if exact else 0.03), (loud, found, expected)
    sizes = component_sizes(plain)
    for (tensor, size), (_, wanted) in zip(component_sizes(sharded), sizes, strict=True):
        assert isinstance(tensor, DTensor) and isinstance(size, DTensor)
        torch.testing.assert_close(size.full_tensor(), wanted)
    wrong = norm = 0.0
    for key, parameter in sharded.named_parameters():
        assert isinstance(parameter, DTensor), key
        assert parameter.to_local().shape[0] <= math.ceil(parameter.shape[0] / 2), key
        gradient = plain.get_parameter(key).grad
        if gradient is not None:
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            own = whole(parameter.grad)
            wrong, norm = wrong + float((own - gradient).square().sum()), norm + float(gradient.square().sum())
            if exact:
                torch.testing.assert_close(own, gradient, rtol=1e-3, atol=1e-5, msg=lambda text, k=key: f"{k}: {text}")
        else:
            assert parameter.grad is None, key
    assert (wrong / norm) ** 0.5 < (1e-4 if exact else 0.1), (loud, (wrong / norm) ** 0.5)
    with torch.no_grad():
        assert torch.equal(converted(ids).logits, before), loud
    print(loud, (wrong / norm) ** 0.5, found, expected, file=sys.stderr)


if __name__ == "__main__":
    shared = Accelerator(cpu=True, mixed_precision=sys.argv[1])
    assert shared.num_processes == 2
    for case in sys.argv[2:]:
        check(shared, *case.split(":"))
