"""`clla push`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from clla import console
from clla.commands.options import AsJson, errors, path


def push(
    checkpoint: Annotated[Path, typer.Argument(help="Directory that clla convert or heal wrote.", parser=path)],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub: user/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    codec_only: Annotated[
        bool, typer.Option("--codec-only", help="The codec without the weights, which the source's repository has.")
    ] = False,
    revision: Annotated[Optional[str], typer.Option(help="Branch; it is made where there is none.")] = None,
    base_model: Annotated[
        Optional[str],
        typer.Option(help="The source on the Hub, user/repo\\[@revision], where it was converted locally."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent; the Hub is not asked.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a converted checkpoint to the Hub."""
    with errors(as_json, interrupted="the checkpoint on disk is as it was"):
        from clla.publish import push as hub
        from clla.storage.places import holding

        what = hub.Push(
            checkpoint.resolve(),
            repo,
            private=private,
            codec_only=codec_only,
            revision=revision,
            base_model=base_model,
        )
        with holding(what.folder, needed=False):
            outgoing, done = (hub.prepare(what, ask=False), None) if dry_run else hub.push(what)
        if as_json:
            print(json.dumps(_as_json(what, outgoing, done)))
            return
        for table in _tables(what, outgoing):
            console.show(table)
        if done is None:
            console.say("Nothing was sent")
            return
        if done.removed:
            console.say(f"Removed what an earlier push had left: {', '.join(done.removed)}")
        console.say(f"Uploaded to {done.url}, commit {done.commit[:12]}")


def _as_json(what: Any, outgoing: Any, done: Any) -> dict[str, Any]:
    return {
        "repo": what.repo_id,
        "revision": what.revision,
        "private": what.private,
        "base_model": outgoing.base.repo if outgoing.base else None,
        "files": {name: outgoing.size(name) for name in sorted(outgoing.files)},
        "total_bytes": outgoing.total,
        "left_out": outgoing.left_out,
        "dry_run": done is None,
        "url": done.url if done else None,
        "commit": done.commit if done else None,
        "removed": done.removed if done else [],
    }


def _tables(what: Any, outgoing: Any) -> list[Any]:
    from clla.tables import Table

    kind = "private" if what.private else "public"
    where = what.repo_id + (f", branch {what.revision}" if what.revision else "")
    rows = [(name, f"{outgoing.size(name):,}") for name in sorted(outgoing.files)]
    rows.append((f"{len(outgoing.files)} files", f"{outgoing.total:,}"))
    caption = f"The codec alone; its weights are those of {outgoing.base.repo}" if outgoing.base is not None else ""
    tables = [Table.of(("file", "bytes"), rows, title=f"To {where} ({kind} where it is new)", caption=caption)]
    if outgoing.left_out:
        tables.append(Table.of(("left out", "why"), outgoing.left_out.items(), words=2))
    return tables
