"""Printing tables with aligned columns that fit the terminal width, and control characters escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zeta.cli.output import cell, terminal_size
from zeta.cli.wrapping import cell_len

GAP = "  "


@dataclass(frozen=True)
class Column:
    """A column. ``min_width`` is the minimum width to which cells may be shortened, ``None`` if they never are.

    If the table is still too wide, columns are omitted, the highest ``drop_order`` first; 0 is never omitted.
    """

    head: str
    min_width: int | None = None
    drop_order: int = 0


def print_table(columns: Sequence[Column | str], rows: Sequence[Sequence[object]], *, none: str) -> None:
    """Print the rows in the width of the terminal; ``none`` is printed if there are no rows."""
    if not rows:
        print(none)
        return
    all_columns = [Column(column) if isinstance(column, str) else column for column in columns]
    for line in table_lines(all_columns, rows, terminal_size().columns):
        print(line)


def table_lines(columns: Sequence[Column], rows: Sequence[Sequence[object]], width: int) -> list[str]:
    """The table's lines. They exceed ``width`` only if the columns that cannot be shortened do not fit."""
    cells = [[cell(value) for value in row] for row in rows]
    shown = [
        index
        for index, column in enumerate(columns)
        if not column.drop_order or any(row[index] != cell(None) for row in cells)
    ]
    widths = _widths(columns, cells, shown, width)
    while _total(widths, shown) > width and any(columns[index].drop_order for index in shown):
        shown.remove(max(shown, key=lambda index: columns[index].drop_order))
        widths = _widths(columns, cells, shown, width)
    lines = [[column.head for column in columns], *cells]
    return [GAP.join(_padded(line[index], widths[index]) for index in shown).rstrip() for line in lines]


def _widths(
    columns: Sequence[Column], cells: Sequence[Sequence[str]], shown: Sequence[int], width: int
) -> dict[int, int]:
    """Start with the width of the longest cell, then narrow the widest flexible column until the table fits."""
    widths = {i: max(cell_len(columns[i].head), *(cell_len(row[i]) for row in cells)) for i in shown}
    while _total(widths, shown) > width:
        flexible = [i for i in shown if widths[i] > (columns[i].min_width or widths[i])]
        if not flexible:
            break
        widths[max(flexible, key=widths.__getitem__)] -= 1
    return widths


def _total(widths: dict[int, int], shown: Sequence[int]) -> int:
    return sum(widths[index] for index in shown) + len(GAP) * (len(shown) - 1)


def _padded(text: str, width: int) -> str:
    text = cut_middle(text, width)
    return text + " " * (width - cell_len(text))


def cut_middle(text: str, width: int) -> str:
    """``text`` in at most ``width`` terminal cells, with an ellipsis in place of its middle."""
    if cell_len(text) <= width:
        return text
    head, tail = 0, len(text)
    while cell_len(text[: head + 1]) + 1 + cell_len(text[tail:]) <= width:
        head += 1
        if cell_len(text[:head]) + 1 + cell_len(text[tail - 1 :]) > width:
            break
        tail -= 1
    return f"{text[:head]}…{text[tail:]}"
