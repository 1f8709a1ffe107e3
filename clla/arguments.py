"""Arguments of the package's functions: types and ranges, checked before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, validate_call

from clla.errors import UsageError, is_unicode
from clla.recipe import LARGEST

STRICT = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")  # also of keywords that are a TypedDict
P = ParamSpec("P")
R = TypeVar("R")
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
LONGEST_NAME = 255  # bytes of a file's name
LONGEST_SHOWN = 80  # characters of a value, in a message


def _named(value: str | Path) -> str | Path:
    """A name or path; not the text or the model itself."""
    text = str(value)
    if not text.strip():
        raise ValueError("it is empty")
    if "\0" in text or not is_unicode(text) or any(len(part.encode()) > LONGEST_NAME for part in Path(text).parts):
        raise ValueError("no file and no model can have that name")
    return value


def _one_of(*words: str) -> AfterValidator:
    def check(value: str) -> str:
        if value not in words:
            raise ValueError(f"expected {', '.join(words[:-1])} or {words[-1]}")
        return value

    return AfterValidator(check)


Name = Annotated[str, AfterValidator(_named)]
Place = Annotated[str | Path, AfterValidator(_named)]
Word = Annotated[str, Field(min_length=1, max_length=200)]
Dtype = Annotated[str, _one_of("auto", "float32", "bfloat16", "float16")]
Count = Annotated[int, Field(ge=1, le=LARGEST)]


def _integers(value: object) -> object:
    """Whole numbers from a comma-separated text."""
    if not isinstance(value, str):
        return value
    try:
        return tuple(int(part) for part in value.split(",") if part.strip())
    except ValueError as error:
        raise ValueError("expected positive whole numbers, e.g. 512,2048") from error


def _bytes(value: object) -> object:
    return parse_size(value, "--memory-limit") if isinstance(value, str) else value


Integers = Annotated[tuple[Count, ...], BeforeValidator(_integers), Field(min_length=1)]
Bytes = Annotated[int, BeforeValidator(_bytes)]


class Settings(BaseModel):
    """Options of a command, checked: `commands.options.with_settings` makes the command line of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    @classmethod
    def checked(cls, **values: object) -> Self:
        """The settings; those that are None have their defaults.

        Raises:
            UsageError: a value is out of range.
        """
        try:
            return cls(**{name: value for name, value in values.items() if value is not None})
        except ValidationError as error:
            raise _mistakes(error) from error


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Check the arguments of a function against its annotations; all mistakes are told at once.

    Raises:
        UsageError: an argument has another type or is out of range.
    """
    validated = validate_call(config=STRICT)(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return validated(*args, **kwargs)
        except ValidationError as error:
            if error.title != function.__name__:
                raise
            raise _mistakes(error) from error

    return call


def _mistakes(error: ValidationError) -> UsageError:
    """Messages of pydantic, a line for each argument."""
    lines: dict[str, tuple[str, list[str]]] = {}
    for found in error.errors():
        name = str(found["loc"][0])
        told = re.sub(r"^Value error, ", "", found["msg"])
        shown = _shown(found["input"])
        lines.setdefault(f"--{name.replace('_', '-')}", (shown, []))[1].append(told[:1].lower() + told[1:])
    texts = [f"{name} is {value}: {' or '.join(dict.fromkeys(why))}" for name, (value, why) in lines.items()]
    return UsageError(
        "\n  ".join(texts),
        expected="names and paths as text, and numbers in their ranges",
        remedy="correct it; help(clla.convert_model) and clla convert --help say what is what",
    )


def _shown(value: object) -> str:
    """A value of an argument, for a message."""
    value = str(value) if isinstance(value, Path) else value
    text = repr(value) if isinstance(value, str | int | float | list | tuple | None) else f"a {type(value).__name__}"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def parse_size(text: str, option: str) -> int:
    """Bytes from '5GB', '500 MiB' and the like.

    Raises:
        UsageError: not readable, without a unit, or less than a kilobyte.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]+)\s*", text)
    size = float(match[1]) * UNITS.get(match[2].upper(), 0) if match else 0
    if not 1000 <= size <= LARGEST:
        raise UsageError(
            f"{option} {text}",
            expected="a size of at least 1KB with its unit: KB, MB, GB or TB, or KiB, MiB, GiB or TiB",
            remedy="write it as 5GB or 500MB",
        )
    return int(size)
