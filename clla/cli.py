"""The command line: parse, call, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Iterator, Optional

import typer

from clla import __version__, console
from clla.errors import CllaError, UsageError

app = typer.Typer(
    help="Convert language models to Cross-Layer Latent Attention: one dial, the KV byte budget.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
recipes_app = typer.Typer(help="Built-in recipes.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

CALIBRATION, PLAN, HEAL, OUTPUT, RUN = "Calibration", "Budget and plan", "Healing", "Output", "Run"
SHAPE = "A shape instead of a checkpoint"
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, …", rich_help_panel=RUN)]
Tracker = Annotated[Optional[str], typer.Option(help="Log training to: tensorboard, wandb, …", rich_help_panel=HEAL)]


def main() -> None:
    """Entry point."""
    app()


@contextmanager
def _errors(as_json: bool = False) -> Iterator[None]:
    """Turn mistakes into one message and an exit code: 2 usage or recipe, 1 everything else."""
    try:
        yield
    except CllaError as error:
        console.messages.print(f"[red]Error:[/red] {_escape(error.got)}", soft_wrap=True)
        if error.expected:
            console.messages.print(f"  expected: {_escape(error.expected)}", soft_wrap=True)
        if error.remedy:
            console.messages.print(f"  remedy:   {_escape(error.remedy)}", soft_wrap=True)
        if as_json:
            print(json.dumps({"error": error.got, "expected": error.expected, "remedy": error.remedy}))
        raise typer.Exit(error.exit_code) from error
    except OSError as error:
        console.messages.print(f"[red]Error:[/red] {_escape(str(error))}", soft_wrap=True)
        console.messages.print("  remedy:   check that the path exists and may be written to", soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        console.say("Interrupted; a conversion goes on with --resume")
        raise typer.Exit(130) from None


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _start() -> None:
    """What every command that touches a model does first."""
    from transformers.utils import logging

    import clla

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    clla.register()


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="Hub id, directory, .gguf file, or 'demo'.")],
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="Default: ./MODEL-clla.", rich_help_panel=OUTPUT)
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="Built-in recipe or YAML file; other options override it.", rich_help_panel=PLAN)
    ] = "balanced",
    kv_budget: Annotated[
        Optional[str], typer.Option(help="'6.25%', '0.0625' or '1440B' a token.", rich_help_panel=PLAN)
    ] = None,
    at_context: Annotated[
        Optional[int],
        typer.Option(help="Context at which the budget holds; 0 counts latents only.", rich_help_panel=PLAN),
    ] = None,
    window: Annotated[Optional[int], typer.Option(help="Newest tokens kept exact.", rich_help_panel=PLAN)] = None,
    sinks: Annotated[Optional[int], typer.Option(help="First tokens kept exact.", rich_help_panel=PLAN)] = None,
    evict: Annotated[
        Optional[float],
        typer.Option(help="Share of the latents that leaves again, least attended first.", rich_help_panel=PLAN),
    ] = None,
    max_group_size: Annotated[
        Optional[int], typer.Option(help="Most layers that share a latent.", rich_help_panel=PLAN)
    ] = None,
    bits: Annotated[Optional[str], typer.Option(help="Bit widths allowed, e.g. '2,4,8'.", rich_help_panel=PLAN)] = None,
    source: Annotated[Optional[str], typer.Option(help="Latent source: group or first.", rich_help_panel=PLAN)] = None,
    planner: Annotated[
        Optional[str], typer.Option(help="dynamic, uniform, cluster, pyramid or kvsharer.", rich_help_panel=PLAN)
    ] = None,
    dataset: Annotated[
        Optional[str],
        typer.Option(help="'bundled', 'self', a .txt/.jsonl/.parquet file, or a Hub id.", rich_help_panel=CALIBRATION),
    ] = None,
    calibration_tokens: Annotated[
        Optional[int], typer.Option(help="Default: 16384 on CPU, 262144 on GPU.", rich_help_panel=CALIBRATION)
    ] = None,
    sequence_length: Annotated[
        Optional[int], typer.Option(help="Tokens a calibration sequence.", rich_help_panel=CALIBRATION)
    ] = None,
    seed: Annotated[Optional[int], typer.Option(help="Of shuffling and sampling.", rich_help_panel=CALIBRATION)] = None,
    heal: Annotated[
        bool, typer.Option("--heal", help="Train briefly against the source afterwards.", rich_help_panel=HEAL)
    ] = False,
    heal_tokens: Annotated[
        Optional[int], typer.Option(help="Default: by budget and device.", rich_help_panel=HEAL)
    ] = None,
    heal_train: Annotated[
        Optional[str], typer.Option(help="codec, attention or all weights.", rich_help_panel=HEAL)
    ] = None,
    tracker: Tracker = None,
    dtype: Annotated[
        Optional[str], typer.Option(help="Compute dtype: auto, float32, bfloat16.", rich_help_panel=RUN)
    ] = None,
    device: Device = "auto",
    dry_run: Annotated[
        bool, typer.Option(help="Stop after the plan and write it as JSON.", rich_help_panel=RUN)
    ] = False,
    resume: Annotated[
        bool, typer.Option(help="Take up the finished stages of an interrupted run.", rich_help_panel=RUN)
    ] = False,
    work_dir: Annotated[
        Optional[Path],
        typer.Option(help="Keep stats and plans here: another budget then takes seconds.", rich_help_panel=RUN),
    ] = None,
    report: Annotated[bool, typer.Option(help="Measure before and after.", rich_help_panel=RUN)] = True,
    placement: Annotated[
        Optional[str],
        typer.Option(help="device, spread (over GPUs) or stream (layers from disk).", rich_help_panel=RUN),
    ] = None,
    max_shard_size: Annotated[
        Optional[str], typer.Option(help="Of the weight files, e.g. '5GB'.", rich_help_panel=OUTPUT)
    ] = None,
    adapter_only: Annotated[
        bool, typer.Option(help="Save the codec without the source's weights.", rich_help_panel=OUTPUT)
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace what is in --output.", rich_help_panel=OUTPUT)] = False,
    push_to_hub: Annotated[Optional[str], typer.Option(help="Upload as this repo id.", rich_help_panel=OUTPUT)] = None,
    private: Annotated[bool, typer.Option(help="Make the repository private.", rich_help_panel=OUTPUT)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Convert a model to shared latents within a KV byte budget."""
    with _errors(as_json):
        from clla.recipe import load_recipe

        base = load_recipe(recipe)
        chosen = base.override(
            {
                "calibration": {
                    "dataset": dataset,
                    "tokens": calibration_tokens,
                    "sequence_length": sequence_length,
                    "seed": seed,
                },
                "budget": {
                    "kv_budget": kv_budget,
                    "at_context": at_context,
                    "window": window,
                    "sinks": sinks,
                    "evict": evict,
                },
                "plan": {
                    "max_group_size": max_group_size,
                    "bits": bits.split(",") if bits is not None else None,
                    "source": source,
                    "planner": planner,
                },
                "runtime": {"compute_dtype": dtype, "placement": placement},
                **({"heal": {"tokens": heal_tokens, "train": heal_train}} if heal or base.heal is not None else {}),
            }
        )
        if chosen.heal is None and (heal_tokens is not None or heal_train is not None or tracker is not None):
            raise UsageError("--heal-tokens, --heal-train or --tracker without healing", remedy="add --heal")
        folder = (output or Path(f"{Path(model).resolve().name.removesuffix('.gguf')}-clla")).resolve()
        folder.parent.mkdir(parents=True, exist_ok=True)
        _start()
        from accelerate import PartialState

        from clla.convert.pipeline import Options
        from clla.convert.pipeline import convert as run
        from clla.evaluate.report import plan_tables

        options = Options(
            output=folder,
            device=device,
            overwrite=overwrite,
            resume=resume,
            work_dir=work_dir,
            adapter_only=adapter_only,
            dry_run=dry_run,
            report=report,
            tracker=tracker,
            max_shard_size=max_shard_size,
        )
        done = run(model, chosen, options)
        if not PartialState().is_main_process:
            return
        plan_file = folder.with_name(folder.name + "-plan.json")
        if dry_run:
            done.plan.save(plan_file)
        address = None
        if push_to_hub and not dry_run:
            from clla.hub import push

            address = push(folder, push_to_hub, private=private)
        if as_json:
            print(
                json.dumps(
                    {
                        "output": str(plan_file if dry_run else folder),
                        "pushed_to": address,
                        "plan": done.plan.to_json(),
                        "row_bytes": done.plan.row_bytes,
                        "planned_bytes_per_token": _planned(done.plan),
                        "predicted_kl": done.predicted_kl,
                        "measured": done.report.to_json() if done.report else None,
                        "healing": done.healing.to_json() if done.healing else None,
                    }
                )
            )
            return
        for table in plan_tables(done.plan, done.predicted_kl) + (done.report.tables() if done.report else []):
            console.results.print(table)
        if done.healing is not None:
            _show_healing(done.healing, done.report)
        console.say(f"Wrote {plan_file if dry_run else folder}" + (f", uploaded to {address}" if address else ""))


