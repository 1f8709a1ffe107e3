"""`clla compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from clla import console
from clla.commands.options import Device, errors, path, start
from clla.errors import UsageError
from clla.recipe import LARGEST
from clla.storage.filenames import COMPARISON


def compare(
    model: Annotated[str, typer.Argument(help="Hub id (user/repo\\[@revision]), directory, .gguf file, or 'demo'.")],
    budget: Annotated[str, typer.Option(help="Shares of the source's cache at the context, comma-separated.")] = "",
    methods: Annotated[Optional[str], typer.Option(help="Comma-separated; all by default.")] = None,
    text: Annotated[str, typer.Option(help="Text to measure on; default: the end of the bundled text.")] = "bundled",
    dataset: Annotated[str, typer.Option(help="Text to calibrate on.")] = "bundled",
    quick: Annotated[
        bool, typer.Option("--quick", help="Two samples, two budgets, two codes, main variants only.")
    ] = False,
    num_samples: Annotated[
        Optional[int], typer.Option(min=1, max=LARGEST, help="Default 24, or 2 with --quick.")
    ] = None,
    context: Annotated[
        Optional[int],
        typer.Option(
            min=64, max=LARGEST, help="Tokens per sample; budgets hold here. Default: 2048, or what the model takes."
        ),
    ] = None,
    long_context: Annotated[
        Optional[int],
        typer.Option(min=64, max=LARGEST, help="Where bytes are measured too; default: 8192, or what the model takes."),
    ] = None,
    chunk: Annotated[int, typer.Option(min=1, max=LARGEST, help="Tokens per step.")] = 128,
    calibration_tokens: Annotated[Optional[int], typer.Option(help="Default: 16384 on CPU, 262144 on GPU.")] = None,
    retrieval_trials: Annotated[
        Optional[int], typer.Option(min=0, max=LARGEST, help="Planted codes; default 16, or 2.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of table and pictures.", parser=path)] = Path(
        "comparison"
    ),
    work_dir: Annotated[Optional[Path], typer.Option(help="Keep the moments here.", parser=path)] = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
) -> None:
    """Run published methods and ours side by side on one model, at equal measured bytes."""
    with errors(as_json, interrupted="no table was written; moments that were complete stay in --work-dir"):
        start()
        from clla.compare import Options, run_comparison
        from clla.storage.places import check_writable, holding

        if budget and not budget.strip(" ,"):
            raise UsageError(f"--budget {budget!r} names no share", expected="e.g. 25%,6.25%", remedy="correct it")
        shares = _shares(budget or ("25%,6.25%" if quick else "50%,25%,12.5%,6.25%,3%"))
        options = Options(
            budgets=shares,
            methods=methods,
            text=text,
            dataset=dataset,
            windows=num_samples or (2 if quick else 24),
            context=context,
            long_context=long_context,
            chunk=chunk,
            calibration_tokens=calibration_tokens,
            retrieval_trials=(2 if quick else 16) if retrieval_trials is None else retrieval_trials,
            device=device,
            work_dir=work_dir,
            thorough=not quick,
        )
        check_writable(output / COMPARISON, "--output")
        if work_dir is not None:
            check_writable(work_dir / "stats", "--work-dir")
        with holding(output, *([work_dir] if work_dir is not None else [])):
            result = run_comparison(model, options)
            result.save(output)
        if as_json:
            print(json.dumps(result.to_json()))
            return
        for table in result.tables():
            console.show(table)
        console.say(f"Wrote {output}: comparison.json, .csv, .png and .svg")


def _shares(text: str) -> list[float]:
    from clla.recipe import parse_budget

    return [parse_budget(part, source_bytes=1.0) for part in text.split(",") if part.strip()]
