"""What is known of a source model beside its weights: its place on the Hub, its licence, its languages."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, metadata_load

from clla.source.lengths import reach_of
from clla.source.model import Source
from clla.storage.filenames import MODEL_CARD

HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Origin:
    """Where a converted model comes from, for its card.

    Attributes:
        title: short name of the source.
        hub_id: its id, if it was read from the Hub.
        license: as its card or its GGUF metadata names it.
        license_name: of a licence that has no identifier.
        license_link: address of its text.
        language: codes of its languages.
        longest_context: in tokens, as its config says.
    """

    title: str
    hub_id: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()
    longest_context: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "language": list(self.language)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Origin:
        return cls(**{**data, "language": tuple(data["language"])})


def origin_of(source: Source) -> Origin:
    """What a source says of itself; what it does not say is left out, and no failure to read it is an error."""
    local = Path(source.path).is_dir()
    said = _gguf_metadata(source) if source.gguf_file else {}
    if not said:
        said = _card_metadata(source, local=local)
    link = _text(said.get("license_link"))
    if link and "://" not in link:  # a file beside the source, which the conversion does not have
        link = None if local else f"{HUB}/{source.path}/blob/main/{link}"
    return Origin(
        title=Path(source.gguf_file or source.path).name.removesuffix(".gguf"),
        hub_id=None if local else source.path,
        license=_text(said.get("license")),
        license_name=_text(said.get("license_name")),
        license_link=link,
        language=_languages(said.get("language")),
        longest_context=reach_of(source.config).tokens,
    )


def _card_metadata(source: Source, *, local: bool) -> dict[str, Any]:
    """The front matter of the source's README.md: the one in its directory, or that of its revision on the Hub."""
    try:
        path = (
            Path(source.path) / MODEL_CARD
            if local
            else hf_hub_download(source.path, MODEL_CARD, revision=source.revision)
        )
        return metadata_load(path) or {}
    except Exception:  # none, unreadable, or no network: classes of huggingface_hub, its HTTP client, yaml and OSError
        return {}


def _gguf_metadata(source: Source) -> dict[str, Any]:
    from gguf import GGUFReader

    fields = GGUFReader(Path(source.path) / str(source.gguf_file)).fields
    names = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
    keys = {**names, "language": "languages"}
    return {ours: field.contents() for ours, key in keys.items() if (field := fields.get(f"general.{key}"))}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _languages(value: Any) -> tuple[str, ...]:
    codes = value if isinstance(value, list) else [value]
    return tuple("no" if code is False else code for code in codes if code is False or _text(code))  # YAML's Norwegian