def _planned(plan: Any) -> float | None:
    return plan.bytes_at(plan.at_context) / plan.at_context if plan.at_context else None


def _show_healing(healing: Any, after: Any) -> None:
    for table in healing.tables(after):
        console.results.print(table)
    console.results.print(healing.verdict)


@app.command(name="heal")
def heal_command(
    checkpoint: Annotated[str, typer.Argument(help="Directory that clla convert wrote.")],
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="Default: CHECKPOINT-healed.", rich_help_panel=OUTPUT)
    ] = None,
    tokens: Annotated[Optional[int], typer.Option(help="Default: by budget and device.", rich_help_panel=HEAL)] = None,
    train: Annotated[Optional[str], typer.Option(help="codec, attention or all weights.", rich_help_panel=HEAL)] = None,
    codec_lr: Annotated[Optional[float], typer.Option(help="Learning rate of the codec.", rich_help_panel=HEAL)] = None,
    weight_lr: Annotated[
        Optional[float], typer.Option(help="Learning rate of the weights.", rich_help_panel=HEAL)
    ] = None,
    sequence_length: Annotated[Optional[int], typer.Option(help="Tokens a sequence.", rich_help_panel=HEAL)] = None,
    batch_tokens: Annotated[Optional[int], typer.Option(help="Tokens a step.", rich_help_panel=HEAL)] = None,
    codec_share: Annotated[
        Optional[float],
        typer.Option(help="Share of the tokens that first trains codecs on attention outputs.", rich_help_panel=HEAL),
    ] = None,
    cache_share: Annotated[
        Optional[float], typer.Option(help="Last share of the steps, on the model's own cache.", rich_help_panel=HEAL)
    ] = None,
    evaluations: Annotated[
        Optional[int], typer.Option(help="Times that held-out KL is measured and all is saved.", rich_help_panel=HEAL)
    ] = None,
    dataset: Annotated[
        Optional[str],
        typer.Option(
            help="Text to train on; default: that of the calibration. 'self': the model's own.", rich_help_panel=HEAL
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Compute layers twice to save memory.", rich_help_panel=HEAL),
    ] = False,
    seed: Annotated[Optional[int], typer.Option(help="Of the order of the text.", rich_help_panel=HEAL)] = None,
    teacher: Annotated[
        Optional[str],
        typer.Option(
            help="Source model; default: the checkpoint's own weights, or where they came from.", rich_help_panel=HEAL
        ),
    ] = None,
    tracker: Tracker = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16.", rich_help_panel=RUN)] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last saved step.", rich_help_panel=RUN)
    ] = False,
    work_dir: Annotated[Optional[Path], typer.Option(help="Keep text and states here.", rich_help_panel=RUN)] = None,
    report: Annotated[bool, typer.Option(help="Measure before and after.", rich_help_panel=RUN)] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace what is in --output.", rich_help_panel=OUTPUT)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Train a converted model briefly against its source, to buy back what its budget lost."""
    with _errors(as_json):
        _start()
        from accelerate import PartialState

        from clla.convert.heal_checkpoint import CheckpointOptions, heal_checkpoint

        changes = {
            "tokens": tokens,
            "train": train,
            "codec_lr": codec_lr,
            "weight_lr": weight_lr,
            "sequence_length": sequence_length,
            "batch_tokens": batch_tokens,
            "codec_share": codec_share,
            "cache_share": cache_share,
            "evaluations": evaluations,
            "dataset": dataset,
            "gradient_checkpointing": gradient_checkpointing or None,
            "seed": seed,
        }
        beside = Path(checkpoint) if Path(checkpoint).is_dir() else Path(Path(checkpoint).name)  # of a Hub id: here
        folder = (output or Path(f"{beside.resolve()}-healed")).resolve()
        folder.parent.mkdir(parents=True, exist_ok=True)
        options = CheckpointOptions(
            output=folder,
            device=device,
            dtype=dtype,
            teacher=teacher,
            overwrite=overwrite,
            resume=resume,
            work_dir=work_dir,
            report=report,
            tracker=tracker,
        )
        _, after, healing = heal_checkpoint(checkpoint, changes, options)
        if not PartialState().is_main_process:
            return
        if as_json:
            measured = after.to_json() if after else None
            print(json.dumps({"output": str(folder), "measured": measured, "healing": healing.to_json()}))
            return
        _show_healing(healing, after)
        console.say(f"Wrote {folder}")


