"""Opening the data sources of a spec as rows: pieces of text, conversations, pairs, or lists of token ids.

All data is untrusted. Files are read as text, JSON, Parquet or Arrow and never unpickled, and code in datasets is never
run. Rows are decoded only in a sandboxed process (`zeta_core.data.sandbox`), including the first row, which determines
the format. Errors are `InvalidData` and name the original file name and the line or row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from zeta_core.contract.data_files.file_types import (
    DELIMITERS,
    LINE_SUFFIXES,
    TEXT_SUFFIXES,
    TOKEN_SUFFIXES,
    file_suffixes,
    file_type,
    listed,
)
from zeta_core.contract.data_files.signatures import FIRST_BYTES, fault_in_first_bytes
from zeta_core.contract.spec.sources import COLUMNS, BuiltinSource, DatasetSource, FileSource, HubSource, PathSource
from zeta_core.contract.wire.run_directory import file_key
from zeta_core.data.rows.columns import Layout, detect_layout
from zeta_core.data.rows.csv_files import csv_units
from zeta_core.data.rows.formats import RowFormat
from zeta_core.data.rows.json_documents import document_units
from zeta_core.data.rows.row import ChooseColumns, Row, Unit, rows_between
from zeta_core.data.rows.shapes import SHAPES
from zeta_core.data.rows.tables import arrow_batches, num_rows, parquet_batches, table_units
from zeta_core.data.rows.text_files import json_units, text_units
from zeta_core.data.sandbox import Position, run_in_sandbox
from zeta_core.data.sources.hub import HubDataset, fetch_dataset
from zeta_core.data.sources.locations import SourceLocations
from zeta_core.data.sources.source import Source
from zeta_core.failures import InvalidData
from zeta_core.system.data_folder import Split, find_data_files, split_glob
from zeta_core.system.file_hash import file_sha256


def open_sources(
    dataset: Sequence[DatasetSource],
    locations: SourceLocations,
    *,
    pretokenized: bool,
    method: str = "sft",
    split: Split = "train",
    on_folder: Callable[[str], None] = lambda _: None,
) -> list[Source]:
    """Open every source, and determine the number and format of its rows. Raises `InvalidData`.

    ``method`` decides which format ``auto`` means if a row fits several. In a folder, files of the other ``split`` are
    skipped. ``on_folder`` is called for each folder or glob with a message that lists the used and skipped files.
    """
    name = "dataset" if split == "train" else "eval_dataset"
    sources: list[Source] = []
    for number, source in enumerate(dataset):
        at = name if len(dataset) == 1 else f"{name}.{number}"
        reader = _Reader(source, pretokenized or source.format == "tokens", method, at)
        match source:
            case BuiltinSource():
                found = [_python_docs()]
            case FileSource():
                found = reader.measured([_uploaded(reader, file_id, locations) for file_id in source.file_ids])
            case PathSource():
                files = _matching(source.path, locations, reader.suffixes, split, on_folder)
                found = reader.measured([reader.open(file, file.name) for file in files])
            case HubSource():
                found = _from_hub(reader, source, locations)
        option = "columns" if source.columns else "drop_columns" if source.drop_columns else None
        if option is not None and not any(opened.columns or opened.drop_columns for opened in found):
            raise InvalidData(f"{at}.{option} is given, but the data has no columns; remove it.")
        sources += [_as_requested(opened, source, number) for opened in found]
    return sources


def _as_requested(opened: Source, source: DatasetSource, number: int) -> Source:
    """An opened source with the settings of the spec that do not depend on its kind."""
    fingerprint = opened.fingerprint
    if source.drop_columns:
        fingerprint += f" without columns {json.dumps(sorted(set(source.drop_columns)))}"
    if source.drop_fields:
        fingerprint += f" without {json.dumps(sorted(set(source.drop_fields)))}"
    if source.allow_control_tokens:
        fingerprint += " with control tokens"
    return replace(
        opened,
        number=number,
        weight=source.weight,
        fingerprint=fingerprint,
        drop_fields=tuple(source.drop_fields),
        allow_control_tokens=source.allow_control_tokens,
    )


# --- Locating sources -------------------------------------------------------------------------------------------------


def _python_docs() -> Source:
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    rows = [Row(number, {"text": text}) for number, text in enumerate(texts, 1)]
    size = sum(map(len, texts))
    return Source("python-docs", digest, size, lambda _: iter([Unit(lambda: iter(rows), size)]), num_bytes=size)


def _uploaded(reader: _Reader, file_id: str, locations: SourceLocations) -> Source:
    upload = locations.files.get(file_id)
    if upload is None or locations.artifacts_root is None:
        raise InvalidData(f"dataset names {file_id}, which does not exist in this service; upload the file again.")
    path = locations.artifacts_root / file_key(file_id)
    name = upload.filename
    if not path.is_file():
        raise InvalidData(f"The file {name} ({file_id}) is no longer in the artifact store; upload it again.")
    return reader.open(path, name, content=upload.sha256)


def _matching(
    pattern: str, locations: SourceLocations, suffixes: Sequence[str], split: Split, on_folder: Callable[[str], None]
) -> list[Path]:
    """The files that a path, folder or glob selects, sorted by name. Links that leave the data root are rejected."""
    if locations.any_path:
        root, path = Path.cwd(), Path(pattern).expanduser()
    elif locations.data_root is not None:
        root, path = locations.data_root.resolve(), Path(pattern)
    else:
        raise InvalidData(
            f"dataset.path is {pattern!r}, but this worker has no data folder; set ZETA_DATA_ROOT on the worker."
        )
    boundary = None if locations.any_path else root
    base, rest = root / path, None
    try:
        if not base.exists():
            prefix, rest = split_glob(str(path))
            base = root / prefix
        if boundary is not None and not base.resolve().is_relative_to(boundary):
            raise _leaves(pattern)
        if rest is None and base.is_file():  # even if its name looks like a pattern
            return [base]
        if not base.is_dir():
            raise _no_file(pattern, suffixes)
        files = find_data_files(base, suffixes, split=split, pattern=rest, boundary=boundary)
    except OSError as error:
        raise InvalidData(f"dataset.path is {pattern!r}, which cannot be read: {error.strerror}.") from error
    if files.leaves_boundary:
        raise _leaves(pattern)
    if not files.used:
        raise _no_file(pattern, suffixes, files.skipped_summary())
    on_folder(files.summary(pattern))
    return list(files.used)


def _leaves(pattern: str) -> InvalidData:
    return InvalidData(f"dataset.path is {pattern!r}, which is outside the data root; name a file inside it.")


def _no_file(pattern: str, suffixes: Sequence[str], skipped: str = "") -> InvalidData:
    problem = f"dataset.path is {pattern!r}, which matches no data file; name a {listed(suffixes)} file."
    return InvalidData(f"{problem} {skipped}".rstrip())


def _from_hub(reader: _Reader, source: HubSource, locations: SourceLocations) -> list[Source]:
    if not locations.allow_hub:
        raise InvalidData(f"dataset.hub is {source.hub!r}, but ZETA_HUB is off here; upload the data as a file.")
    if Path(source.hub).exists():  # `datasets` would read it
        raise InvalidData(
            f"dataset.hub is {source.hub!r}, which is also a local folder; rename the folder, or refer to its files "
            'with {"path": …}.'
        )
    dataset = fetch_dataset(source, reader.suffixes)
    splits = {
        split: reader.measured([reader.open(file.path, file.name, content=file.origin) for file in files])
        for split, files in dataset.files.items()
    }
    if dataset.is_sliced:
        return _sliced(source, dataset, splits)
    return [file for split in dataset.splits for file in splits[split]]


def _sliced(source: HubSource, dataset: HubDataset, splits: Mapping[str, Sequence[Source]]) -> list[Source]:
    """The requested slices of the splits. Rows keep their numbers; in JSON Lines files, these are line numbers."""
    if text := next((file for opened in splits.values() for file in opened if file.measure is None), None):
        raise InvalidData(
            f"dataset.split is {source.split!r}, but {text.name} is a text file, which is one document without rows; "
            "request the whole split."
        )
    num_rows: dict[str, list[int]] = run_in_sandbox(
        lambda position: {split: [_last_row(file, position) for file in opened] for split, opened in splits.items()}
    )
    selected: list[Source] = []
    for split, first, last in dataset.slices({split: sum(each) for split, each in num_rows.items()}):
        before = 0  # rows of the split's earlier files
        for file, num in zip(splits[split], num_rows[split], strict=True):
            start, end = max(first - before, 0), min(last - before, num)
            if start < end:
                selected.append(file if (start, end) == (0, num) else _with_rows(file, start, end))
            before += num
    if not selected:
        raise InvalidData(f"dataset.split is {source.split!r}, which contains no rows; request a larger slice.")
    return selected


def _last_row(source: Source, position: Position) -> int:
    """The number of the source's last row."""
    if source.in_rows:
        return source.size
    last = 0
    for unit in source.units():
        position.move(source.after(unit.position), "reading")
        last = max((row.number for row in unit.rows()), default=last)
    return last


