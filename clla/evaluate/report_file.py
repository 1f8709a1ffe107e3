"""`clla_report.json`: what a checkpoint was made from, what was measured, and what healing did."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from clla.artifacts.plan import Plan
from clla.errors import CllaError, CorruptArtifactError
from clla.evaluate.figures import draw_healing, draw_plan, draw_quality
from clla.evaluate.report import LABELS, Report
from clla.evaluate.seen import FittedText, texts_of
from clla.recipe import Recipe, load_recipe
from clla.storage.filenames import HEALING_PICTURE, PLAN_PICTURE, QUALITY_PICTURE, RECIPE, REPORT
from clla.storage.files import read_json, write_text


@dataclass(frozen=True)
class ReportFile:
    """The fields of the file; those without a default are in all of them.

    Attributes:
        plan: what the checkpoint runs on.
        recipe: resolved.
        report: what was measured, if it was.
        text: that was measured on, as the recipe names it.
        healing: what training did, from `Healing.to_json`; None if there was none.
        origin: of the source, from `Origin.to_json`.
        calibration_tokens: whose moments were taken, where known.
        fitted: texts that the model was calibrated and healed on; None where not known.
        predicted_kl: nats per token, of the plan.
        reduction: `coordinates` of a layer's moments, `of` how many values, and the `kl` that this alone costs; None
            where the moments are whole.
        outlook: spectra and the loss at other budgets, for `clla report`.
    """

    plan: Plan
    recipe: Recipe
    report: Report | None = None
    text: str | None = None
    healing: dict[str, Any] | None = None
    origin: dict[str, Any] | None = None
    calibration_tokens: int | None = None
    fitted: list[FittedText] | None = None
    predicted_kl: float | None = None
    reduction: dict[str, float] | None = None
    outlook: dict[str, Any] = field(default_factory=dict)

    @property
    def before(self) -> Report | None:
        """What was measured before healing."""
        found = (self.healing or {}).get("before")
        return Report.from_json(found) if found else None

    def save(self, folder: Path) -> None:
        """Write the file, and plan, quality and healing as pictures beside it."""
        data = {
            **{name: value for name, value in vars(self).items() if name not in ("report", "text")},
            "plan": self.plan.to_json(),
            "recipe": self.recipe.model_dump(mode="json"),
            "fitted": None if self.fitted is None else [asdict(one) for one in self.fitted],
            "measured": {**self.report.to_json(), "text": self.text} if self.report else None,
        }
        write_text(folder / REPORT, json.dumps(data, indent=1))
        draw_plan(self.plan, folder / PLAN_PICTURE)
        if self.healing is not None:
            draw_healing({"": self.healing["history"]}, folder / HEALING_PICTURE)
        if self.report is not None:
            rows = self.report.quality.items()
            points = {LABELS[name]: (row["bytes_per_token"], row["perplexity"]) for name, row in rows}
            draw_quality(points, folder / QUALITY_PICTURE, title=f"{self.report.context} tokens of context")

    @classmethod
    def of(cls, folder: Path, plan: Plan) -> ReportFile:
        """The file of a checkpoint, or what its plan and recipe say where it has none or an older one.

        Raises:
            CorruptArtifactError: as `load`.
        """
        recipe = load_recipe(str(folder / RECIPE)) if (folder / RECIPE).is_file() else None
        found = cls.load(folder) if (folder / REPORT).is_file() else cls(plan, recipe or Recipe())
        return replace(found, fitted=found.fitted or texts_of(recipe))

    @classmethod
    def load(cls, folder: Path) -> ReportFile:
        """Read the file of a checkpoint.

        Raises:
            CllaError: there is none.
            CorruptArtifactError: it cannot be read, or is none that clla wrote.
        """
        path = folder / REPORT
        if not path.is_file():
            raise CllaError(
                f"{folder} has no {path.name}",
                expected="a checkpoint written by clla convert",
                remedy="check the path, or convert a model first",
            )
        data = read_json(path)
        try:
            measured = data.pop("measured")
            names = cls.__dataclass_fields__
            known = {name: value for name, value in data.items() if name in names and value is not None}
            known |= {"plan": Plan.from_json(data["plan"]), "recipe": _recipe_of(data["recipe"])}
            if measured:
                known |= {"report": Report.from_json(measured), "text": measured.get("text")}
            if "fitted" in known:
                known["fitted"] = [FittedText(**one) for one in known["fitted"]]
            found = cls(**known)
            _ = found.before  # it can be read
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptArtifactError(
                f"{path} is no valid report: {error!r}",
                expected="a report that clla convert or clla heal wrote",
                remedy="copy or download the checkpoint again, or convert the source model again",
            ) from error
        return found


def _recipe_of(data: dict[str, Any]) -> Recipe:
    """A recipe from its JSON, where null may stand for fields that this version does not know."""

    def given(section: Any) -> Any:
        return {key: x for key, x in section.items() if x is not None} if isinstance(section, dict) else section

    return Recipe.model_validate({name: given(section) for name, section in data.items()})
