"""Reading rows from text and JSON Lines files, in units of 256 KiB.

All data is untrusted. Errors are `InvalidData` and name the original file name and the line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from zeta_core.contract.data_files.file_types import file_type
from zeta_core.data.rows.decompression import ByteStream, open_stream
from zeta_core.data.rows.row import ChooseColumns, Row, Unit
from zeta_core.failures import InvalidData

UNIT_BYTES = 1 << 18  # small relative to a process's share, so the processes have about equal work
LONGEST_LINE = 1 << 22  # in a text file; a longer line is split
LONGEST_ROW = 1 << 28  # in a JSON Lines file, where a line is parsed as a whole


def _blocks(path: Path, name: str, *, longest_line: int) -> Iterator[_Block]:
    """Split a file into complete lines of about `UNIT_BYTES`.

    If the last line of a block continues for more than ``longest_line`` bytes, the rest becomes another block.
    """
    number, end, rest = 1, 0, b""
    is_compressed = bool(file_type(name).compression)
    with open_stream(path, name) as stream:
        while block := _take(stream, rest, UNIT_BYTES):
            rest = rest[UNIT_BYTES:]
            line = _take_line(stream, rest, longest_line)
            rest = rest[len(line) :]
            block += line
            if len(line) == longest_line and not line.endswith(b"\n"):
                whole = _up_to_a_word(block)
                block, rest = whole, block[len(whole) :] + rest
            is_first, end = end == 0, end + len(block)
            is_last = not rest and not stream.peek(1)
            yield _Block(number, block, stream.position if is_compressed else end, is_first, is_last)
            number += block.count(b"\n")


@dataclass(frozen=True)
class _Block:
    """Lines of a file: the number of the first one, their bytes, and the position in the file after them."""

    number: int
    content: bytes
    position: int
    is_first: bool
    is_last: bool


def _take(stream: ByteStream, pending: bytes, size: int) -> bytes:
    """The next ``size`` bytes, starting with ``pending``, which are already read."""
    return pending[:size] if len(pending) >= size else pending + stream.read(size - len(pending))


def _take_line(stream: ByteStream, pending: bytes, limit: int) -> bytes:
    """The rest of the line, at most ``limit`` bytes, starting with ``pending``, which are already read."""
    end = pending.find(b"\n", 0, limit) + 1
    if end or len(pending) >= limit:
        return pending[: end or limit]
    return pending + stream.readline(limit - len(pending))


def _up_to_a_word(block: bytes) -> bytes:
    """The block up to the last space, or at least up to an incomplete character."""
    at = block.rfind(b" ")
    if at > 0:
        return block[:at]
    end = len(block)
    while end and len(block) - end < 4 and (block[end - 1] & 0xC0) == 0x80:
        end -= 1
    begun = end - 1 if block[end - 1] >= 0xC0 else end
    return block[:begun] or block


def text_units(path: Path, name: str) -> Iterator[Unit]:
    """Read a text file as one document, in pieces that end at a line end, or at a word if a line is very long."""
    for block in _blocks(path, name, longest_line=LONGEST_LINE):

        def load(block: _Block = block) -> Iterator[Row]:
            if (nul := block.content.find(0)) >= 0:
                line = block.number + block.content.count(b"\n", 0, nul)
                raise InvalidData(f"{name}, line {line} contains a NUL byte, so it is not text; remove it.")
            try:
                text = block.content.decode("utf-8-sig" if block.is_first else "utf-8")
                yield Row(0, {"text": text}, ends_document=block.is_last, begins_document=block.is_first)
            except UnicodeDecodeError as error:
                line = block.number + block.content.count(b"\n", 0, error.start)
                raise not_utf8(name, line, block.content[error.start]) from error

        yield Unit(load, block.position)


def json_units(path: Path, name: str, choose: ChooseColumns) -> Iterator[Unit]:
    """Read a JSON Lines file, which has one object per line."""
    for block in _blocks(path, name, longest_line=LONGEST_ROW):
        if not block.is_last and not block.content.endswith(b"\n"):
            line = block.number + block.content.count(b"\n")
            raise InvalidData(
                f"{name}, line {line} is longer than {LONGEST_ROW >> 20} MiB, the limit for one row; split the row."
            )

        def load(block: _Block = block) -> Iterator[Row]:
            for number, raw in enumerate(block.content.split(b"\n"), block.number):
                try:
                    row = _parsed_line(raw, name, number, choose)
                except InvalidData as error:
                    row = Row(number, {}, fault=error)
                if row is not None:
                    yield row

        yield Unit(load, block.position)


def _parsed_line(raw: bytes, name: str, number: int, choose: ChooseColumns) -> Row | None:
    """The row in a line, ``None`` if it is blank. Raises `InvalidData`."""
    line = ""
    try:
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        if number == 1 and line.startswith("["):
            raise _is_array(name)
        if not line:
            return None
        row = json.loads(line)
        check_surrogates(row, line, choose, f"{name}, line {number}")
        return Row(number, row)
    except UnicodeDecodeError as error:
        raise not_utf8(name, number, raw[error.start]) from error
    except (ValueError, RecursionError) as error:
        fix = _RENAME if number == 1 and line in ("{", "[") else ""
        raise InvalidData(f"{name}, line {number} is not valid JSON ({error}).{fix}") from error


_RENAME = " JSON Lines has one object per line; a file with one JSON document must be named .json."


def _is_array(name: str) -> InvalidData:
    kind = file_type(name)
    renamed = name[: len(name) - len(kind.suffix + kind.compression)] + ".json" + kind.compression
    return InvalidData(
        f"{name} is a JSON array and not JSON Lines, which has one object per line; rename it to {renamed}."
    )


def check_surrogates(row: object, text: str, choose: ChooseColumns, location: str) -> None:
    """Raise `InvalidData` if a required column of a row has an escaped surrogate without its other half.

    ``text`` is the JSON text of the row.
    """
    if "\\ud" not in text and "\\uD" not in text:
        return
    value = row
    if isinstance(row, Mapping):
        fields = cast("Mapping[str, object]", row)
        value = {name: fields[name] for name in choose(list(fields), ())}  # numbers contain no surrogates
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise InvalidData(
            f"{location} contains {half}, an unpaired surrogate; write the complete character."
        ) from error


def not_utf8(name: str, line: int, byte: int) -> InvalidData:
    return InvalidData(f"{name}, line {line} is not UTF-8 text (byte {byte:#04x}); save it as UTF-8.")