@app.command(name="eval")
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Converted checkpoint.")],
    text: Annotated[str, typer.Option(help="Text to measure on; default: the end of the bundled text.")] = "bundled",
    windows: Annotated[int, typer.Option(min=1, help="Windows of text.")] = 4,
    window_length: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 2048,
    chunk: Annotated[Optional[int], typer.Option(min=1, help="Tokens a step; default: the exact window.")] = None,
    select_tokens: Annotated[
        Optional[int], typer.Option(min=1, help="Old tokens read in full; steps then are as short as that takes.")
    ] = None,
    contexts: Annotated[str, typer.Option(help="Context lengths at which caches are measured.")] = "512,2048,8192",
    retrieval: Annotated[bool, typer.Option(help="Also plant codes and ask for them.")] = True,
    retrieval_context: Annotated[int, typer.Option(min=128, help="Tokens around a planted code.")] = 4096,
    retrieval_trials: Annotated[int, typer.Option(min=1, help="Number of codes.")] = 8,
    teacher: Annotated[
        Optional[str], typer.Option(help="Source model, where the weights were trained; default: from the recipe.")
    ] = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
) -> None:
    """Measure perplexity, KL, retrieval and cache bytes of a converted model against its source."""
    with _errors(as_json):
        _start()
        from clla.calibrate.data import evaluation_windows
        from clla.evaluate.report import before_and_after
        from clla.load import load_checkpoint, recipe_of, teacher_of
        from clla.source import pick_device

        lengths, where = _integers(contexts), pick_device(device)
        loaded = load_checkpoint(checkpoint, device=where, dtype=dtype)
        if select_tokens is not None:
            chunk = _select(loaded.model, select_tokens, chunk)
        trained = teacher is not None or loaded.model.config.clla.get("healed") is not None
        source = teacher_of(loaded, recipe_of(Path(checkpoint).expanduser()), teacher, where) if trained else None
        ids = evaluation_windows(text, loaded.tokenizer, count=windows, length=window_length)
        with console.progress("Measuring (windows)", len(ids)) as advance:
            report = before_and_after(
                loaded.model,
                loaded.tokenizer,
                loaded.plan,
                ids,
                chunk=chunk,
                contexts=lengths,
                retrieval_context=retrieval_context if retrieval else 0,
                retrieval_trials=retrieval_trials,
                source_model=source,
                on_step=advance,
            )
        if as_json:
            print(json.dumps(report.to_json()))
            return
        for table in report.tables():
            console.results.print(table)


