"""Checks of a baseline's settings."""

from __future__ import annotations

from clla.errors import UsageError


def check_at_least(least: float, **settings: float) -> None:
    """Raises UsageError for a setting below the least value it may have."""
    for name, value in settings.items():
        if value < least:
            raise UsageError(f"{name} is {value}", expected=f"{name} of at least {least}", remedy=f"raise {name}")


def check_one_of(choices: tuple[object, ...], **settings: object) -> None:
    """Raises UsageError for a setting that is none of the choices."""
    for name, value in settings.items():
        if value not in choices:
            listed = ", ".join(map(str, choices))
            raise UsageError(f"{name} is {value!r}", expected=f"one of {listed}", remedy=f"choose another {name}")


def check_multiple(factor: int, **settings: int) -> None:
    """Raises UsageError for a setting that is no positive multiple of a factor."""
    for name, value in settings.items():
        if value < 1 or value % factor:
            raise UsageError(
                f"{name} is {value}", expected=f"a positive multiple of {factor}", remedy=f"choose another {name}"
            )
