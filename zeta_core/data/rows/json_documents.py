"""Reading rows from ``.json`` files: an array of objects, an object that contains one, a single row, or JSON Lines.

The document is parsed while it is read, so its size is not limited, only that of each row. All data is untrusted.
Errors are `InvalidData` and name the file and the row or line.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from zeta_core.data.rows.columns import detect_layout
from zeta_core.data.rows.decompression import open_stream
from zeta_core.data.rows.formats import CONVERSATIONS
from zeta_core.data.rows.row import ChooseColumns, Row, Unit
from zeta_core.data.rows.text_files import LONGEST_ROW, UNIT_BYTES, check_surrogates
from zeta_core.data.rows.turns import is_turn
from zeta_core.failures import InvalidData

_WHITE_SPACE = re.compile(r"[ \t\n\r]*")
_LONGEST_FIRST_LINE = 1 << 24  # a longer line is taken for a document without line breaks
_INCOMPLETE = 16  # an error that is not further from the end of the buffer may only need more text
_MAX_NAMES = 8


def document_units(path: Path, name: str, columns: Collection[str], choose: ChooseColumns) -> Iterator[Unit]:
    """The rows of a JSON document.

    ``columns`` are the names of columns: an object that has one of them is a row, and not a container of rows.
    """
    with open_stream(path, name) as stream:
        buffer = _Buffer(stream, name)
        rows: list[Row] = []
        size = 0
        for number, (value, text) in enumerate(_rows(buffer, columns), 1):
            check_surrogates(value, text, choose, f"{name}, row {number}")
            rows.append(Row(number, value))
            size += len(text)
            if size >= UNIT_BYTES:
                yield Unit(lambda rows=rows: iter(rows), stream.position)
                rows, size = [], 0
        yield Unit(lambda: iter(rows), stream.position)


def _rows(buffer: _Buffer, columns: Collection[str]) -> Iterator[tuple[Any, str]]:
    first = buffer.peek()
    if first == "[":
        yield from buffer.elements()
        buffer.expect_end()
    elif first == "{" and not buffer.is_json_lines():
        yield from _rows_of_object(buffer, columns)
        buffer.expect_end()
    elif first == "{":
        while buffer.peek():
            yield buffer.value()
    else:
        raise InvalidData(f"{buffer.name} contains neither a JSON array nor a JSON object; provide an array of rows.")


def _rows_of_object(buffer: _Buffer, columns: Collection[str]) -> Iterator[tuple[Any, str]]:
    """The elements of the only array of rows in an object, or the object itself if it is a row.

    An array of the turns of a conversation is a column of a row, whatever its name.
    """
    others: dict[str, Any] = {}
    texts: list[str] = []
    array: str | None = None
    row_columns: list[str] = []
    for key in buffer.read_keys():
        is_column = key in columns
        if buffer.is_array_of_objects():
            elements = iter(buffer.elements())
            first = next(elements)
            if is_turn(first[0], is_expected=is_column or key == CONVERSATIONS) or (
                is_column and not _is_row(first[0])
            ):
                others[key], text = buffer.collected(first, elements)
                is_column = True
            else:
                if array is not None:
                    raise InvalidData(
                        f"{buffer.name} contains several arrays of rows ({array!r} and {key!r}); save the one to train "
                        "on as a file of its own."
                    )
                array = key
                yield first
                yield from elements
                continue
        else:
            others[key], text = buffer.value()
        texts.append(text)
        row_columns += [key] if is_column else []
    if array is not None and row_columns:
        raise InvalidData(
            f"{buffer.name} contains {row_columns[0]!r} beside the array {array!r}, so it belongs to no row; add it to "
            "each row, or remove it."
        )
    if array is None and not row_columns and detect_layout(dict.fromkeys(others, ""), {}, None, "sft") is None:
        names = ", ".join(list(others)[:_MAX_NAMES]) or "none"
        raise InvalidData(
            f"{buffer.name} contains no array of rows (its fields: {names}); provide an array of objects."
        )
    if array is None:
        yield others, "".join(texts)


def _is_row(value: object) -> bool:
    """Whether an element of an array is a row with turns or a pair of texts."""
    layout = detect_layout(cast("dict[str, Any]", value), {}, None, "sft") if isinstance(value, dict) else None
    return layout is not None and layout.row_format != "text"


class _Buffer:
    """A window of the text of a JSON document, which is extended as required."""

    def __init__(self, stream: Any, name: str) -> None:
        self.name = name
        self._file = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        self._text = ""
        self._at = 0
        self._line = 1  # the number of the line on which the window starts
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """Skip white space and return the next character; at the end, an empty string."""
        while True:
            self._at = _end_of_space(self._text, self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._extend():
                return ""

    def value(self) -> tuple[Any, str]:
        """Parse the next value; also return its text."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                begun = "Unterminated string" in error.msg
                if (begun or error.pos >= len(self._text) - _INCOMPLETE) and self._extend():
                    continue
                raise self._fault(error.msg, error.pos) from error
            except RecursionError as error:
                raise self._fault("it is nested too deeply", self._at) from error
            if end == len(self._text) and self._extend():
                continue  # a number may continue
            text = self._text[self._at : end]
            self._at = end
            return value, text

    def elements(self) -> Iterator[tuple[Any, str]]:
        """Parse an array element by element."""
        for _ in self._items("]"):
            yield self.value()

    def collected(self, first: tuple[Any, str], rest: Iterator[tuple[Any, str]]) -> tuple[list[Any], str]:
        """The elements of an array that is a part of a row, and their texts."""
        values, texts, size = [first[0]], [first[1]], len(first[1])
        for value, text in rest:
            size += len(text)
            if size > LONGEST_ROW:
                raise self._too_long()
            values.append(value)
            texts.append(text)
        return values, "".join(texts)

    def read_keys(self) -> Iterator[str]:
        """Parse an object key by key; the caller reads each value."""
        for _ in self._items("}"):
            if self.peek() != '"':
                raise self._fault("Expecting a property name in double quotes", self._at)
            key, _text = self.value()
            if self.peek() != ":":
                raise self._fault("Expecting ':' delimiter", self._at)
            self._at += 1
            yield key

    def is_array_of_objects(self) -> bool:
        """Whether the next value is an array that starts with an object."""
        return self.peek() == "[" and self._character_after(1) == "{"

    def is_json_lines(self) -> bool:
        """Whether the first line is a complete object, and something follows it."""
        while (end := self._text.find("\n", self._at)) < 0:
            if len(self._text) > _LONGEST_FIRST_LINE or not self._extend():
                return False
        try:
            json.loads(self._text[self._at : end])
        except ValueError:
            return False
        return bool(self._character_after(end - self._at))

    def _character_after(self, offset: int) -> str:
        """The first character that is not white space, from ``offset`` on; the position does not change."""
        while True:
            offset = _end_of_space(self._text, self._at + offset) - self._at
            if self._at + offset < len(self._text):
                return self._text[self._at + offset]
            if not self._extend():
                return ""

    def expect_end(self) -> None:
        if self.peek():
            raise self._fault("the document ended before this text", self._at)

    def _items(self, closing: str) -> Iterable[None]:
        """Yield before each item of an array or object, and read the commas between them."""
        self._at += 1  # the opening bracket
        if self.peek() == closing:
            self._at += 1
            return
        while True:
            yield
            found = self.peek()
            if found not in (",", closing) or not found:
                raise self._fault("Expecting ',' delimiter" if found else "the file ends too early", self._at)
            self._at += 1
            if found == closing:
                return

    def _extend(self) -> bool:
        """Read more text, and drop what has been parsed. Returns whether there was more."""
        rest = self._text[self._at :]
        if len(rest) > LONGEST_ROW:
            raise self._too_long()
        try:
            more = self._file.read(max(UNIT_BYTES, len(rest)))
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise InvalidData(f"{self.name} is not UTF-8 text (byte {byte:#04x}); save it as UTF-8.") from error
        if not more:
            return False
        self._line += self._text.count("\n", 0, self._at)
        self._text, self._at = rest + more, 0
        return True

    def _too_long(self) -> InvalidData:
        return InvalidData(
            f"{self.name}, line {self._line} starts a row of more than {LONGEST_ROW >> 20} MiB, the limit; split it."
        )

    def _fault(self, message: str, position: int) -> InvalidData:
        line = self._line + self._text.count("\n", 0, position)
        return InvalidData(f"{self.name}, line {line} is not valid JSON ({message}).")


def _end_of_space(text: str, start: int) -> int:
    found = _WHITE_SPACE.match(text, start)
    return start if found is None else found.end()
