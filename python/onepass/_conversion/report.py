"""What convert did with each module."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One module: its name in the model, the class it had, what it runs on now (None: unchanged), and why it was left."""

    module: str
    was: str
    now: str | None
    why_not: str | None


class Report(list[Row]):
    """The rows of a conversion; printed, a table."""

    def __str__(self) -> str:
        if not self:
            return "nothing to convert: there are no norms and no dropouts, or all are converted already"
        cells = [("module", "was", "is", "why not"), *(tuple(cell or "" for cell in row) for row in self)]
        widths = [max(len(row[i]) for row in cells) for i in range(3)]
        return "\n".join(
            "  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3])).rstrip()
            for row in cells
        )
