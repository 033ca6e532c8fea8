"""Reading rows from text and JSON files, in units of 256 KiB that are cheap to skip.

Several processes can each parse a share of the units. All data is untrusted. Errors are `InvalidData` and name the
original file name and the line. `zeta_core.data.tables` reads tables.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from zeta_core.failures import InvalidData

UNIT_BYTES = 1 << 18  # small relative to a process's share, so the processes have about equal work
LONGEST_LINE = 1 << 22  # in a text file; a longer line is split
LONGEST_ROW = 1 << 28  # in a JSON Lines file, where a line is parsed as a whole


@dataclass(frozen=True)
class Row:
    """One row or line, numbered from 1; or a part of a text file (number 0), which is a single document."""

    number: int
    fields: Mapping[str, object]
    ends_document: bool = True
    begins_document: bool = True


@dataclass(frozen=True)
class Unit:
    """Some rows, which are parsed only on request; ``position`` is the position in the source after them."""

    rows: Callable[[], Iterator[Row]]
    position: int


def _blocks(path: Path, *, longest_line: int) -> Iterator[tuple[int, bytes, int]]:
    """Split a file into (number of the first line, complete lines of about `UNIT_BYTES`, position after them).

    If the last line of a block continues for more than ``longest_line`` bytes, the rest becomes another block.
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
    """The block up to the last space, or at least up to an incomplete character."""
    at = block.rfind(b" ")
    if at > 0:
        return block[:at]
    end = len(block)
    while end and len(block) - end < 4 and (block[end - 1] & 0xC0) == 0x80:
        end -= 1
    begun = end - 1 if block[end - 1] >= 0xC0 else end
    return block[:begun] or block


def text_units(path: Path, name: str, size: int) -> Iterator[Unit]:
    """Read a text file as one document, in pieces that end at a line end, or at a word if a line is very long."""
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


def json_units(path: Path, name: str, size: int) -> Iterator[Unit]:
    for first, block, position in _blocks(path, longest_line=LONGEST_ROW):
        if position < size and not block.endswith(b"\n"):
            line = first + block.count(b"\n")
            raise InvalidData(
                f"{name}, line {line}: is longer than {LONGEST_ROW >> 20} MiB, the limit for one row; split the row."
            )

        def load(first: int = first, block: bytes = block) -> Iterator[Row]:
            for number, raw in enumerate(block.split(b"\n"), first):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                    if line:
                        row = json.loads(line)
                        if "\\ud" in line or "\\uD" in line:  # an escaped surrogate, which may be unpaired
                            json.dumps(row, ensure_ascii=False).encode()
                        yield Row(number, row)
                except UnicodeDecodeError as error:
                    raise _not_utf8(name, number, raw[error.start]) from error
                except UnicodeEncodeError as error:
                    half = f"\\u{ord(error.object[error.start]):04x}"
                    raise InvalidData(
                        f"{name}, line {number}: contains {half}, an unpaired surrogate; write the complete character."
                    ) from error
                except (ValueError, RecursionError) as error:
                    raise InvalidData(f"{name}, line {number}: is not valid JSON ({error}).") from error

        yield Unit(load, position)


def rows_between(units: Iterator[Unit], first: int, last: int) -> Iterator[Unit]:
    """The units with only those rows whose numbers are greater than ``first`` and at most ``last``."""
    is_complete = False
    for unit in units:
        if is_complete:
            return

        def load(unit: Unit = unit) -> Iterator[Row]:
            nonlocal is_complete
            for row in unit.rows():
                if row.number > last:
                    is_complete = True
                    return
                if row.number > first:
                    yield row

        yield Unit(load, unit.position)


def _not_utf8(name: str, line: int, byte: int) -> InvalidData:
    return InvalidData(f"{name}, line {line}: is not UTF-8 text (byte {byte:#04x}); save it as UTF-8.")
