"""`clla recipes`: list, show, copy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from clla import console
from clla.commands.options import errors, path, recipe_names
from clla.errors import UsageError

recipes = typer.Typer(name="recipes", help="Built-in recipes.", no_args_is_help=True, add_completion=False)


@recipes.command()
def ls() -> None:
    """List the built-in recipes."""
    with errors(interrupted="nothing was written"):
        from clla.recipe import load_recipe
        from clla.recipes import builtin_recipes
        from clla.tables import Table

        found = {name: load_recipe(name) for name in builtin_recipes()}
        rows = [(name, recipe.budget.kv_budget, recipe.description) for name, recipe in found.items()]
        console.show(Table.of(("name", "KV budget", "description"), rows, words=3))


@recipes.command()
def show(
    name: Annotated[str, typer.Argument(help="Recipe name or YAML file.", autocompletion=recipe_names)] = "balanced",
    schema: Annotated[bool, typer.Option("--schema", help="Print all fields with their meaning.")] = False,
) -> None:
    """Print a recipe with every default filled in."""
    with errors(interrupted="nothing was written"):
        from clla.recipe import Recipe, load_recipe

        print(json.dumps(Recipe.model_json_schema(), indent=1) if schema else load_recipe(name).to_yaml(), end="")


@recipes.command()
def cp(
    name: Annotated[str, typer.Argument(help="Built-in recipe.", autocompletion=recipe_names)],
    destination: Annotated[Path, typer.Argument(help="File or directory.", parser=path)] = Path("."),
) -> None:
    """Copy a built-in recipe to start your own from."""
    with errors(interrupted="nothing was written"):
        from clla.recipes import builtin_recipes

        builtin = builtin_recipes()
        if name not in builtin:
            raise UsageError(f"no recipe {name!r}", expected="one of " + ", ".join(builtin), remedy="clla recipes ls")
        target = destination / builtin[name].name if destination.is_dir() else destination
        if target.exists():
            raise UsageError(f"{target} exists", expected="a new file", remedy="name another destination")
        shutil.copyfile(builtin[name], target)
        print(target)
