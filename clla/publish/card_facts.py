"""What a checkpoint's folder says, for its model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clla.errors import blamed
from clla.evaluate.report_file import ReportFile
from clla.publish.origin import HUB, Origin
from clla.storage.filenames import CONFIG, REPORT
from clla.storage.files import read_json


@dataclass(frozen=True)
class Facts:
    """What a checkpoint's folder says.

    Attributes:
        name: under which code loads the checkpoint: a Hub id or a directory.
        made: the report.
        origin: of its source.
        codec_only: the codec was saved without the source's weights.
        chat: its tokenizer has a chat template.
        pictures: names of those in the folder.
    """

    name: str
    made: ReportFile
    origin: Origin
    codec_only: bool
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
    made, config = ReportFile.load(folder), read_json(folder / CONFIG)
    provenance = made.recipe.provenance
    title = Path(provenance.model).name if provenance else "Converted model"
    with blamed(f"{folder / REPORT} does not say where the model comes from", expected="a report as clla wrote it",
                remedy="convert the source model again"):  # fmt: skip
        origin = Origin.from_json(made.origin) if made.origin else Origin(title)
    return Facts(
        name=name,
        made=made,
        origin=origin,
        codec_only=config.get("base_model") is not None,
        chat=(folder / "chat_template.jinja").is_file(),
        pictures=frozenset(file.name for file in folder.glob("clla_*.png")),
    )
