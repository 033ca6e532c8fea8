"""A source of training data: reading its rows under the names that the formats define."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from zeta_core.data.rows.columns import Layout, columns_to_read, explain_lost, explain_unknown, lost_column
from zeta_core.data.rows.formats import COLUMNS, JSON_LISTS, RowFormat, column_in, fault_in
from zeta_core.data.rows.row import ChooseColumns, Row, Unit, at_location, parsed_list
from zeta_core.data.rows.shapes import InvalidShape
from zeta_core.data.rows.token_rows import MaskPresence
from zeta_core.failures import InvalidData


@dataclass(frozen=True)
class Source:
    """A file or dataset: its name for messages, a fingerprint that changes with its content, and its units.

    ``size`` is in bytes or rows, as is the ``position`` of the units. ``row_format`` is ``None`` for ``auto`` until
    `with_format`. ``first_format`` is the format that ``auto`` means, or ``None`` if the first row matches no format.
    ``layout`` is how rows are read in the format of the spec, or ``None`` if the first row does not match it.
    """

    name: str
    fingerprint: str
    size: int
    read: Callable[[ChooseColumns], Iterator[Unit]] = field(repr=False)
    row_format: RowFormat | None = "text"
    is_detected: bool = False  # the spec does not name ``row_format``
    first_format: RowFormat | None = None
    layout: Layout | None = None
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    word: str = "row"
    in_rows: bool = False  # ``size`` and positions are in rows
    is_one_document: bool = False  # a text file, whose rows are the pieces of one document
    flat: Path | None = None  # a flat file of ids, which is used in place
    dtype: str | None = None  # the type of the ids of a flat file, if the spec states it
    measure: Callable[[], int] | None = field(default=None, repr=False)  # finds the ``size`` of a file with rows
    num_bytes: int = 0  # approximate amount of data to tokenize
    number: int = 0  # index of the source in the spec
    weight: float | None = None  # weight of the source in the spec
    drop_fields: tuple[str, ...] = ()  # fields of turns that are not used
    allow_control_tokens: bool = False  # whether control tokens in texts are encoded as such
    drop_columns: frozenset[str] = frozenset()  # columns that are not used although they look like a prompt or mask
    at: str = "dataset"  # the field of the spec, for messages
    group_by: str | None = None  # the column whose values are groups of rows that are held out together

    def units(self) -> Iterator[Unit]:
        """Read the rows, with the required columns alone, and with lists that are written as JSON text parsed.

        Reading a unit raises `InvalidData` for the first row that can't be parsed.
        """
        for unit in self.units_with_faults():
            yield Unit(lambda unit=unit: map(_without_fault, unit.rows()), unit.position)

    def units_with_faults(self) -> Iterator[Unit]:
        """The same, but a row that can't be parsed has its ``fault``, so that the rows after it can be read."""
        for unit in self.read(self._columns_to_read):
            yield Unit(lambda unit=unit: map(self._prepared, unit.rows()), unit.position)

    def _columns_to_read(self, names: Sequence[str], numeric: Collection[str]) -> list[str]:
        wanted = {*columns_to_read(names, numeric, self.layout, self.columns, self.drop_columns), self.group_by}
        return [name for name in names if name in wanted]

    @property
    def shape(self) -> str:
        """The name of the shape of the rows, if it is not the format's own."""
        return "" if self.layout is None or self.layout.shape is None else self.layout.shape.name

    def location(self, number: int) -> str:
        """The location of a row for messages; a text file has only one location."""
        return f"{self.name}, {self.word} {number}" if number else self.name

    def after(self, position: int) -> str:
        """The location to be read next, for messages, with the size of the file for context."""
        if self.in_rows:
            return f"{self.name} ({self.num_bytes:,} bytes, {self.size:,} rows), from row {position + 1}"
        return f"{self.name}, after {position:,} of {self.num_bytes:,} bytes" if position else self.name

    def with_format(self) -> Source:
        """This source with ``auto`` replaced by the detected format."""
        # If the first row matches no format, reading it raises the error.
        row_format = self.row_format or self.first_format or "text"
        return replace(self, row_format=row_format, is_detected=self.row_format is None)

    @property
    def has_detected_format(self) -> bool:
        """Whether the format is the one that ``auto`` would detect, so naming it does not change the data."""
        if self.row_format in (None, "tokens"):  # "tokens" is never detected
            return self.row_format is None
        return (self.first_format or "text") == self.row_format

    def fields(self, row: Row) -> dict[str, object]:
        """The columns of a row under the standard names. Raises `InvalidData` naming the row."""
        assert self.row_format is not None
        if not isinstance(cast(object, row.fields), Mapping):
            raise self._invalid(row, "is not an object with named fields.")
        layout = self.layout or Layout(self.row_format)
        if self.layout is None and self.is_detected:
            raise self._invalid(row, explain_unknown({**dict.fromkeys(row.unread), **row.fields}, self.at))
        present = dict(row.fields)
        used = layout.used_columns(present, self.columns)
        columns = self.columns
        if layout.shape is not None:
            try:
                present, columns = layout.shape.convert(present), {}
            except InvalidShape as error:
                raise self._invalid(row, str(error)) from error
        if fault := fault_in(present, layout.row_format, columns, self.drop_fields):
            raise self._invalid(row, fault)
        if layout.row_format != "tokens" and (lost := lost_column(row.fields, used)):
            raise self._invalid(row, explain_lost(lost, row.fields, layout, used, self.at), code="unused_column")
        return {name: present.get(column_in(present, name, columns)) for name in COLUMNS[layout.row_format]}

    def _prepared(self, row: Row) -> Row:
        """The row without the columns that the spec drops, and with lists that are written as JSON text parsed."""
        if not isinstance(cast(object, row.fields), Mapping):
            return row
        kept = {name: value for name, value in row.fields.items() if name not in self.drop_columns}
        dropped = tuple(name for name in row.fields if name in self.drop_columns)
        lists = {self.columns.get(name, name) for name in JSON_LISTS} & kept.keys()
        kept |= {name: parsed_list(kept[name]) for name in lists}
        group = row.fields.get(self.group_by) if self.group_by is not None else None
        return replace(row, fields=kept, unread=(*row.unread, *dropped), group_value=group)

    def group(self, row: Row) -> int:
        """A hash of the row's value of ``group_by``, or 0 without it. Raises `InvalidData` if there is no value."""
        if self.group_by is None or not isinstance(cast(object, row.fields), Mapping):
            return 0
        value = row.group_value
        if not isinstance(value, str | int | float) or value == "":
            found = ", ".join(sorted(str(name) for name in row.fields)[:8]) or "none"
            fault = f"has no text or number in {self.group_by!r}, which group_by names (columns: {found})."
            raise self._invalid(row, fault)
        return int.from_bytes(hashlib.blake2b(str(value).encode(), digest_size=8).digest(), "little")

    def unused_columns(self, row: Row) -> Iterator[str]:
        """The columns of a row that are not used, including those that were not read."""
        yield from (name for name in row.unread if name != self.group_by)
        if self.layout is not None:
            used = {self.group_by} | set(self.layout.used_columns(row.fields, self.columns).values())
            yield from (str(name) for name in row.fields if name and name not in used)

    def mapped_columns(self, row: Row) -> Iterator[str]:
        """The columns of a row that are used because ``columns`` names them."""
        if self.columns and self.layout is not None:
            used = set(self.layout.used_columns(row.fields, self.columns).values())
            yield from (name for name in self.columns.values() if name in used)

    def check_columns(self, mapped: Collection[str], unused: Collection[str]) -> None:
        """Raise `InvalidData` if ``columns`` or ``drop_columns`` has no effect, such as for a misspelt column.

        ``mapped`` and ``unused`` are those of all rows of the source in the spec.
        """
        for name, column in self.columns.items():
            if column not in mapped:
                raise InvalidData(
                    f"{self.at}.columns names {column!r} as {name!r}, but no row has that column, or "
                    f"{self.shape or self.row_format} rows do not use it; correct the name, or remove it."
                )
        if missing := sorted(self.drop_columns - {*unused, self.group_by}):
            raise InvalidData(
                f"{self.at}.drop_columns names {missing[0]!r}, which no row has; correct the name, or remove it."
            )

    def check_masks(self, columns: MaskPresence) -> None:
        """Raise `InvalidData` if only some rows have a mask."""
        if columns.inconsistent is not None:
            name, number = columns.inconsistent
            raise InvalidData(
                f"{self.location(number)} has no {name!r}, which other rows have; add it to every row, or to none."
            )

    def _invalid(self, row: Row, fault: str, code: str | None = None) -> InvalidData:
        return InvalidData(at_location(self.location(row.number), fault), code=code)


def _without_fault(row: Row) -> Row:
    if row.fault is not None:
        raise row.fault
    return row
