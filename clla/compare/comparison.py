"""Methods side by side: table, Pareto front and a recommendation that follows from them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from clla.evaluate.figures import OWN_COLOUR, SOURCE_COLOUR, axes_of, save
from clla.tables import Table

SLACK = 1e-3  # of a budget, when it is said to be kept


@dataclass(frozen=True)
class Row:
    """One setting of one method, measured.

    Attributes:
        method: its name, `source` for the source as it is.
        setting: what was chosen, in the method's terms.
        bytes_per_token: cache bytes at the context that quality was measured at.
        long_bytes_per_token: the same at the long context.
        share: of the source's bytes, at the context of the quality.
        perplexity: over the samples.
        kl: to the source, nats per token.
        retrieval_nll: of planted codes, None where it was left out.
        retrieval_exact: share of them.
        trained: the method needs training.
    """

    method: str
    setting: str
    bytes_per_token: float
    long_bytes_per_token: float
    share: float
    perplexity: float
    kl: float
    retrieval_nll: float | None
    retrieval_exact: float | None
    trained: bool

    @property
    def name(self) -> str:
        return f"{self.method}: {self.setting}"


def pareto(rows: Sequence[Row]) -> list[Row]:
    """Rows that no other beats in both bytes and KL, fewest bytes first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda r: (r.bytes_per_token, r.kl)):
        if not front or row.kl < front[-1].kl:
            front.append(row)
    return front


def recommend(rows: Sequence[Row], budget: float) -> Row | None:
    """The row of least KL whose measured share of the source's bytes is within the budget; None if none is.

    Within means to a thousandth of the budget, since plans spend theirs to the last byte and a cache also counts its
    lengths.
    """
    within = [row for row in rows if row.share <= budget * (1 + SLACK)]
    return min(within, key=lambda row: (row.kl, row.bytes_per_token), default=None)


def comparison_table(rows: Sequence[Row], *, context: int, long_context: int, caption: str) -> Table:
    """All rows; those of the Pareto front are marked."""
    front = set(map(id, pareto(rows)))
    titles = ("", "method", "setting", "training", f"bytes at {context}", f"at {long_context}", "of source",
              "perplexity", "KL", "code NLL", "exact")  # fmt: skip
    cells = [
        (
            "●" if id(row) in front else "",
            row.method,
            row.setting,
            "yes" if row.trained else "no",
            f"{row.bytes_per_token:,.0f}",
            f"{row.long_bytes_per_token:,.0f}",
            f"{100 * row.share:.1f} %",
            f"{row.perplexity:.3f}",
            f"{row.kl:.4f}",
            "" if row.retrieval_nll is None else f"{row.retrieval_nll:.2f}",
            "" if row.retrieval_exact is None else f"{100 * row.retrieval_exact:.0f} %",
        )
        for row in rows
    ]
    title = f"Quality at {context} tokens, measured bytes per token; ● no other is smaller and better"
    return Table.of(titles, cells, title=title, caption=caption, words=4)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line per row, the fields of `Row` as columns."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def draw_comparison(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """KL against bytes, both logarithmic, a mark per method, the Pareto front as a line.

    Args:
        rows: without the source, whose KL is zero.
        path: PNG or SVG to write.
        title: above the picture.
    """
    axes = axes_of(8, 5)
    marks = "osD^vP*Xh<>p8d"
    floor = 1e-5  # a lossless setting has no logarithm
    for i, method in enumerate(dict.fromkeys(row.method for row in rows)):
        own = [row for row in rows if row.method == method]
        points = [row.bytes_per_token for row in own], [max(row.kl, floor) for row in own]
        colour = OWN_COLOUR if method.startswith("clla") else None
        axes.plot(*points, marks[i % len(marks)], label=method, color=colour, markersize=6)
    front = pareto(rows)
    axes.plot(
        [row.bytes_per_token for row in front],
        [max(row.kl, floor) for row in front],
        color=SOURCE_COLOUR,
        linewidth=0.8,
        linestyle="--",
        label="Pareto front",
    )
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    what = {"x": "KV cache, measured bytes per token", "y": "KL to the source, nats per token"}
    save(axes, path, **what, title=title, log="xy")
