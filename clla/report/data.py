"""What a report page shows, and how much of it the files of a checkpoint hold."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clla.artifacts.plan import Plan
from clla.checkpoint.load import check_folder
from clla.errors import CorruptArtifactError
from clla.evaluate.layer_errors import LayerError
from clla.evaluate.report_file import ReportFile
from clla.recipe import Recipe, load_recipe
from clla.report.samples import Sample
from clla.source.lengths import Reach
from clla.storage.filenames import CONFIG, RECIPE
from clla.storage.files import read_json

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Missing:
    """Attributes: what the page lacks; why; how to get it."""

    what: str
    why: str
    how: str


@dataclass(frozen=True)
class PageData:
    """Everything on the page.

    Attributes:
        name: of the source model.
        shape: what model it is, in a few words.
        plan: what it runs on.
        recipe: resolved; None for a checkpoint without.
        recipe_text: the same as YAML.
        healed: what was trained: empty, `codec`, `attention` or `all`.
        file: what `clla_report.json` says, and what was measured for the page where it says nothing.
        errors: of each layer by itself.
        error_text: what they were measured on.
        samples: text of both models.
        missing: what is not there.
        reach: the tokens that the model takes.
        made: date of the page.
        version: of clla, which made the page.
    """

    name: str
    shape: str
    plan: Plan
    recipe: Recipe | None
    recipe_text: str
    healed: str
    file: ReportFile
    made: str
    version: str
    errors: tuple[LayerError, ...] = ()
    error_text: str = ""
    samples: tuple[Sample, ...] = ()
    missing: tuple[Missing, ...] = ()
    reach: Reach = field(default_factory=Reach)

    @property
    def context(self) -> int:
        """Tokens at which bytes are told."""
        return self.plan.at_context or (self.file.report.context if self.file.report else self.reach.fit(8192))

    @property
    def dataset(self) -> str:
        """What it was calibrated on; no local path leaves the machine."""
        return Path(self.recipe.calibration.dataset).name if self.recipe else ""


def read_checkpoint(folder: Path, *, made: str, version: str) -> PageData:
    """What the files of a checkpoint say, without its weights.

    Args:
        folder: the checkpoint.
        made: today.
        version: of clla.

    Raises:
        CllaError: it is no converted checkpoint.
        CorruptArtifactError: its config, recipe or report is damaged.
    """
    check_folder(folder)
    config = read_json(folder / CONFIG)
    recipe_path = folder / RECIPE
    recipe = load_recipe(str(recipe_path)) if recipe_path.is_file() else None
    try:
        plan = Plan.from_json(config["clla"])
        return PageData(
            name=_name(folder, recipe),
            shape=_shape(config.get("text_config") or {}, plan),
            plan=plan,
            recipe=recipe,
            recipe_text=recipe_path.read_text(encoding="utf-8") if recipe is not None else "",
            healed=config["clla"].get("healed") or "",
            file=ReportFile.of(folder, plan),
            made=made,
            version=version,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptArtifactError(
            f"{folder / CONFIG} holds no plan that can be read: {error!r}",
            expected="config.json as clla wrote it",
            remedy="copy or download the checkpoint again, or convert the source model again",
        ) from error


def what_is_missing(data: PageData) -> tuple[Missing, ...]:
    """What the files lack and no run of the model makes up for."""
    lacking = []
    if not data.file.outlook.get("spectra"):
        lacking.append(
            Missing(
                "Spectra of the groups and the expected quality at other budgets",
                "This checkpoint was made before clla saved them, or its report is gone.",
                "clla convert the source model again; with the --work-dir of the first time it takes seconds.",
            )
        )
    if data.recipe is None:
        lacking.append(Missing("The recipe", "There is no clla_recipe.yaml.", "clla convert the source model again."))
    return tuple(lacking)


def _name(folder: Path, recipe: Recipe | None) -> str:
    """The source model: a Hub id, or the last part of a path."""
    own = folder.resolve().name
    name = recipe.provenance.model if recipe and recipe.provenance else own
    if HUB_ID.fullmatch(name) and not Path(name).exists():
        return name
    return Path(name).name.removesuffix(".gguf") or own  # no local path leaves the machine


def _shape(config: dict[str, Any], plan: Plan) -> str:
    layers = len(plan.kept_layers) + plan.num_layers
    heads, dim = plan.kv.num_key_value_heads, plan.kv.head_dim
    return f"{config.get('model_type', 'model')}, {layers} layers with a cache, {heads} key-value heads of {dim}"
