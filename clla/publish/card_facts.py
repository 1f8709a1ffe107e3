"""What a checkpoint's folder says, for its model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clla.artifacts.plan import Plan
from clla.errors import CllaError
from clla.evaluate.report import Report
from clla.publish.origin import HUB, Origin
from clla.recipe import Recipe
from clla.storage.filenames import CONFIG, REPORT
from clla.storage.files import read_json


@dataclass(frozen=True)
class Facts:
    """What a checkpoint's folder says.

    Attributes:
        name: under which code loads the checkpoint: a Hub id or a directory.
        plan: that it runs on.
        recipe: resolved.
        origin: of its source.
        report: what was measured, if it was.
        text: on which, as the recipe names it; None where not known.
        before: what was measured before healing.
        healing: from the report; None where it was not trained.
        calibration_tokens: whose moments were taken, where known.
        adapter: the codec was saved without the source's weights.
        chat: its tokenizer has a chat template.
        pictures: names of those in the folder.
    """

    name: str
    plan: Plan
    recipe: Recipe
    origin: Origin
    report: Report | None
    text: str | None
    before: Report | None
    healing: dict[str, Any] | None
    calibration_tokens: int | None
    adapter: bool
    chat: bool
    pictures: frozenset[str]

    @property
    def source(self) -> str:
        """The source as a link, or its name."""
        return f"[{self.origin.hub_id}]({HUB}/{self.origin.hub_id})" if self.origin.hub_id else self.origin.title


def read_facts(folder: Path, name: str) -> Facts:
    """What the card is made from.

    Args:
        folder: of a checkpoint.
        name: under which code is to load it.

    Raises:
        CllaError: the folder has no report, or no valid one.
    """
    path = folder / REPORT
    if not path.is_file():
        raise CllaError(
            f"{folder} has no {path.name}",
            expected="a checkpoint written by clla convert",
            remedy="check the path, or convert a model first",
        )
    report, config = read_json(path), read_json(folder / CONFIG)
    try:
        recipe = Recipe.model_validate(report["recipe"])
        title = Path(recipe.provenance.model).name if recipe.provenance else "Converted model"
        measured, healing = report["measured"], report["healing"]
        before = (healing or {}).get("before")
        return Facts(
            name=name,
            plan=Plan.from_json(report["plan"]),
            recipe=recipe,
            origin=Origin.from_json(found) if (found := report.get("origin")) else Origin(title),
            report=Report.from_json(measured) if measured else None,
            text=(measured or {}).get("text"),
            before=Report.from_json(before) if before else None,
            healing=healing,
            calibration_tokens=report.get("calibration_tokens"),
            adapter=config.get("base_model") is not None,
            chat=(folder / "chat_template.jinja").is_file(),
            pictures=frozenset(file.name for file in folder.glob("clla_*.png")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CllaError(
            f"{path} is no valid report: {error}",
            expected="a report that clla convert or clla heal wrote",
            remedy="convert again; older versions wrote other reports",
        ) from error
