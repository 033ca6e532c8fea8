"""Reading rows from CSV and TSV files with a header, as RFC 4180 defines them.

Every value is text; `Source.fields` parses lists, such as ``messages``, which are written as JSON. All data is
untrusted. Errors are `InvalidData` and name the file and the row or line.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from zeta_core.contract.data_files.file_types import DELIMITERS, file_type
from zeta_core.data.rows.decompression import ByteStream, open_stream
from zeta_core.data.rows.row import ChooseColumns, Row, Unit
from zeta_core.data.rows.text_files import UNIT_BYTES, not_utf8
from zeta_core.failures import InvalidData

LONGEST_LINE = 1 << 26
LONGEST_FIELD = 1 << 26  # a field without its closing quote continues to the end of the file
_OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_MAX_NAMES = 8


def csv_units(path: Path, name: str, choose: ChooseColumns) -> Iterator[Unit]:
    """The rows of a CSV or TSV file. They are numbered from 1, without the header and empty lines."""
    csv.field_size_limit(LONGEST_FIELD)
    with open_stream(path, name) as stream:
        reader = csv.reader(_lines(stream, name), delimiter=DELIMITERS[file_type(name).suffix], strict=True)
        records = _records(reader, name)
        header = next(records, None)
        columns = _columns(header, name)
        chosen = set(choose(columns, columns))
        unread = tuple(column for column in columns if column and column not in chosen)
        rows: list[Row] = []
        size = number = 0
        for number, record in enumerate(records, 1):
            if len(record) != len(columns):
                raise InvalidData(
                    f"{name}, row {number} (it ends in line {reader.line_num}) has {len(record)} fields, but the "
                    f"header has {len(columns)}; put fields with separators or line breaks in double quotes."
                )
            fields = {column: value for column, value in zip(columns, record, strict=True) if column in chosen}
            rows.append(Row(number, fields, unread=unread))
            size += sum(map(len, record))
            if size >= UNIT_BYTES:
                yield Unit(lambda rows=rows: iter(rows), stream.position)
                rows, size = [], 0
        if not number:
            raise InvalidData(f"{name} has a header but no rows; provide at least one row.")
        yield Unit(lambda: iter(rows), stream.position)


def _lines(stream: ByteStream, name: str) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: stream.readline(LONGEST_LINE), b""), 1):
        if len(line) == LONGEST_LINE:
            raise InvalidData(
                f"{name}, line {number} is longer than {LONGEST_LINE >> 20} MiB, the limit; check its line breaks."
            )
        if b"\0" in line:
            raise InvalidData(f"{name}, line {number} contains a NUL byte, so it is not text; remove it.")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(name, number, line[error.start]) from error


def _records(reader: Iterator[list[str]], name: str) -> Iterator[list[str]]:
    """The records that are not empty lines."""
    while True:
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            line = getattr(reader, "line_num", 0)
            raise InvalidData(
                f"{name}, line {line} is not valid CSV ({error}); put fields that contain quotes, separators or line "
                "breaks in double quotes, and double the quotes in them."
            ) from error
        if record:
            yield record


def _columns(header: list[str] | None, name: str) -> list[str]:
    """The names of the columns. Raises `InvalidData` if they are not usable."""
    if header is None:
        raise InvalidData(f"{name} contains no header; the first row must name the columns.")
    columns = [column.strip() for column in header]
    named = [column for column in columns if column]
    if twice := next((column for column in named if named.count(column) > 1), None):
        raise InvalidData(f"{name} has several columns named {twice!r}; rename all but one of them.")
    if len(columns) == 1:
        other = next((delimiter for delimiter in _OTHER_DELIMITERS if delimiter in columns[0]), None)
        if other is not None:
            suffix = file_type(name).suffix
            right = "commas" if suffix == ".csv" else "tabs"
            raise InvalidData(
                f"{name} has the header {columns[0][:80]!r}, which is separated by {_OTHER_DELIMITERS[other]}; a "
                f"{suffix} file is separated by {right}."
            )
    return columns