def _select(model: Any, tokens: int, chunk: Optional[int]) -> int:
    """Have a model select tokens; tokens a step at which it does so."""
    from clla.errors import UsageError

    model.select_tokens = tokens
    most = model.reading_tokens
    if chunk is not None and chunk > most:
        raise UsageError(
            f"steps of {chunk} tokens read all old ones", expected=f"at most {most}", remedy=f"pass --chunk {most}"
        )
    return min(most, chunk or most)


@app.command()
def compare(
    model: Annotated[str, typer.Argument(help="Hub id, directory, .gguf file, or 'demo'.")],
    budget: Annotated[str, typer.Option(help="Shares of the source's cache at the context, comma-separated.")] = "",
    methods: Annotated[Optional[str], typer.Option(help="Comma-separated; all by default.")] = None,
    text: Annotated[str, typer.Option(help="Text to measure on; default: the end of the bundled text.")] = "bundled",
    dataset: Annotated[str, typer.Option(help="Text to calibrate on.")] = "bundled",
    quick: Annotated[
        bool, typer.Option("--quick", help="Two windows, two budgets, two codes, main variants only.")
    ] = False,
    windows: Annotated[Optional[int], typer.Option(min=1, help="Default 24, or 2 with --quick.")] = None,
    context: Annotated[int, typer.Option(min=64, help="Tokens a window; budgets hold here.")] = 2048,
    long_context: Annotated[int, typer.Option(min=64, help="Where bytes are measured too.")] = 8192,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens a step.")] = 128,
    calibration_tokens: Annotated[Optional[int], typer.Option(help="Default: 16384 on CPU, 262144 on GPU.")] = None,
    retrieval_trials: Annotated[Optional[int], typer.Option(min=0, help="Planted codes; default 16, or 2.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of table and pictures.")] = Path("comparison"),
    work_dir: Annotated[Optional[Path], typer.Option(help="Keep the moments here.")] = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
) -> None:
    """Run published methods and ours side by side on one model, at equal measured bytes."""
    with _errors(as_json):
        _start()
        from clla.compare import Options, run_comparison

        if budget and not budget.strip(" ,"):
            raise UsageError(f"--budget {budget!r} names no share", expected="e.g. 25%,6.25%", remedy="correct it")
        shares = _shares(budget or ("25%,6.25%" if quick else "50%,25%,12.5%,6.25%,3%"))
        options = Options(
            budgets=shares,
            methods=methods,
            text=text,
            dataset=dataset,
            windows=windows or (2 if quick else 24),
            context=context,
            long_context=long_context,
            chunk=chunk,
            calibration_tokens=calibration_tokens,
            retrieval_trials=(2 if quick else 16) if retrieval_trials is None else retrieval_trials,
            device=device,
            work_dir=work_dir,
            thorough=not quick,
        )
        result = run_comparison(model, options)
        result.save(output)
        if as_json:
            print(json.dumps(result.to_json()))
            return
        for table in result.tables():
            console.wide(180).print(table)
        console.say(f"Wrote {output}: comparison.json, .csv, .png and .svg")


