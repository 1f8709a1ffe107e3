"""`clla convert`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from clla import console
from clla.commands.options import (
    CALIBRATION,
    DTYPES,
    HEAL,
    OUTPUT,
    PLACEMENTS,
    PLAN,
    PLANNERS,
    RUN,
    TRAINED,
    Bits,
    Device,
    Evict,
    KVBudget,
    LatentSource,
    MaxGroupSize,
    RecipeName,
    Sinks,
    Tracker,
    Window,
    as_object,
    errors,
    path,
    show_error,
    show_healing,
    start,
)
from clla.errors import CllaError, UsageError


def convert(
    model: Annotated[str, typer.Argument(help="Hub id (user/repo\\[@revision]), directory, .gguf file, or 'demo'.")],
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", help="Default: ./MODEL-clla.", rich_help_panel=OUTPUT, parser=path),
    ] = None,
    recipe: RecipeName = "balanced",
    kv_budget: KVBudget = None,
    at_context: Annotated[
        Optional[int],
        typer.Option(help="Context at which the budget holds; 0 counts latents only.", rich_help_panel=PLAN),
    ] = None,
    window: Window = None,
    sinks: Sinks = None,
    evict: Evict = None,
    max_group_size: MaxGroupSize = None,
    bits: Bits = None,
    source: LatentSource = None,
    planner: Annotated[
        Optional[str],
        typer.Option(
            help="dynamic, uniform, cluster, pyramid or kvsharer.",
            rich_help_panel=PLAN,
            autocompletion=PLANNERS,
        ),
    ] = None,
    dataset: Annotated[
        Optional[str],
        typer.Option(
            help="'bundled', 'self', a .txt/.jsonl/.parquet file, or a Hub data set, user/name/config:split.",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    calibration_tokens: Annotated[
        Optional[int], typer.Option(help="Default: 16384 on CPU, 262144 on GPU.", rich_help_panel=CALIBRATION)
    ] = None,
    sequence_length: Annotated[
        Optional[int],
        typer.Option(
            help="Tokens per calibration sequence; default: 1024, or what the model takes.", rich_help_panel=CALIBRATION
        ),
    ] = None,
    seed: Annotated[Optional[int], typer.Option(help="Of shuffling and sampling.", rich_help_panel=CALIBRATION)] = None,
    heal: Annotated[
        bool, typer.Option("--heal", help="Train briefly against the source afterwards.", rich_help_panel=HEAL)
    ] = False,
    heal_tokens: Annotated[
        Optional[int], typer.Option(help="Default: by budget and device.", rich_help_panel=HEAL)
    ] = None,
    heal_train: Annotated[
        Optional[str],
        typer.Option(help="codec, attention or all weights.", rich_help_panel=HEAL, autocompletion=TRAINED),
    ] = None,
    tracker: Tracker = None,
    dtype: Annotated[
        Optional[str],
        typer.Option(help="Compute dtype: auto, float32, bfloat16.", rich_help_panel=RUN, autocompletion=DTYPES),
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
        typer.Option(
            help="Keep stats and plans here: another budget then takes seconds.", rich_help_panel=RUN, parser=path
        ),
    ] = None,
    report: Annotated[bool, typer.Option(help="Measure before and after.", rich_help_panel=RUN)] = True,
    placement: Annotated[
        Optional[str],
        typer.Option(
            help="device, spread (over GPUs) or stream (layers from disk).",
            rich_help_panel=RUN,
            autocompletion=PLACEMENTS,
        ),
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
    with errors(as_json, interrupted="nothing half-written was left"):
        start()
        from accelerate import PartialState

        from clla import api
        from clla.evaluate.plan_tables import plan_tables

        target = None
        if private and not push_to_hub:
            raise UsageError("--private without --push-to-hub", expected="a repository", remedy="add --push-to-hub ID")
        if push_to_hub and dry_run:
            console.say("A dry run uploads nothing: --push-to-hub has no effect")
        elif push_to_hub:
            target = _target(model, push_to_hub, private=private, adapter_only=adapter_only)
        done = api.convert_model(
            model,
            output=output,
            recipe=recipe,
            kv_budget=kv_budget,
            at_context=at_context,
            window=window,
            sinks=sinks,
            evict=evict,
            max_group_size=max_group_size,
            bits=bits,
            source=source,
            planner=planner,
            dataset=dataset,
            calibration_tokens=calibration_tokens,
            sequence_length=sequence_length,
            seed=seed,
            heal=heal,
            heal_tokens=heal_tokens,
            heal_train=heal_train,
            tracker=tracker,
            dtype=dtype,
            placement=placement,
            device=device,
            dry_run=dry_run,
            resume=resume,
            work_dir=work_dir,
            report=report,
            max_shard_size=max_shard_size,
            adapter_only=adapter_only,
            overwrite=overwrite,
        )
        folder = done.output
        if not PartialState().is_main_process:
            return
        plan_file = folder.with_name(folder.name + "-plan.json")
        if dry_run:
            plan_file.parent.mkdir(parents=True, exist_ok=True)
            done.plan.save(plan_file)
        if as_json:
            pushed, failed = _pushed(folder, target, private=private)
            print(
                json.dumps(
                    {
                        "output": str(plan_file if dry_run else folder),
                        "pushed_to": pushed.url if pushed else None,
                        "push_failed": as_object(failed) if failed else None,
                        "plan": done.plan.to_json(),
                        "row_bytes": done.plan.row_bytes,
                        "planned_bytes_per_token": _planned(done.plan),
                        "predicted_kl": done.predicted_kl,
                        "measured": done.report.to_json() if done.report else None,
                        "healing": done.healing.to_json() if done.healing else None,
                        "needs_healing": done.needs_healing,
                    }
                )
            )
        else:
            for table in plan_tables(done.plan, done.predicted_kl) + (done.report.tables() if done.report else []):
                console.show(table)
            if done.healing is not None:
                show_healing(done.healing, done.report)
            console.say(f"Wrote {plan_file if dry_run else folder}")
            if not dry_run:
                console.say(f"A page about it: clla report {folder}")
            if done.needs_healing and not dry_run:
                console.say(
                    f"Decoupled keys NEED HEALING before this model is of use: clla heal {shlex.quote(str(folder))}\n"
                    "(clla convert … --heal does both at once)"
                )
            pushed, failed = _pushed(folder, target, private=private)
            if pushed is not None:
                console.say(f"Uploaded to {pushed.url}, commit {pushed.commit[:12]}")
        if failed is not None:
            show_error(failed)
            raise typer.Exit(1)


def _target(model: str, repo_id: str, *, private: bool, adapter_only: bool) -> str:
    """Where to push to, asked before an hour's work and not after it."""
    from clla.hub.revision import split_revision
    from clla.publish.base_model import cached_model, check_public
    from clla.publish.push import check_access

    local = Path(model).expanduser().exists() or model == "demo"
    if adapter_only and local and cached_model(model) is None:
        raise UsageError(
            f"--adapter-only and --push-to-hub for {model}, which is on this machine alone",
            expected="a Hub id, from which others can load the weights",
            remedy=f"convert without --push-to-hub, then: clla push FOLDER {repo_id} --base-model user/repo",
        )
    repo_id = check_access(repo_id, private=private)
    if adapter_only and not local and not private:
        check_public(split_revision(model)[0])
    return repo_id


def _pushed(folder: Path, repo_id: str | None, *, private: bool) -> tuple[Any, CllaError | None]:
    """What came of the push, if one was wanted, or why nothing did; the results are shown in both cases."""
    if repo_id is None:
        return None, None
    from clla.publish.push import Push, push

    target = Push(folder, repo_id, private=private)
    try:
        return push(target)[1], None
    except CllaError as error:
        if target.command in error.remedy:
            return None, error
        return None, CllaError(error.got, expected=error.expected, remedy=f"{error.remedy}; then: {target.command}")


def _planned(plan: Any) -> float | None:
    return plan.bytes_at(plan.at_context) / plan.at_context if plan.at_context else None
