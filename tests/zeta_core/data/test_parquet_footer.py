"""The sizes and positions in the footer of a Parquet file are compared with the file before pyarrow reads it."""

import random
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zeta_core.data.rows.parquet_footer import check_footer

I32, I64, LIST, STRUCT = 5, 6, 9, 12
DATA = bytes(1000)
Column = tuple[int, int]  # the position and the size of its data


def number(value: int) -> bytes:
    """A number with a sign, in zigzag order."""
    return unsigned((value << 1) ^ (value >> 63))


def unsigned(value: int) -> bytes:
    """A number in groups of seven bits."""
    out = b""
    while value >= 0x80:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def structure(*fields: tuple[int, int, bytes]) -> bytes:
    """Fields with number, type and value, each number in its long form."""
    return b"".join(bytes([kind]) + number(field) + value for field, kind, value in fields) + b"\0"


def structures(items: Sequence[bytes], *, claimed: int | None = None) -> bytes:
    size = len(items) if claimed is None else claimed
    return bytes([0xF0 | STRUCT]) + unsigned(size) + b"".join(items)


def footer(*groups: Sequence[Column], rows: int = 1, all_rows: int | None = None, claimed: int | None = None) -> bytes:
    """A footer whose row groups have these columns and ``rows`` rows each."""
    made = [
        structure(
            (1, LIST, structures([structure((3, STRUCT, column(begin, size))) for begin, size in group])),
            (2, I64, number(100)),
            (3, I64, number(rows)),
        )
        for group in groups
    ]
    total = rows * len(groups) if all_rows is None else all_rows
    return structure((1, I32, number(2)), (3, I64, number(total)), (4, LIST, structures(made, claimed=claimed)))


def column(begin: int, size: int) -> bytes:
    return structure((5, I64, number(1)), (6, I64, number(size)), (7, I64, number(size)), (9, I64, number(begin)))


def check(folder: Path, content: bytes, *, length: int | None = None) -> None:
    size = len(content) if length is None else length
    (folder / "a.parquet").write_bytes(b"PAR1" + DATA + content + size.to_bytes(4, "little") + b"PAR1")
    check_footer(folder / "a.parquet")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (footer([(4, -1)]), "claims -1 as size or position in row group 0"),
        (footer([(-4, 10)]), "claims -4 as size or position"),
        (footer([(4, 10)], rows=-5), "claims -5 as number of rows"),
        (footer([(4, 1001)]), "claims 1001 bytes from byte 4 on, but the data ends at byte 1004"),
        (footer([(2**62, 2**62)]), "claims 4611686018427387904 bytes"),
        (footer([(4, 600), (500, 100)]), "row group 0 overlaps other data at byte 500"),
        (footer([(4, 100)], [(4, 100)]), "row group 1 overlaps other data at byte 4"),
        (footer([(4, 10)], all_rows=2**40), "claims 1099511627776 rows, but its 1 row groups have 1"),
        (footer([(4, 10)], claimed=2**40), "claims 1099511627776 elements in"),
        (footer([(4, 10)])[:-9], "truncated"),
        (bytes([0x19]) * 60, "nested too deeply"),
        (bytes([0x18, 0xFF, 0x7F]), "claims a value of 16383 bytes, but only 0 follow"),
        (bytes([0x16]) + b"\xff" * 12, "more than 64 bits"),
        (bytes([0x1D]), "damaged"),
    ],
)
def test_a_footer_that_contradicts_its_file_is_rejected(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        check(tmp_path, content)


@pytest.mark.parametrize("length", [0xFFFFFFFF, 5000])
def test_a_footer_longer_than_its_file_is_rejected(length: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"claims a footer of {length} bytes; at most"):
        check(tmp_path, footer([(4, 10)]), length=length)


@pytest.mark.parametrize(
    "options",
    [{}, {"row_group_size": 7}, {"compression": "zstd", "use_dictionary": False}, {"write_page_index": True}],
)
def test_real_files_pass_and_damaged_ones_cause_no_other_error(options: dict[str, Any], tmp_path: Path) -> None:
    check(tmp_path, footer([(4, 100), (104, 900)]))
    file = tmp_path / "real.parquet"
    rows = [{"role": "user", "content": f"text {index}"} for index in range(50)]
    table = pa.table({"messages": [[row] for row in rows], "number": list(range(50)), "empty": [None] * 50})
    pq.write_table(table, file, **options)  # pyright: ignore[reportUnknownMemberType]
    check_footer(file)
    whole, generator = file.read_bytes(), random.Random(1)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[-generator.randrange(1, min(len(whole), 2000))] = generator.randrange(256)
        file.write_bytes(damaged)
        with suppress(ValueError):
            check_footer(file)
