"""Choosing the reader of a file with rows by its suffix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from zeta_core.contract.data_files.file_types import DELIMITERS, LINE_SUFFIXES, file_type
from zeta_core.contract.spec.sources import COLUMNS
from zeta_core.data.delimited import delimited_units
from zeta_core.data.json_documents import document_units
from zeta_core.data.tables import arrow_batches, num_rows, parquet_batches, table_units
from zeta_core.data.units import ChooseColumns, Unit, json_units


@dataclass(frozen=True)
class FileRows:
    """How to read the rows of a file. ``word`` is the unit that row numbers count, such as line or row.

    ``count`` determines the number of rows. It is ``None`` if counting requires reading the file; positions are then in
    bytes.
    """

    word: str
    read: Callable[[ChooseColumns], Iterator[Unit]]
    count: Callable[[], int] | None = None


def rows_of_file(path: Path, name: str) -> FileRows:
    suffix = file_type(name).suffix
    if suffix in LINE_SUFFIXES:
        return FileRows("line", lambda choose: json_units(path, name, choose))
    if suffix == ".json":
        return FileRows("row", lambda choose: document_units(path, name, COLUMNS, choose))
    if suffix in DELIMITERS:
        return FileRows("row", lambda choose: delimited_units(path, name, choose))
    batches = parquet_batches if suffix == ".parquet" else arrow_batches
    return FileRows(
        "row", lambda choose: table_units(batches(path, name, choose), name), count=lambda: num_rows(path, name, suffix)
    )