def _shares(text: str) -> list[float]:
    from clla.recipe import parse_budget

    return [parse_budget(part, source_bytes=1.0) for part in text.split(",") if part.strip()]


def _integers(text: str, option: str = "--contexts") -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        numbers = (0,)
    if any(number < 1 for number in numbers):
        raise UsageError(f"{option} {text}", expected="positive whole numbers, e.g. 512,2048", remedy="correct it")
    return numbers


@app.command()
def bench(
    checkpoint: Annotated[Optional[str], typer.Argument(help="Converted checkpoint; or give --shape.")] = None,
    shape: Annotated[
        Optional[str],
        typer.Option(
            help="Random weights of a known shape instead: smollm2-135m, llama-3.2-1b, llama-3-8b, qwen3-8b or tiny.",
            rich_help_panel=SHAPE,
        ),
    ] = None,
    kv_budget: Annotated[
        Optional[str], typer.Option(help="Of the shape's latents: '6.25%', '1440B', …", rich_help_panel=SHAPE)
    ] = None,
    max_group_size: Annotated[
        Optional[int], typer.Option(min=1, help="Layers that share a latent.", rich_help_panel=SHAPE)
    ] = None,
    contexts: Annotated[
        Optional[str], typer.Option(help="Tokens in the cache; default 512,2048, on a GPU 2048,8192,32768.")
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="Sequences at once, e.g. 1,8.")] = "1",
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens decoded in each pass.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes of each model.")] = 3,
    prefill_chunk: Annotated[
        Optional[int],
        typer.Option(
            min=1, help="Tokens a call of the prefill; default as in generate(): the source takes all at once."
        ),
    ] = None,
    largest_batch: Annotated[
        bool, typer.Option("--largest-batch", help="Find the most sequences that decode at the longest context.")
    ] = False,
    memory_limit: Annotated[
        Optional[str], typer.Option(help="For the caches of the largest batch, on a CPU: e.g. 2GB.")
    ] = None,
    select_tokens: Annotated[
        Optional[int], typer.Option(min=1, help="Only so many old tokens are decoded in full, the best.")
    ] = None,
    static: Annotated[bool, typer.Option("--static", help="Tell the converted cache its length beforehand.")] = False,
    seed: Annotated[int, typer.Option(help="Of tokens and random weights.")] = 0,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16.", rich_help_panel=RUN)] = "auto",
    plot: Annotated[Optional[Path], typer.Option(help="Draw speed against context.", rich_help_panel=OUTPUT)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Measure speed and memory, source and converted model side by side."""
    with _errors(as_json):
        _start()
        from clla.bench import Options, run_bench

        options = Options(
            shape=shape,
            kv_budget=kv_budget,
            max_group_size=max_group_size,
            contexts=_integers(contexts) if contexts is not None else None,
            batch_sizes=_integers(batch_sizes, "--batch-sizes"),
            new_tokens=new_tokens,
            repeats=repeats,
            prefill_chunk=prefill_chunk,
            largest_batch=largest_batch,
            memory_limit=_bytes(memory_limit) if memory_limit is not None else None,
            select_tokens=select_tokens,
            static=static,
            device=device,
            dtype=dtype,
            seed=seed,
            plot=plot,
        )
        report = run_bench(checkpoint, options)
        if as_json:
            print(json.dumps(report.to_json()))
            return
        for table in report.tables():
            console.wide(160).print(table)
        if plot is not None:
            console.say(f"Wrote {plot}")


def _bytes(text: str) -> int:
    from accelerate.utils import convert_file_size_to_int

    try:
        found = int(text) if text.strip().isdecimal() else convert_file_size_to_int(text.strip())
    except ValueError:
        found = 0
    if found < 1:
        raise UsageError(f"--memory-limit {text}", expected="bytes, e.g. 500MB or 2GiB", remedy="correct it")
    return found


@app.command()
def generate(
    checkpoint: Annotated[str, typer.Argument(help="Converted checkpoint.")],
    prompt: Annotated[str, typer.Option(help="What to continue, or '-' for standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 100,
    chat: Annotated[bool, typer.Option(help="Use the chat template where there is one.")] = True,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams.")] = 1,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    select_tokens: Annotated[
        Optional[int], typer.Option(min=1, help="Old tokens that each new one reads in full; default: all.")
    ] = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16.")] = "auto",
) -> None:
    """Generate text with the compressed cache."""
    with _errors():
        _start()
        import torch

        from clla.errors import UsageError
        from clla.load import load_checkpoint
        from clla.modeling.hooks_clla import CACHE
        from clla.source import pick_device

        loaded = load_checkpoint(checkpoint, device=pick_device(device), dtype=dtype)
        text = sys.stdin.read() if prompt == "-" else prompt
        if not text:
            raise UsageError("the prompt is empty", expected="some text", remedy='pass --prompt "…"')
        if chat and loaded.tokenizer.chat_template:
            turns = [{"role": "user", "content": text}]
            text = loaded.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            inputs = loaded.tokenizer(text, return_tensors="pt", add_special_tokens=False)
        else:
            inputs = loaded.tokenizer(text, return_tensors="pt")
        inputs = inputs.to(loaded.model.device)
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        model: Any = loaded.model
        model.select_tokens = select_tokens
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            return_dict_in_generate=True,
            **sampling,
        )
        new = output.sequences[0, inputs["input_ids"].shape[1] :]
        print(loaded.tokenizer.decode(new, skip_special_tokens=True))
        cache, plan = output[CACHE], loaded.plan
        total = cache.get_seq_length()
        source = plan.source_bytes_per_token * total * num_beams
        fixed = plan.exact_bytes / (plan.source_bytes_per_token - plan.row_bytes)
        console.say(
            f"{total} tokens: cache {cache.nbytes:,} bytes, the source's would take {source:,}; each further token "
            f"{plan.row_bytes:,} against {plan.source_bytes_per_token:,} (smaller from about {fixed:,.0f} tokens on)"
        )


@recipes_app.command("ls")
def recipes_ls() -> None:
    """List the built-in recipes."""
    with _errors():
        from rich.table import Table

        from clla.recipe import builtin_recipes, load_recipe

        table = Table("name", "KV budget", "description")
        for name in builtin_recipes():
            recipe = load_recipe(name)
            table.add_row(name, recipe.budget.kv_budget, recipe.description)
        console.results.print(table)


@recipes_app.command("show")
def recipes_show(
    name: Annotated[str, typer.Argument(help="Recipe name or YAML file.")] = "balanced",
    schema: Annotated[bool, typer.Option("--schema", help="Print all fields with their meaning.")] = False,
) -> None:
    """Print a recipe with every default filled in."""
    with _errors():
        from clla.recipe import Recipe, load_recipe

        print(json.dumps(Recipe.model_json_schema(), indent=1) if schema else load_recipe(name).to_yaml(), end="")


@recipes_app.command("cp")
def recipes_cp(
    name: Annotated[str, typer.Argument(help="Built-in recipe.")],
    destination: Annotated[Path, typer.Argument(help="File or directory.")] = Path("."),
) -> None:
    """Copy a built-in recipe to start your own from."""
    with _errors():
        from clla.errors import UsageError
        from clla.recipe import builtin_recipes

        builtin = builtin_recipes()
        if name not in builtin:
            raise UsageError(f"no recipe {name!r}", expected="one of " + ", ".join(builtin), remedy="clla recipes ls")
        target = destination / builtin[name].name if destination.is_dir() else destination
        if target.exists():
            raise UsageError(f"{target} exists", expected="a new file", remedy="name another destination")
        shutil.copyfile(builtin[name], target)
        print(target)
