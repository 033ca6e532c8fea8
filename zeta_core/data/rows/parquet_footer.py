"""Checks the sizes and positions in the footer of a Parquet file, before a library allocates memory for them.

The footer is a Thrift structure in the compact protocol, followed by its length and a magic number. Only the fields
that are checked are decoded. See https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
and https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"PAR1"
_END_BYTES = 8  # the length of the footer and the magic number
_MAX_FOOTER_BYTES = 64 << 20
_MAX_NESTING = 32
_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(13)
_INTEGERS = (_I16, _I32, _I64)
# Numbers of fields in parquet.thrift.
_FILE_ROWS, _FILE_GROUPS = 3, 4
_GROUP_COLUMNS, _GROUP_BYTES, _GROUP_ROWS = 1, 2, 3
_CHUNK_FILE, _CHUNK_COLUMN = 1, 3
_NUM_VALUES, _UNCOMPRESSED_BYTES, _COMPRESSED_BYTES, _DATA_AT, _DICTIONARY_AT = 5, 6, 7, 9, 11


@dataclass(frozen=True)
class _Span:
    """The bytes of one column of a row group."""

    begin: int
    size: int
    group: int


def check_footer(path: Path) -> None:
    """Raise `ValueError`, with the reason as a clause, if the footer contradicts the file; also raises `OSError`."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        begins_right = file.read(len(MAGIC)) == MAGIC
        file.seek(max(0, num_bytes - _END_BYTES))
        end = file.read(_END_BYTES)
        if num_bytes < len(MAGIC) + _END_BYTES or not begins_right or end[4:] != MAGIC:
            raise ValueError(f"it does not begin and end with {MAGIC.decode()}")
        length = int.from_bytes(end[:4], "little")
        footer_at = num_bytes - _END_BYTES - length
        if length > _MAX_FOOTER_BYTES or footer_at < len(MAGIC):
            limit = min(_MAX_FOOTER_BYTES, num_bytes - len(MAGIC) - _END_BYTES)
            raise ValueError(f"it claims a footer of {length} bytes; at most {limit} are possible")
        file.seek(footer_at)
        content = file.read(length)
    _Footer(content, footer_at).check()


class _Footer:
    def __init__(self, content: bytes, footer_at: int) -> None:
        self._reader = _CompactReader(content)
        self._footer_at = footer_at
        self._spans = list[_Span]()

    def check(self) -> None:
        num_rows, groups_rows, num_groups = 0, 0, 0
        for number, kind in self._reader.fields():
            if number == _FILE_ROWS:
                num_rows = self._reader.integer(kind, "number of rows")
            elif number == _FILE_GROUPS:
                for index in self._reader.structures(kind):
                    groups_rows += self._group_rows(index)
                    num_groups += 1
            else:
                self._reader.skip(kind)
        if num_rows != groups_rows:
            raise ValueError(f"it claims {num_rows} rows, but its {num_groups} row groups have {groups_rows}")
        self._check_spans()

    def _group_rows(self, index: int) -> int:
        """The number of rows of the next row group, whose columns are recorded."""
        num_rows = 0
        for number, kind in self._reader.fields():
            if number == _GROUP_ROWS:
                num_rows = self._reader.integer(kind, f"number of rows of row group {index}")
            elif number == _GROUP_BYTES:
                self._reader.integer(kind, f"size of row group {index}")
            elif number == _GROUP_COLUMNS:
                for _ in self._reader.structures(kind):
                    self._record_chunk(index)
            else:
                self._reader.skip(kind)
        return num_rows

    def _record_chunk(self, group: int) -> None:
        for number, kind in self._reader.fields():
            if number == _CHUNK_FILE:
                raise ValueError(f"row group {group} is in another file")
            if number == _CHUNK_COLUMN and kind == _STRUCT:
                self._record_column(group)
            else:
                self._reader.skip(kind)

    def _record_column(self, group: int) -> None:
        found = dict[int, int]()
        for number, kind in self._reader.fields():
            if number in (_NUM_VALUES, _UNCOMPRESSED_BYTES, _COMPRESSED_BYTES, _DATA_AT, _DICTIONARY_AT):
                found[number] = self._reader.integer(kind, f"size or position in row group {group}")
            else:
                self._reader.skip(kind)
        begin, dictionary = found.get(_DATA_AT, 0), found.get(_DICTIONARY_AT, 0)
        if dictionary > 0:  # some writers write 0 if there is none
            begin = min(begin, dictionary)
        self._spans.append(_Span(begin, found.get(_COMPRESSED_BYTES, 0), group))

    def _check_spans(self) -> None:
        """Raise `ValueError` unless the columns lie one after the other before the footer."""
        end = 0
        for span in sorted(self._spans, key=lambda span: (span.begin, span.size)):
            if span.begin + span.size > self._footer_at:
                raise ValueError(
                    f"row group {span.group} claims {span.size} bytes from byte {span.begin} on, but the data ends at "
                    f"byte {self._footer_at}"
                )
            if span.begin < end and span.size > 0:
                raise ValueError(f"row group {span.group} overlaps other data at byte {span.begin}")
            end = max(end, span.begin + span.size)


