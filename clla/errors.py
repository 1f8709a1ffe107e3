"""Errors that a user can act on. Each says what was got, what was expected and the remedy."""

from __future__ import annotations


class CllaError(Exception):
    """A mistake in the input or a limit of the tool: what was got, what was expected, what to do.

    Args:
        got: what was found.
        expected: what would have been accepted.
        remedy: the next step for the user.
    """

    exit_code = 1

    def __init__(self, got: str, *, expected: str = "", remedy: str = "") -> None:
        self.got, self.expected, self.remedy = got, expected, remedy
        super().__init__(". ".join(part for part in (got, expected, remedy) if part))


class UsageError(CllaError):
    """A wrong option, recipe or budget; the command exits with code 2."""

    exit_code = 2


class UnsupportedModelError(CllaError):
    """The model's architecture cannot be converted."""


class DatasetError(CllaError):
    """Calibration or evaluation text is missing, empty or too short."""


class CorruptArtifactError(CllaError):
    """A saved artifact or checkpoint is damaged or was written by a newer version."""
