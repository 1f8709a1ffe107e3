"""`clla plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from clla import console, usage
from clla.commands.options import OUTPUT, PLAN, AsJson, RecipeName, errors, path, with_options
from clla.errors import UsageError
from clla.recipe import OPTIONS_OF, changes_of, load_recipe

SWEEP = "1%,2%,3%,6.25%,12.5%,25%"


@with_options(OPTIONS_OF["plan"])
def plan(
    statistics: Annotated[
        Path, typer.Argument(help="--work-dir of a conversion, or a statistics file in it.", parser=path)
    ],
    recipe: RecipeName = "balanced",
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Plan several budgets and compare them.", rich_help_panel=PLAN)
    ] = False,
    budgets: Annotated[str, typer.Option(help="What --sweep plans, comma-separated.", rich_help_panel=PLAN)] = SWEEP,
    plot: Annotated[
        Optional[Path],
        typer.Option(help="Draw the plan, or with --sweep the frontier, as .png.", rich_help_panel=OUTPUT, parser=path),
    ] = None,
    save: Annotated[
        Optional[Path], typer.Option(help="Write the plan as JSON.", rich_help_panel=OUTPUT, parser=path)
    ] = None,
    as_json: AsJson = False,
    **changes: Any,
) -> None:
    """Plan other budgets from the statistics of a conversion, in seconds."""
    with errors(as_json, interrupted="no plan was written; what was prepared is kept beside the statistics"):
        from clla.storage.places import PICTURES, check_file

        chosen = load_recipe(recipe).override(changes_of(changes))
        if sweep and (changes.get("kv_budget") is not None or save is not None):
            raise UsageError(
                "--sweep with --kv-budget or --save", expected="one plan, or --budgets to sweep", remedy="leave one out"
            )
        if not sweep and budgets != SWEEP:
            raise UsageError("--budgets without --sweep", remedy="add --sweep, or use --kv-budget")
        if plot is not None:
            check_file(plot, "--plot", PICTURES)
        if save is not None:
            check_file(save, "--save")
        from clla.plan.explore import Explorer, find_kept

        explorer = Explorer(find_kept(statistics), chosen)
        wanted = budgets.split(",") if sweep else [chosen.budget.kv_budget]
        with usage.renamed(lambda text: text.replace("--kv-budget", "--budgets") if sweep else text):
            recipes, too_small = [], []
            for one in [chosen.override({"budget": {"kv_budget": part.strip()}}) for part in wanted]:  # mistakes first
                try:
                    explorer.settle(one)
                    recipes.append(one)
                except UsageError as error:  # of several budgets one that leaves nothing for latents is no mistake
                    if not sweep:
                        raise
                    too_small.append((one.budget.kv_budget, error))
            if not recipes:
                raise too_small[0][1]
            for budget, why in too_small:
                console.say(f"{budget} is left out: {why.got}")
        if told := explorer.told_of_groups(recipes):
            console.say(told)
        if not explorer.ready:
            with console.progress("Preparing all budgets, once (layer groups)", explorer.steps) as advance:
                explorer.prepare(advance)
        if sweep:
            _sweep(explorer, recipes, plot, as_json)
        else:
            _one(explorer, recipes[0], plot, save, as_json)
        explorer.save()


def _one(explorer: Any, chosen: Any, plot: Path | None, save: Path | None, as_json: bool) -> None:
    from clla.evaluate.figures import draw_plan
    from clla.evaluate.plan_tables import plan_tables
    from clla.plan.explore import summary

    found = explorer.plan(chosen)
    if plot is not None:
        draw_plan(found, plot)
    if save is not None:
        found.save(save)
    if as_json:
        print(json.dumps({**summary(chosen.budget.kv_budget, found), "plan": found.to_json()}))
        return
    for table in plan_tables(found, None):
        console.show(table)
    console.results.print(f"predicted loss {found.predicted_loss:.4g} in the metric's units")


def _sweep(explorer: Any, recipes: list[Any], plot: Path | None, as_json: bool) -> None:
    from clla.evaluate.figures import draw_frontier
    from clla.plan.explore import summary
    from clla.tables import Table

    rows = [summary(recipe.budget.kv_budget, explorer.plan(recipe)) for recipe in recipes]
    if plot is not None:
        points = [(row["budget"], row["bytes_per_token"], row["predicted_loss"]) for row in rows]
        draw_frontier(points, plot, title="Predicted loss of plans, in the metric's units")
    if as_json:
        print(json.dumps(rows))
        return
    titles = ("budget", "bytes per token", "latents", "window", "groups", "rank", "mean bits", "predicted loss")
    cells = [
        (
            row["budget"],
            f"{row['bytes_per_token']:,.0f}",
            f"{row['row_bytes']:,}",
            str(row["window"]),
            str(row["groups"]),
            f"{row['rank']:,}",
            f"{row['mean_bits']:.2f}",
            f"{row['predicted_loss']:.4g}",
        )
        for row in rows
    ]
    console.show(Table.of(titles, cells, words=0))
