"""From a checkpoint or a shape to the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from clla import console
from clla.bench.generating import generate_speed
from clla.bench.largest_batch import largest_batches
from clla.bench.machine import machine_facts
from clla.bench.options import Options
from clla.bench.pair import Pair, load_pair, random_pair
from clla.bench.peak import how_measured
from clla.bench.shapes import shape_config
from clla.bench.speed import Work, measure, run_pass
from clla.bench.speed_report import NAMES, SpeedReport, SpeedRow
from clla.checkpoint.load import checkpoint_folder, checkpoint_reach
from clla.errors import UsageError
from clla.evaluate.figures import draw_speed
from clla.evaluate.measured_cache import with_kept_bytes
from clla.recipe import BudgetConfig
from clla.source.device import pick_device
from clla.source.lengths import Reach, reach_of
from clla.storage.places import PICTURES, check_file

CONTEXTS = {"cpu": (512, 2048), "cuda": (2048, 8192, 32768)}
WARM_UP = 8  # tokens of context, before anything is measured


def run_bench(checkpoint: str | None, options: Options) -> SpeedReport:
    """Measure a checkpoint, or the shape that the options name.

    Raises:
        CllaError: options that do not fit each other or the model, or a checkpoint that cannot be read.
    """
    device = pick_device(options.device)
    _check(checkpoint, options, device)
    contexts = _contexts(_reach(checkpoint, options), options, device)
    pair = _pair(checkpoint, options, device)
    model: Any = pair.converted
    if options.prefill_chunk is not None:
        model.prefill_chunk = options.prefill_chunk
    if options.attend_top_k is not None:
        model.attend_top_k = options.attend_top_k
    cells = len(contexts) * len(options.batch_sizes)
    passes = len(NAMES) * (cells * (1 + options.repeats) + options.repeats * (2 if options.largest_batch else 1))
    with console.progress("Measuring (passes)", passes) as advance:
        report = _measure(pair, contexts, options, advance)
    if options.plot is not None:
        draw_speed(report.lines(), options.plot, title=f"{pair.name}, {report.machine['name']}")
    return report


def _measure(pair: Pair, contexts: tuple[int, ...], options: Options, on_pass: Callable[[int], None]) -> SpeedReport:
    """Contexts by batches, then `generate` at the longest context that fits, then the largest batch."""
    model, device = pair.converted, pair.converted.device
    plan = with_kept_bytes(pair.plan, model.source, itemsize=model.dtype.itemsize)  # in the dtype that it runs in
    new_tokens, repeats = options.new_tokens, options.repeats
    contenders = pair.contenders(static=options.static, source_chunk=options.prefill_chunk)

    def work(context: int) -> Work:
        return Work(context=context, new_tokens=new_tokens)

    def ids(batch: int, context: int) -> torch.Tensor:
        return pair.ids(batch, context + new_tokens, options.seed)

    pair.touch()
    for contender in contenders.values():
        run_pass(contender, ids(1, WARM_UP), work(WARM_UP))
    rows = []
    for context in contexts:
        for batch in options.batch_sizes:
            found = measure(contenders, ids(batch, context), work(context), repeats=repeats, on_pass=on_pass)
            planned = batch * (plan.bytes_at(context) + plan.kept_bytes_at(context))
            rows.append(SpeedRow(context, batch, planned, found))
    fitting = [row.context for row in rows if all(row.found.values())]
    prompt = ids(1, max(fitting, default=contexts[0]))[:, :-new_tokens]
    generated = generate_speed(contenders, prompt, new_tokens=new_tokens, repeats=repeats, on_pass=on_pass)
    largest, most, limit = None, contexts[-1], options.memory_limit
    if options.largest_batch:
        largest = largest_batches(
            contenders, ids(1, most), work(most), repeats=repeats, memory_limit=limit, on_pass=on_pass
        )
    return SpeedReport(
        model=pair.name,
        settings=_settings(pair, contexts, options),
        machine=machine_facts(device),
        weights_bytes=sum(weight.nbytes for weight in model.source.parameters()),
        codec_bytes=sum(weight.nbytes for weight in model.codec.parameters()),
        memory=how_measured(device),
        rows=rows,
        generate_context=prompt.shape[1],
        generated=generated,
        largest=largest,
        largest_basis=_basis(limit),
    )


def _reach(checkpoint: str | None, options: Options) -> Reach:
    if checkpoint is not None:
        return checkpoint_reach(checkpoint_folder(checkpoint))
    return reach_of(shape_config(str(options.shape)))


def _pair(checkpoint: str | None, options: Options, device: torch.device) -> Pair:
    if checkpoint is not None:
        return load_pair(checkpoint, device=device, dtype=options.dtype)
    return random_pair(
        str(options.shape),
        kv_budget=options.kv_budget or BudgetConfig().kv_budget,
        max_layers_per_group=options.max_layers_per_group,
        device=device,
        dtype=options.dtype,
        seed=options.seed,
    )


def _check(checkpoint: str | None, options: Options, device: torch.device) -> None:
    """Refuse what does not fit together before anything is loaded."""
    if (checkpoint is None) == (options.shape is None):
        given = "neither a checkpoint nor --shape" if checkpoint is None else f"both {checkpoint} and --shape"
        raise UsageError(given, expected="one of them", remedy="name a checkpoint, or a shape such as --shape tiny")
    if options.shape is None and (options.kv_budget is not None or options.max_layers_per_group is not None):
        raise UsageError(
            "--kv-budget or --max-layers-per-group with a checkpoint",
            expected="a shape, whose plan is made here; a checkpoint has its own",
            remedy="leave it out, or convert with it: clla convert",
        )
    if options.contexts == () or not options.batch_sizes:
        raise UsageError("an empty list", expected="e.g. --contexts 512,2048 --batch-sizes 1,4", remedy="correct it")
    if device.type not in CONTEXTS:
        raise UsageError(f"--device {device}", expected="cpu or cuda, whose memory can be measured", remedy="use one")
    if device.type == "cuda" and options.memory_limit is not None:
        raise UsageError(
            "--memory-limit on a GPU", expected="its own memory, which is run into", remedy="leave the limit out"
        )
    if device.type == "cpu" and options.largest_batch != (options.memory_limit is not None):
        raise UsageError(
            "on a CPU one of --largest-batch and --memory-limit without the other",
            expected="bytes that the caches of the largest batch may take",
            remedy="e.g. --largest-batch --memory-limit 2GB",
        )
    if options.plot is not None:
        check_file(options.plot, "--plot", PICTURES)


def _contexts(reach: Reach, options: Options, device: torch.device) -> tuple[int, ...]:
    """Those asked for, or the default ones that the model was made for, in order.

    Raises:
        UsageError: the model has no positions for them.
    """
    if options.contexts is None:
        fitting = tuple(c for c in CONTEXTS[device.type] if reach.fit(c, new_tokens=options.new_tokens) == c)
        contexts = fitting or (reach.fit(CONTEXTS[device.type][0], new_tokens=options.new_tokens),)
    else:
        contexts = tuple(sorted(set(options.contexts)))
    longest = contexts[-1]
    got, remedy = f"--contexts {longest} and {options.new_tokens} new tokens", "lower --contexts or --new-tokens"
    reach.check(got, longest + options.new_tokens, remedy=remedy)
    return contexts


def _settings(pair: Pair, contexts: tuple[int, ...], options: Options) -> dict[str, Any]:
    """What was asked for, with every default filled in, and what the plan is."""
    plan, source = pair.plan, pair.converted.source
    return {
        **options.model_dump(),
        "plot": None if options.plot is None else str(options.plot),
        "contexts": list(contexts),
        "batch_sizes": list(options.batch_sizes),
        "prefill_chunk": {"source": options.prefill_chunk, "converted": pair.converted.prefill_chunk},
        "dtype": str(source.dtype).removeprefix("torch."),
        "exact_dtype": pair.converted.config.spec.kv_dtype,
        "attention": source.config._attn_implementation,
        "window": plan.window,
        "row_bytes": plan.row_bytes,
        "latents_share": plan.row_bytes / plan.source_bytes_per_token,
        "layer_groups": [len(group.layers) for group in plan.groups],
    }


def _basis(memory_limit: int | None) -> str:
    if memory_limit is None:
        return "runs that did or did not run out of GPU memory"
    return f"measured caches of at most {memory_limit / 1e6:,.6g} MB, nothing else counted"
