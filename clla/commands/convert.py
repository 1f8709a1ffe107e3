"""`clla convert`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from clla import console
from clla.commands.options import (
    HEAL,
    OUTPUT,
    RUN,
    AsJson,
    Device,
    Evaluate,
    Overwrite,
    RecipeName,
    ReportTo,
    as_object,
    errors,
    path,
    show_error,
    show_healing,
    start,
    with_options,
)
from clla.errors import CllaError, UsageError
from clla.recipe import OPTIONS


@with_options(OPTIONS)
def convert(
    model: Annotated[str, typer.Argument(help="Hub id (user/repo\\[@revision]), directory, .gguf file, or 'demo'.")],
    output: Annotated[
        Optional[Path],
        typer.Option(
            "--output",
            "-o",
            help="Directory of the checkpoint; default: ./MODEL-clla.",
            rich_help_panel=OUTPUT,
            parser=path,
        ),
    ] = None,
    recipe: RecipeName = "balanced",
    heal: Annotated[
        bool, typer.Option("--heal", help="Train briefly against the source afterwards.", rich_help_panel=HEAL)
    ] = False,
    report_to: ReportTo = None,
    device: Device = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Stop after the plan and write it as JSON.", rich_help_panel=RUN)
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Take up the finished stages of an interrupted run.", rich_help_panel=RUN)
    ] = False,
    work_dir: Annotated[
        Optional[Path],
        typer.Option(
            help="Keep statistics and plans here: another budget then takes seconds.", rich_help_panel=RUN, parser=path
        ),
    ] = None,
    evaluate: Evaluate = True,
    max_shard_size: Annotated[
        Optional[str], typer.Option(help="Most bytes of a weight file, e.g. '5GB'.", rich_help_panel=OUTPUT)
    ] = None,
    codec_only: Annotated[
        bool, typer.Option("--codec-only", help="Save the codec without the source's weights.", rich_help_panel=OUTPUT)
    ] = False,
    overwrite: Overwrite = False,
    push_to_hub: Annotated[Optional[str], typer.Option(help="Upload as this repo id.", rich_help_panel=OUTPUT)] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: AsJson = False,
    **changes: Any,
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
            target = _target(model, push_to_hub, private=private, codec_only=codec_only)
        done = api.convert_model(
            model,
            output=output,
            recipe=recipe,
            heal=heal,
            report_to=report_to,
            device=device,
            dry_run=dry_run,
            resume=resume,
            work_dir=work_dir,
            evaluate=evaluate,
            max_shard_size=max_shard_size,
            codec_only=codec_only,
            overwrite=overwrite,
            **changes,
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


def _target(model: str, repo_id: str, *, private: bool, codec_only: bool) -> str:
    """Where to push to, asked before an hour's work and not after it."""
    from clla.hub.revision import split_revision
    from clla.publish.base_model import cached_model, check_public
    from clla.publish.push import check_access

    local = Path(model).expanduser().exists() or model == "demo"
    if codec_only and local and cached_model(model) is None:
        raise UsageError(
            f"--codec-only and --push-to-hub for {model}, which is on this machine alone",
            expected="a Hub id, from which others can load the weights",
            remedy=f"convert without --push-to-hub, then: clla push FOLDER {repo_id} --base-model user/repo",
        )
    repo_id = check_access(repo_id, private=private)
    if codec_only and not local and not private:
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
