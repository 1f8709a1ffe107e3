"""Tables as rows of text, made once: the terminal, Markdown and the page's HTML show the same rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows of text below titles.

    Attributes:
        titles: of the columns; without any the table is a list of pairs.
        rows: as many cells as there are titles; a shorter row leaves the last columns empty.
        title: above the table.
        caption: below it.
        words: number of columns of words, the first ones; the others hold figures.
    """

    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    caption: str = ""
    words: int = 1

    @classmethod
    def of(cls, titles: Iterable[str], rows: Iterable[Iterable[str]], **options: str | int) -> Table:
        """A table of any rows."""
        return cls(tuple(titles), tuple(tuple(row) for row in rows), **options)  # type: ignore[arg-type]

    def markdown(self) -> str:
        """As GitHub's Markdown has tables."""
        titles = self.titles or ("",) * len(self.rows[0])
        return "\n".join(f"| {' | '.join(line)} |" for line in (titles, ("---",) * len(titles), *self.rows))
