"""`clla doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Optional

import typer

from clla import console
from clla.commands.options import errors, start

COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


def doctor(
    model: Annotated[
        Optional[str], typer.Argument(help="Also say what would work with this Hub id, directory or .gguf file.")
    ] = None,
    hub: Annotated[bool, typer.Option("--hub", help="Ask the Hub whether it can be reached.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look for what is missing or broken, here and with a model; exit code 1 if something is."""
    with errors(as_json, interrupted="nothing was changed"):
        from clla.doctor.environment import Finding, environment, guarded

        found = environment(hub=hub)
        if model is not None:

            def examined() -> list[Finding]:
                start()
                from clla.doctor.model import examine

                return examine(model)

            found += guarded("model", examined)
        if as_json:
            print(json.dumps([asdict(finding) for finding in found]))
        else:
            from rich.text import Text

            for finding in found:
                mark = (f"{finding.status:8}", COLOURS[finding.status])
                console.results.print(Text.assemble(mark, f" {finding.topic}: {finding.text}"), soft_wrap=True)
                if finding.remedy:
                    console.results.print(f"         → {finding.remedy}", soft_wrap=True)
        if any(finding.status == "problem" for finding in found):
            raise typer.Exit(1)
