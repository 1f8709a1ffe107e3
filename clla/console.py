"""One Rich console for messages and progress (stderr) and one for results (stdout)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

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
    with Progress(*columns, console=messages) as bar:
        yield Advance(bar, bar.add_task(title, total=total), title)


def wide(least: int) -> Console:
    """The console of results, at least so many characters wide; a narrow terminal wraps the lines."""
    return Console(highlight=False, width=max(results.width, least))


def say(text: str) -> None:
    """One line of message on stderr."""
    messages.print(text)
