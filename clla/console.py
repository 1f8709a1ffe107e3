"""One Rich console for messages and progress (stderr) and one for results (stdout)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

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
from rich.table import Table
from rich.text import Text

messages = Console(stderr=True, highlight=False)
results = Console(highlight=False)


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
    return messages if sys.stderr.isatty() else Console(stderr=True, highlight=False, force_terminal=False)


@contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """A progress bar with the time left, on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_for_bars()) as bar:
        yield Advance(bar, bar.add_task(title, total=total), title)


def wide(least: int) -> Console:
    """The console of results, at least so many characters wide; a narrow terminal wraps the lines."""
    return Console(highlight=False, width=max(results.width, least))


def show(table: Table) -> None:
    """A table of results, at least as wide as its longest words: a narrow terminal wraps lines, nothing is cut."""
    for column in table.columns:
        cells = [Text.from_markup(str(cell)).plain for cell in (column.header, *column.cells)]
        column.min_width = max((cell_len(word) for cell in cells for word in cell.split()), default=0)
    unlimited = results.options.update(max_width=10_000)
    wide(Measurement.get(results, unlimited, table).minimum).print(table)


def say(text: str) -> None:
    """One line of message on stderr."""
    messages.print(text)