class _CompactReader:
    """Reads a Thrift structure; every length is compared with the bytes that are left. Raises `ValueError`."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def fields(self) -> Iterator[tuple[int, int]]:
        """The number and the type of each field of the next structure; the caller reads or skips its value."""
        number = 0
        while (header := self._byte()) & 0x0F != _STOP:
            delta, kind = header >> 4, header & 0x0F
            number = number + delta if delta else self._signed()
            yield number, kind

    def structures(self, kind: int) -> Iterator[int]:
        """The indices of the structures in a list; the caller reads each."""
        if kind != _LIST:
            raise ValueError("its footer is damaged")
        size, element = self._list_header()
        if size and element != _STRUCT:
            raise ValueError("its footer is damaged")
        yield from range(size)

    def integer(self, kind: int, what: str) -> int:
        """A whole number that can't be negative."""
        if kind not in _INTEGERS:
            raise ValueError(f"its footer has a {what} of a wrong type")
        value = self._signed()
        if value < 0:
            raise ValueError(f"its footer claims {value} as {what}")
        return value

    def skip(self, kind: int, nesting: int = 0) -> None:
        """Skip a field."""
        if kind not in (_TRUE, _FALSE):  # the value is the type
            self._skip_value(kind, nesting)

    def _skip_value(self, kind: int, nesting: int) -> None:
        if nesting > _MAX_NESTING:
            raise ValueError("its footer is nested too deeply")
        skip: Callable[[int, int], None] = self._skip_value
        if kind in _INTEGERS:
            self._unsigned()
        elif kind in (_TRUE, _FALSE, _BYTE):  # elements of a list
            self._take(1)
        elif kind == _DOUBLE:
            self._take(8)
        elif kind == _BINARY:
            self._take(self._unsigned())
        elif kind in (_LIST, _SET):
            size, element = self._list_header()
            for _ in range(size):
                skip(element, nesting + 1)
        elif kind == _MAP:
            size = self._possible(self._unsigned())
            kinds = self._byte() if size else 0
            for _ in range(size):
                skip(kinds >> 4, nesting + 1)
                skip(kinds & 0x0F, nesting + 1)
        elif kind == _STRUCT:
            for _, inner in self.fields():
                self.skip(inner, nesting + 1)
        else:
            raise ValueError("its footer is damaged")

    def _list_header(self) -> tuple[int, int]:
        """The number of elements and their type."""
        header = self._byte()
        size = header >> 4
        return self._possible(self._unsigned() if size == 15 else size), header & 0x0F

    def _possible(self, size: int) -> int:
        """``size``, if so many elements of at least one byte may follow."""
        if size > len(self._content) - self._at:
            raise ValueError(f"its footer claims {size} elements in {len(self._content) - self._at} bytes")
        return size

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)

    def _unsigned(self) -> int:
        value, shift = 0, 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("its footer contains a number of more than 64 bits")

    def _byte(self) -> int:
        if self._at >= len(self._content):
            raise ValueError("its footer is truncated")
        self._at += 1
        return self._content[self._at - 1]

    def _take(self, size: int) -> None:
        if size > len(self._content) - self._at:
            raise ValueError(
                f"its footer claims a value of {size} bytes, but only {len(self._content) - self._at} follow"
            )
        self._at += size
