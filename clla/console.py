"""One Rich console for messages and progress (stderr) and one for results (stdout).

What they print is taken literally: paths, prompts and names may hold brackets or colons. Colour is given by `Text`.
"""

from __future__ import annotations

import codecs
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from itertools import zip_longest
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table as RichTable
from rich.text import Text

from clla.tables import Table

WHOLE = 24  # characters of a cell that is not broken into lines
LITERAL: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
# What stands for signs that an output's encoding lacks.
PLAIN = {"–": "-", "—": "-", "→": "->", "×": "x", "…": "...", "·": "*", "≤": "<=", "≥": ">=", "²": "^2"}

messages = Console(stderr=True, **LITERAL)
results = Console(**LITERAL)


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """Handler of encoding errors: signs in ASCII, all else, also what is no Unicode, as escapes."""
    assert isinstance(error, UnicodeEncodeError)
    sign = error.object[error.start]
    if sign not in PLAIN:
        return codecs.backslashreplace_errors(
            UnicodeEncodeError(error.encoding, error.object, error.start, error.start + 1, error.reason)
        )
    return PLAIN[sign], error.start + 1


codecs.register_error("clla.plain", _plain)


def write_anything() -> None:
    """Let stdout and stderr take any text, whatever their encoding: nothing fails that has been done already."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="clla.plain")


class Advance:
    """Moves one progress bar; a bar that is not shown moves nothing."""

    def __init__(self, progress: Progress, task: int, title: str) -> None:
        self._progress, self._task, self._title = progress, TaskID(task), title

    def __call__(self, amount: int = 1) -> None:
        self._progress.advance(self._task, amount)

    def note(self, text: str) -> None:
        """Show figures beside the title."""
        self._progress.update(self._task, description=f"{self._title} {text}")


def _for_bars() -> Console:
    """In a pipe or a log a bar is written once, at its end, also where FORCE_COLOR asks for colours."""
    return messages if sys.stderr.isatty() else Console(stderr=True, force_terminal=False, **LITERAL)


@contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """A progress bar with the time left, on stderr."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_for_bars()) as bar:
        yield Advance(bar, bar.add_task(title, total=total), title)


def wide(least: int) -> Console:
    """The console of results, at least `least` characters wide; a narrow terminal wraps the lines."""
    return Console(width=max(results.width, least), **LITERAL)


def show(table: Table) -> None:
    """A table of results; in a narrow terminal titles and long texts are broken, then lines wrap: nothing is cut."""
    shown, least = _drawn(table, break_titles=False)
    if least > results.width:
        shown, least = _drawn(table, break_titles=True)
    wide(least).print(shown)


def _drawn(table: Table, *, break_titles: bool) -> tuple[RichTable, int]:
    """A table whose figures and short cells stay whole, and the least width that it takes."""
    shown = RichTable(title=table.title or None, caption=table.caption or None, show_header=bool(table.titles))
    if not table.titles:
        shown.box = None
    for i, column in enumerate(zip_longest(table.titles, *table.rows, fillvalue="")):
        title, cells = (column[0], column[1:]) if table.titles else ("", column)
        whole = i >= table.words or all(cell_len(cell) <= WHOLE for cell in cells)
        parts = [title] if whole and not break_titles else title.split()
        longest = max(map(cell_len, [*parts, *(cells if whole else " ".join(cells).split())]), default=0)
        title = "\n".join(textwrap.wrap(title, longest)) if whole and title else title
        shown.add_column(title, justify="left" if i < table.words else "right", min_width=longest, no_wrap=whole)
    for row in table.rows:
        shown.add_row(*row)
    return shown, Measurement.get(results, results.options.update(max_width=10_000), shown).minimum


def say(text: str) -> None:
    """One line of message on stderr."""
    messages.print(text)


def label(word: str, style: str, text: str) -> None:
    """A line on stderr that begins with a coloured word and is not broken."""
    messages.print(Text.assemble((word, style), text), soft_wrap=True)
