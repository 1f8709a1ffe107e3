"""Arguments of the package's functions: types and ranges, checked before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial, wraps
from inspect import signature
from pathlib import Path
from typing import Annotated, ParamSpec, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    validate_call,
)

from clla import usage
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
Natural = Annotated[int, Field(ge=0, le=LARGEST)]
# Options of several commands: what is measured, and on what.
MeasuredText = Annotated[Name, Field(description="text to measure on; default: the end of the bundled text")]
SampleLength = Annotated[
    int | None, Field(ge=2, description="tokens per sample; default: 2048, or what the model takes")
]
SourceModel = Annotated[
    Name | None, Field(description="source model, where the weights were trained; default: from the recipe")
]
Device = Annotated[Word, Field(description="device to compute on: auto, cpu, cuda or cuda:N")]
WeightDtype = Annotated[Dtype, Field(description="dtype of the weights: auto, float32, bfloat16 or float16")]


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

    @field_validator("*")
    @classmethod
    def _held(cls, value: object) -> object:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"expected at most {LARGEST}")
        return value

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

    Errors name the function's arguments, unless a command called it.

    Raises:
        UsageError: an argument has another type or is out of range, or there is none of its name.
    """
    validated = validate_call(config=STRICT)(function)

    positional = [p.name for p in signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with usage.called(f"clla.{function.__name__}"), usage.renamed(partial(usage.as_arguments, function)):
            try:
                return validated(*args, **kwargs)
            except ValidationError as error:
                if error.title != function.__name__:
                    raise
                raise _mistakes(error, positional) from error

    return call


# What pydantic calls an argument that a function does not have, or lacks, and what Python says of it.
NOT_CALLED_SO = {
    "extra_forbidden": "got an unexpected keyword argument",
    "unexpected_keyword_argument": "got an unexpected keyword argument",
    "unexpected_positional_argument": "got an unexpected positional argument after",
    "multiple_argument_values": "got multiple values for argument",
    "missing_argument": "misses the argument",
}


def _mistakes(error: ValidationError, names: Sequence[str] = ()) -> UsageError:
    """Messages of pydantic, a line for each argument; `names` are those of arguments that it knows by number."""
    lines: dict[str, list[str]] = {}
    for found in error.errors():
        place = found["loc"][0]
        name = str(place) if isinstance(place, str) else names[min(place, len(names) - 1)]
        if said := NOT_CALLED_SO.get(found["type"]):
            lines[f"{error.title}() {said} '{name}'"] = []
        else:
            told = re.sub(r"^Value error, ", "", found["msg"])
            given = f"{usage.option(name)} is {_shown(found['input'])}"
            lines.setdefault(given, []).append(told[:1].lower() + told[1:])
    texts = [": ".join(filter(None, (given, " or ".join(dict.fromkeys(why))))) for given, why in lines.items()]
    return UsageError(
        "\n  ".join(texts),
        expected="names and paths as text, and numbers in their ranges",
        remedy=f"correct it; {usage.help_of_it()} says what is what",
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
