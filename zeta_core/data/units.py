"""Rows out of files and tables, in units of a quarter of a megabyte that are cheap to pass over.

Several processes can each parse a share of the units. Trusted: nothing; a file is read as text, JSON, parquet or Arrow,
and a fault names it as its sender called it, with the line (or row), and is `InvalidData`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from zeta_core.failures import InvalidData

UNIT_BYTES = 1 << 18  # small beside what a process gets, so that all have about as much to do
LONGEST_LINE = 1 << 22  # of a text, which may be one line of any length
_READ_BYTES = 1 << 20  # of a column at once: a group of rows may be the whole file
_UNIT_ROWS = 256  # of a table: conversations are long, and their Python objects are many times their size


@dataclass(frozen=True)
class Row:
    """One row or line, numbered from 1, or a stretch of a text file (number 0), which is one document in all."""

    number: int
    fields: Mapping[str, object]
    ends_document: bool = True
    begins_document: bool = True


@dataclass(frozen=True)
class Unit:
    """Some rows, parsed only when they are asked for; ``position`` is how far its source is read after them."""

    rows: Callable[[], Iterator[Row]]
    position: int


def hub_units(rows: Any) -> Iterator[Unit]:
    for first in range(0, len(rows), _UNIT_ROWS):
        last = min(len(rows), first + _UNIT_ROWS)

        def load(first: int = first, last: int = last) -> Iterator[Row]:
            columns: dict[str, list[Any]] = rows[first:last]
            values = zip(*map(_without_empty_fields, columns.values()), strict=True)
            return (Row(number, dict(zip(columns, row, strict=True))) for number, row in enumerate(values, first + 1))

        yield Unit(load, last)


def _blocks(path: Path, *, longest_line: int = -1) -> Iterator[tuple[int, bytes, int]]:
    """(number of the first line, whole lines of about `UNIT_BYTES`, position after them), a file from end to end.

    Of a line with more bytes than ``longest_line`` behind a block's own, the rest is a block of its own.
    """
    number = 1
    with path.open("rb") as file:
        while block := file.read(UNIT_BYTES):
            rest = file.readline(longest_line)
            block += rest
            if len(rest) == longest_line and not rest.endswith(b"\n"):
                whole = _up_to_a_word(block)
                file.seek(len(whole) - len(block), os.SEEK_CUR)
                block = whole
            yield number, block, file.tell()
            number += block.count(b"\n")


def _up_to_a_word(block: bytes) -> bytes:
    """What is before the last space, or at least before a character that is not all there."""
    at = block.rfind(b" ")
    if at > 0:
        return block[:at]
    end = len(block)
    while end and len(block) - end < 4 and (block[end - 1] & 0xC0) == 0x80:
        end -= 1
    begun = end - 1 if block[end - 1] >= 0xC0 else end
    return block[:begun] or block


def text_units(path: Path, name: str, size: int) -> Iterator[Unit]:
    """The whole file is one document, in pieces of whole lines, or of words where a line is very long."""
    for number, block, position in _blocks(path, longest_line=LONGEST_LINE):

        def load(number: int = number, block: bytes = block, position: int = position) -> Iterator[Row]:
            begins = position == len(block)
            try:
                text = block.decode("utf-8-sig" if begins else "utf-8")
                yield Row(0, {"text": text}, ends_document=position >= size, begins_document=begins)
            except UnicodeDecodeError as error:
                line = number + block.count(b"\n", 0, error.start)
                raise _not_utf8(name, line, block[error.start]) from error

        yield Unit(load, position)


def json_units(path: Path, name: str) -> Iterator[Unit]:
    for first, block, position in _blocks(path):

        def load(first: int = first, block: bytes = block) -> Iterator[Row]:
            for number, raw in enumerate(block.split(b"\n"), first):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                    if line:
                        row = json.loads(line)
                        if (
                            "\\ud" in line or "\\uD" in line
                        ):  # an escaped half of a character, perhaps without the other
                            json.dumps(row, ensure_ascii=False).encode()
                        yield Row(number, row)
                except UnicodeDecodeError as error:
                    raise _not_utf8(name, number, raw[error.start]) from error
                except UnicodeEncodeError as error:
                    half = f"\\u{ord(error.object[error.start]):04x}"
                    raise InvalidData(
                        f"{name}, line {number}: holds {half}, half of a character without the other; write the whole "
                        "character."
                    ) from error
                except (ValueError, RecursionError) as error:
                    raise InvalidData(f"{name}, line {number}: is not JSON ({error}).") from error

        yield Unit(load, position)


def table_units(batches: Iterator[Any], name: str) -> Iterator[Unit]:
    position = 0
    for batch in batches:
        columns = batch.schema.names
        if twice := next((column for column in columns if columns.count(column) > 1), None):
            raise InvalidData(f"{name} has several columns called {twice!r}; give each a name of its own.")
        for start in range(0, batch.num_rows, _UNIT_ROWS):
            part = batch.slice(start, _UNIT_ROWS)

            def load(part: Any = part, first: int = position + 1) -> Iterator[Row]:
                try:
                    columns = {name: _without_empty_fields(values) for name, values in part.to_pydict().items()}
                except UnicodeDecodeError as error:
                    raise InvalidData(
                        f"{name}, rows {first} to {first + part.num_rows - 1}: hold text that is not UTF-8 (byte "
                        f"{error.object[error.start]:#04x}); write the table with text that is."
                    ) from error
                values = zip(*columns.values(), strict=True)
                return (Row(number, dict(zip(columns, row, strict=True))) for number, row in enumerate(values, first))

            position += part.num_rows
            yield Unit(load, position)


def _without_empty_fields(values: list[Any]) -> list[Any]:
    """A column without the fields that other rows alone have: each object of a table has those of all, most of them
    null, which a chat template would write (into the arguments of a tool's call).
    """
    first = next((value for value in values if value), None)
    inner = cast("list[Any]", first)[0] if isinstance(first, list) else first
    return cast("list[Any]", _dense(values)) if isinstance(inner, dict) else values


def _dense(value: Any) -> Any:
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        return {name: _dense(inner) for name, inner in fields.items() if inner is not None}
    return [_dense(inner) for inner in cast("list[Any]", value)] if isinstance(value, list) else value


def num_rows(path: Path, name: str, suffix: str) -> int:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    if suffix != ".parquet":
        return sum(batch.num_rows for batch in arrow_batches(path, name))
    try:
        return parquet.ParquetFile(path).metadata.num_rows
    except pa.ArrowException as error:
        raise InvalidData(f"{name} is not readable as parquet: {error}") from error


def parquet_batches(path: Path, name: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        yield from parquet.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False).iter_batches(
            batch_size=4 * _UNIT_ROWS
        )
    except (pa.ArrowException, OSError) as error:  # OSError without a number: what is packed in it is damaged
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InvalidData(f"{name} is not readable as parquet: {error}") from error


def arrow_batches(path: Path, name: str) -> Iterator[Any]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as memory:
            try:
                yield from pa.ipc.open_stream(memory)
            except pa.ArrowInvalid:
                memory.seek(0)
                reader = pa.ipc.open_file(memory)
                yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
    except pa.ArrowException as error:
        raise InvalidData(f"{name} is not readable as Arrow: {error}") from error


def _not_utf8(name: str, line: int, byte: int) -> InvalidData:
    return InvalidData(f"{name}, line {line}: is not UTF-8 text (byte {byte:#04x}); save it as UTF-8.")
