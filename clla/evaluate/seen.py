"""Whether a model was fitted to the text that it is measured on, as far as its checkpoint's own record tells."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from clla.errors import DatasetError
from clla.recipe import Recipe
from clla.text.reading import hub_dataset, local_file, open_text, read_documents
from clla.text.sequences import calibration_blocks, held_out_blocks, holds_back

SENTENCE = re.compile(r"[.!?\u3002\uff01\uff1f\n]+")  # what ends one
TELLING = 16  # characters of a sentence that says which text it is of
COMPARED = 20_000  # first sentences of a text that is measured on
SHARED = 0.05  # of them in another text: more than quotations


@dataclass(frozen=True)
class FittedText:
    """A text that a model was calibrated or healed on.

    Attributes:
        dataset: as it was named.
        sha256: of its contents, unpacked; empty for a Hub data set and for `self`, None in older checkpoints.
        held_out: every 16th block was left out.
    """

    dataset: str
    sha256: str | None
    held_out: bool


def fingerprint(dataset: str) -> str:
    """SHA-256 of what a local or bundled file holds, unpacked; empty for a Hub data set and for `self`.

    Raises:
        DatasetError: the file cannot be read.
    """
    path = local_file(dataset)
    if path is None or not path.is_file():
        return ""
    try:
        with open_text(path) as stream:
            sha = hashlib.sha256()
            while piece := stream.read(1 << 20):
                sha.update(piece)
        return sha.hexdigest()
    except Exception as error:  # of whatever unpacks it
        raise DatasetError(f"{path} cannot be read: {error}", remedy="check the file") from error


def fitted_text(dataset: str, *, held_out: bool | None = None) -> FittedText:
    """A text that a model is fitted to now.

    Args:
        dataset: as it is named.
        held_out: every 16th block is left out; None: as calibration does, wherever the text is long enough.
    """
    if held_out is None:
        held_out = dataset == "self" or holds_back(dataset)
    return FittedText(dataset, fingerprint(dataset), held_out)


def unseen(text: str, fitted: Sequence[FittedText] | None, *, left_out: bool) -> bool | None:
    """Whether samples of a text are new to a model: False if it was fitted to them, None if that cannot be known.

    Args:
        text: that is measured on.
        fitted: texts that the model was fitted to; None if they are not known.
        left_out: the samples are of the blocks that are kept back of every text.
    """
    if fitted is None:
        return None
    found = [_apart(text, one, left_out) for one in fitted]
    return False if False in found else None if None in found else True


def _apart(text: str, fitted: FittedText, left_out: bool) -> bool | None:
    if fitted.dataset == "self":
        return True
    theirs = fingerprint("bundled") if fitted.dataset == "bundled" else fitted.sha256
    if theirs and (own := fingerprint(text)):
        return left_out and fitted.held_out if own == theirs else _without_common(text, fitted, theirs, left_out)
    ours, other = hub_dataset(text), None if theirs else hub_dataset(fitted.dataset)
    if ours is None or other is None or replace(ours, split=other.split) != other:
        return None
    return ours != other


def _without_common(text: str, fitted: FittedText, sha256: str, left_out: bool) -> bool | None:
    """Whether two different texts have no sentences in common, as an excerpt or another form of the same one would.

    None where the text that was fitted to is not here any more, or the other has no sentences.
    """
    if fingerprint(fitted.dataset) != sha256:
        return None
    measured, read = read_documents(text, tell=False), read_documents(fitted.dataset, tell=False)
    own = set(islice(_sentences(held_out_blocks(measured) if left_out else measured), COMPARED))
    theirs = _sentences(calibration_blocks(read) if fitted.held_out else read)
    return len(own.intersection(theirs)) <= SHARED * len(own) if own else None


def _sentences(documents: Iterable[str]) -> Iterator[str]:
    parts = (" ".join(part.split()) for text in documents for part in SENTENCE.split(text))
    return (part for part in parts if len(part) >= TELLING)


def texts_of(recipe: Recipe | None) -> list[FittedText] | None:
    """Texts that a recipe has a model fitted to, for checkpoints whose report does not say it; None without one."""
    if recipe is None:
        return None
    names = [recipe.calibration.dataset]
    if recipe.heal is not None:
        names.append(recipe.heal.dataset or recipe.calibration.dataset)
    return [FittedText(name, None, True) for name in names]
