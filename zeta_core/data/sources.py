"""From the sources of a spec to rows: pieces of text, conversations, pairs, or lists of token ids.

Trusted: nothing. A file is read as text, JSON, parquet or Arrow, never unpickled, and no data set's own code runs.
Every fault names the file as its sender called it and the line (or row), and is `InvalidData`. A source is read in
units of a quarter of a megabyte that are cheap to pass over, so that several processes can each parse a share of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import glob
from pathlib import Path
from typing import Any, cast

from zeta_core.contract.formats import ROW_SUFFIXES, TEXT_SUFFIXES, TOKEN_SUFFIXES
from zeta_core.contract.identifiers import is_hub_id
from zeta_core.contract.layout import file_key
from zeta_core.contract.sources import BuiltinSource, DatasetSource, FileSource, HubSource, PathSource
from zeta_core.data.rows import RowFormat, fault_in, format_of
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


@dataclass(frozen=True)
class Source:
    """One thing to read: ``name`` for people, ``fingerprint`` that changes with its content, and its units.

    ``size`` is in the measure of the units' ``position``: bytes, or rows. ``row_format`` is ``None`` until `told`.
    """

    name: str
    fingerprint: str
    size: int
    units: Callable[[], Iterator[Unit]] = field(repr=False)
    row_format: RowFormat | None = "text"
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    word: str = "row"
    flat: Path | None = None  # a flat file of ids, used where it lies
    num_bytes: int = 0  # about how much there is to tokenize
    number: int = 0  # of the spec's source that this is, or is a file of
    weight: float | None = None  # of that source

    def place(self, number: int) -> str:
        """Where a row is, for people; a text file is one place."""
        return f"{self.name}, {self.word} {number}" if number else self.name

    def told(self) -> Source:
        """This source with the format that ``auto`` means, found in its first row. Raises `InvalidData`."""
        if self.row_format is not None:
            return self
        first = next((row.fields for unit in self.units() for row in unit.rows()), None)
        found = format_of(first, self.columns) if isinstance(first, Mapping) else None
        return replace(self, row_format=found or "text")  # what is wrong with the row is told where it is read

    def fields(self, row: Row) -> dict[str, object]:
        """The columns of a row by our names. Raises `InvalidData` naming its place."""
        assert self.row_format is not None
        fault = fault_in(row.fields, self.row_format, self.columns)
        if fault is not None:
            raise InvalidData(f"{self.place(row.number)}: {fault}")
        return {**row.fields, **{name: row.fields.get(theirs) for name, theirs in self.columns.items()}}


@dataclass(frozen=True)
class Places:
    """Where sources may be found. ``data_root`` ``None`` lets ``path`` name any file (a script of the user's own)."""

    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    artifacts_root: Path | None = None
    data_root: Path | None = None
    any_path: bool = False
    hub: bool = True
    weights: bool = True  # off: of a model only its config and tokenizer are fetched, and it is built from the config


def open_sources(dataset: Sequence[DatasetSource], places: Places, *, pretokenized: bool) -> list[Source]:
    """Find every source and look at its outside; nothing but files' bytes (for the fingerprint) is read yet."""
    sources: list[Source] = []
    for number, source in enumerate(dataset):
        reader = _Reader(source, pretokenized or source.format == "tokens")
        match source:
            case BuiltinSource():
                found = [_python_docs()]
            case FileSource():
                found = [_uploaded(reader, file_id, places) for file_id in source.file_ids]
            case PathSource():
                found = [reader.open(file, file.name) for file in _matching(source.path, places, reader.suffixes)]
            case HubSource():
                found = [_from_hub(reader, source, places)]
        sources += [replace(one, number=number, weight=source.weight) for one in found]
    return sources


# --- Where sources are ------------------------------------------------------------------------------------------------


def _python_docs() -> Source:
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    rows = [Row(number, {"text": text}) for number, text in enumerate(texts, 1)]
    size = sum(map(len, texts))
    return Source("python-docs", digest, size, lambda: iter([Unit(lambda: iter(rows), size)]), num_bytes=size)


def _uploaded(reader: _Reader, file_id: str, places: Places) -> Source:
    known = places.files.get(file_id)
    if known is None or places.artifacts_root is None:
        raise InvalidData(f"dataset names {file_id}, which is not a file of this service; upload it and use its id.")
    path = places.artifacts_root / file_key(file_id)
    name = str(known.get("filename") or file_id)
    if not path.is_file():
        raise InvalidData(f"The file {name} ({file_id}) is no longer in the artifact store; upload it again.")
    return reader.open(path, name, sha256=cast("str | None", known.get("sha256")))


def _matching(pattern: str, places: Places, suffixes: Sequence[str]) -> list[Path]:
    """The files that a path, folder or glob means, in order of name. Links that leave the data root are refused."""
    if places.any_path:
        root, given = Path.cwd(), Path(pattern).expanduser()
    elif places.data_root is not None:
        root, given = places.data_root.resolve(), Path(pattern)
    else:
        raise InvalidData(f"dataset.path is {pattern!r}, but this worker opens no folder: set ZETA_DATA_ROOT on it.")
    base = root / given
    if base.is_dir():
        found = [path for path in sorted(base.rglob("*")) if path.suffix.lower() in suffixes and path.is_file()]
    elif base.is_file():  # also where its name looks like a pattern
        found = [base]
    else:
        found = [Path(path) for path in sorted(glob(str(base), recursive=True)) if Path(path).is_file()]
    if not places.any_path and any(not path.resolve().is_relative_to(root) for path in found):
        raise InvalidData(f"dataset.path is {pattern!r}, which leaves the data root; name a file inside it.")
    if not found:
        raise InvalidData(f"dataset.path is {pattern!r}, where no file is; name a {', '.join(suffixes)} file.")
    return found


def _from_hub(reader: _Reader, source: HubSource, places: Places) -> Source:
    if not places.hub:
        raise InvalidData(f"dataset.hub is {source.hub!r}, but ZETA_HUB is off here; upload the data as a file.")
    if not places.any_path and not is_hub_id(source.hub):  # `datasets` would read a folder of that name
        raise InvalidData(f"dataset.hub is {source.hub!r}, which is no Hub id; give 'name' or 'org/name'.")
    from datasets import load_dataset

    try:
        loaded = load_dataset(source.hub, source.config, split=source.split, revision=source.revision)
    except Exception as error:
        raise InvalidData(f"The data set {source.hub!r} ({source.split}) cannot be loaded: {error}") from error
    rows: Any = loaded
    fingerprint = str(getattr(rows, "_fingerprint", source.revision))
    fingerprint = f"{fingerprint} {source.format} {json.dumps(source.columns, sort_keys=True)}"
    return Source(
        source.hub,
        fingerprint,
        len(rows),
        lambda: _hub_units(rows),
        reader.row_format,
        source.columns,
        num_bytes=int(getattr(rows.data, "nbytes", 0)),
    )


def _hub_units(rows: Any) -> Iterator[Unit]:
    for first in range(0, len(rows), _UNIT_ROWS):
        last = min(len(rows), first + _UNIT_ROWS)

        def load(first: int = first, last: int = last) -> Iterator[Row]:
            columns: dict[str, list[Any]] = rows[first:last]
            values = zip(*map(_without_empty_fields, columns.values()), strict=True)
            return (Row(number, dict(zip(columns, row, strict=True))) for number, row in enumerate(values, first + 1))

        yield Unit(load, last)


# --- What is inside ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reader:
    """Reads files as one source of the spec says: its format, its names of columns."""

    source: DatasetSource
    pretokenized: bool

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The endings of the files that can be read as what is wanted: token ids, rows, or text."""
        if self.pretokenized:
            return (*ROW_SUFFIXES, *TOKEN_SUFFIXES)
        return ROW_SUFFIXES if self.row_format not in (None, "text") else (*ROW_SUFFIXES, *TEXT_SUFFIXES)

    @property
    def row_format(self) -> RowFormat | None:
        """The format as the spec says it; ``None`` where the first row tells."""
        if self.pretokenized:
            return "tokens"
        return None if self.source.format == "auto" else self.source.format

    def open(self, path: Path, name: str, *, sha256: str | None = None) -> Source:
        size = path.stat().st_size
        if size == 0:
            raise InvalidData(f"{name} is empty; give a file with at least one document.")
        suffix = Path(name).suffix.lower()
        if suffix not in self.suffixes:
            kind = "tokens as " if self.pretokenized else f"{self.row_format} as " if self.row_format else ""
            raise InvalidData(f"{name} has no known format; give {kind}{', '.join(self.suffixes)}.")
        sha256 = sha256 or _sha256(path)
        if suffix in TOKEN_SUFFIXES:
            return Source(name, f"{sha256} {suffix}", size, lambda: iter(()), "tokens", flat=path)
        columns = self.source.columns
        about = f"{sha256} {suffix} {self.row_format} {json.dumps(columns, sort_keys=True)}"
        units: Callable[[], Iterator[Unit]]
        if suffix in TEXT_SUFFIXES:
            return Source(name, about, size, lambda: _text_units(path, name, size), num_bytes=size)
        if suffix == ".jsonl":
            word, measure, units = "line", size, lambda: _json_units(path, name)
        else:
            batches = _parquet_batches if suffix == ".parquet" else _arrow_batches
            word, measure, units = "row", _num_rows(path, name, suffix), lambda: _table_units(batches(path, name))
        return Source(name, about, measure, units, self.row_format, columns, word, num_bytes=size)


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


def _text_units(path: Path, name: str, size: int) -> Iterator[Unit]:
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


def _json_units(path: Path, name: str) -> Iterator[Unit]:
    for first, block, position in _blocks(path):

        def load(first: int = first, block: bytes = block) -> Iterator[Row]:
            for number, raw in enumerate(block.split(b"\n"), first):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                    if line:
                        yield Row(number, json.loads(line))
                except UnicodeDecodeError as error:
                    raise _not_utf8(name, number, raw[error.start]) from error
                except (ValueError, RecursionError) as error:
                    raise InvalidData(f"{name}, line {number}: is not JSON ({error}).") from error

        yield Unit(load, position)


def _table_units(batches: Iterator[Any]) -> Iterator[Unit]:
    position = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _UNIT_ROWS):
            part = batch.slice(start, _UNIT_ROWS)

            def load(part: Any = part, first: int = position + 1) -> Iterator[Row]:
                columns = {name: _without_empty_fields(values) for name, values in part.to_pydict().items()}
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


def _num_rows(path: Path, name: str, suffix: str) -> int:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    if suffix != ".parquet":
        return sum(batch.num_rows for batch in _arrow_batches(path, name))
    try:
        return parquet.ParquetFile(path).metadata.num_rows
    except pa.ArrowException as error:
        raise InvalidData(f"{name} is not readable as parquet: {error}") from error


def _parquet_batches(path: Path, name: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        yield from parquet.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False).iter_batches(
            batch_size=4 * _UNIT_ROWS
        )
    except pa.ArrowException as error:
        raise InvalidData(f"{name} is not readable as parquet: {error}") from error


def _arrow_batches(path: Path, name: str) -> Iterator[Any]:
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _not_utf8(name: str, line: int, byte: int) -> InvalidData:
    return InvalidData(f"{name}, line {line}: is not UTF-8 text (byte {byte:#04x}); save it as UTF-8.")