def _with_rows(source: Source, first: int, last: int) -> Source:
    def read(choose: ChooseColumns) -> Iterator[Unit]:
        return rows_between(source.read(choose), first, last)

    return replace(source, read=read, fingerprint=f"{source.fingerprint} rows {first}:{last}")


# --- Reading files ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reader:
    """Opens the files of one source of the spec, with its format and column names."""

    source: DatasetSource
    pretokenized: bool
    method: str
    at: str

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The suffixes of the files that can contain data in this format."""
        return file_suffixes(self.row_format, pretokenized=self.pretokenized)

    @property
    def row_format(self) -> RowFormat | None:
        """The format that the spec names, or ``None`` if the first row determines it."""
        if self.pretokenized:
            return "tokens"
        return None if self.source.format == "auto" else self.source.format

    def open(self, path: Path, name: str, *, content: str | None = None) -> Source:
        """Open a file. ``content`` identifies its content; by default, that is its SHA-256."""
        size = path.stat().st_size
        if size == 0:
            raise InvalidData(f"{name} is empty; provide a file with at least one document.")
        suffix = file_type(name).suffix
        if suffix not in self.suffixes:
            kind = "tokens as " if self.pretokenized else f"{self.row_format} as " if self.row_format else ""
            raise InvalidData(f"{name} is not a supported file type; provide {kind}{listed(self.suffixes)}.")
        with path.open("rb") as file:
            if fault := fault_in_first_bytes(name, file.read(FIRST_BYTES)):
                raise InvalidData(f"{name} {fault}")
        content = content or file_sha256(path)
        columns, dtype = self.source.columns, self.source.dtype
        if suffix in TOKEN_SUFFIXES:
            if columns:
                raise InvalidData(f"{name} is a flat file of ids without columns; remove dataset.columns.")
            return Source(name, f"{content} {suffix}", size, lambda _: iter(()), "tokens", flat=path, dtype=dtype)
        if dtype is not None:
            raise InvalidData(f"dataset.dtype is {dtype!r}, but {name} is not a .bin file of ids; remove dtype.")
        if suffix in TEXT_SUFFIXES:
            fingerprint = f"{content} {suffix} None {_renamed(columns)}"
            return Source(
                name, fingerprint, size, lambda _: text_units(path, name), num_bytes=size, is_one_document=True
            )
        rows = _rows_of_file(path, name)
        return Source(
            name,
            f"{content} {suffix}",
            0,
            rows.read,
            self.row_format,
            columns=columns,
            drop_columns=frozenset(self.source.drop_columns),
            at=self.at,
            word=rows.word,
            in_rows=rows.count is not None,
            num_bytes=size,
            measure=rows.count or (lambda: size),
        )

    def measured(self, opened: list[Source]) -> list[Source]:
        """The opened sources, with the size and format of files with rows, which only decoding them reveals."""
        complete = iter(_with_first_rows([source for source in opened if source.measure is not None], self.method))
        return [source if source.measure is None else self._with_fingerprint(next(complete)) for source in opened]

    def _with_fingerprint(self, source: Source) -> Source:
        """Complete the fingerprint. Naming the format that ``auto`` detects does not change it."""
        named = None if source.has_detected_format else self.row_format
        return replace(source, fingerprint=f"{source.fingerprint} {named} {_renamed(source.columns)}")


def _with_first_rows(sources: list[Source], method: str) -> list[Source]:
    """The sources with their number of rows and the layout of the first row, determined in a sandboxed process."""

    def inspect(position: Position) -> list[_FirstRow]:
        return [_inspect(source, method, position) for source in sources]

    found_rows: list[_FirstRow] = run_in_sandbox(inspect) if sources else []
    measured: list[Source] = []
    for source, (size, first_format, row_format, shape) in zip(sources, found_rows, strict=True):
        layout = None if row_format is None else Layout(row_format, None if shape is None else SHAPES[shape])
        measured.append(replace(source, size=size, first_format=first_format, layout=layout))
    return measured


# The size of a source, the format that `auto` means, and the format and the name of the shape of its first row.
_FirstRow = tuple[int, RowFormat | None, RowFormat | None, str | None]


def _inspect(source: Source, method: str, position: Position) -> _FirstRow:
    position.move(source.name, "reading")
    size = source.size if source.measure is None else source.measure()
    if source.row_format == "tokens":  # the first row is not needed
        return size, None, "tokens", None
    position.move(replace(source, size=size).after(0), "reading")
    first = next((row.fields for unit in source.units() for row in unit.rows()), None)
    if not isinstance(first, Mapping):
        return size, None, None, None
    detected = detect_layout(first, source.columns, None, method)
    layout = detected if source.row_format is None else detect_layout(first, source.columns, source.row_format, method)
    first_format = None if detected is None else detected.row_format
    if layout is None:
        return size, first_format, None, None
    return size, first_format, layout.row_format, None if layout.shape is None else layout.shape.name


def _renamed(columns: Mapping[str, str]) -> str:
    """The columns with a name other than the standard one, as text."""
    return json.dumps({ours: theirs for ours, theirs in columns.items() if ours != theirs}, sort_keys=True)


@dataclass(frozen=True)
class _FileRows:
    """How to read the rows of a file. ``word`` is the unit that row numbers count, such as line or row.

    ``count`` determines the number of rows. It is ``None`` if counting requires reading the file; positions are then in
    bytes.
    """

    word: str
    read: Callable[[ChooseColumns], Iterator[Unit]]
    count: Callable[[], int] | None = None


def _rows_of_file(path: Path, name: str) -> _FileRows:
    """Choose the reader of a file with rows by its suffix."""
    suffix = file_type(name).suffix
    if suffix in LINE_SUFFIXES:
        return _FileRows("line", lambda choose: json_units(path, name, choose))
    if suffix == ".json":
        return _FileRows("row", lambda choose: document_units(path, name, COLUMNS, choose))
    if suffix in DELIMITERS:
        return _FileRows("row", lambda choose: csv_units(path, name, choose))
    batches = parquet_batches if suffix == ".parquet" else arrow_batches
    return _FileRows(
        "row", lambda choose: table_units(batches(path, name, choose), name), count=lambda: num_rows(path, name, suffix)
    )
