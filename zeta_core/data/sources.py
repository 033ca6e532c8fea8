"""From the sources of a spec to rows: pieces of text, conversations, pairs, or lists of token ids.

Trusted: nothing. A file is read as text, JSON, parquet or Arrow, never unpickled, and no data set's own code runs.
The rows of a file are decoded only in a confined process (`zeta_core.data.confined`), also the first one, which tells
the format. Every fault names the file as its sender called it and the line (or row), and is `InvalidData`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, cast

from zeta_core.contract.data_folder import Split, find_data_files, split_glob
from zeta_core.contract.formats import TEXT_SUFFIXES, TOKEN_SUFFIXES, suffixes_of
from zeta_core.contract.layout import file_key
from zeta_core.contract.sources import BuiltinSource, DatasetSource, FileSource, HubSource, PathSource
from zeta_core.data.confined import Position, confined
from zeta_core.data.rows import RowFormat, fault_in, format_of
from zeta_core.data.tables import arrow_batches, hub_units, num_rows, parquet_batches, table_units
from zeta_core.data.units import Row, Unit, json_units, text_units
from zeta_core.failures import InvalidData


@dataclass(frozen=True)
class Source:
    """One thing to read: ``name`` for people, ``fingerprint`` that changes with its content, and its units.

    ``size`` is in the measure of the units' ``position``: bytes, or rows. ``row_format`` is ``None`` until `told`, and
    ``first_format`` is the format that the first row has (``None``: none of them).
    """

    name: str
    fingerprint: str
    size: int
    units: Callable[[], Iterator[Unit]] = field(repr=False)
    row_format: RowFormat | None = "text"
    first_format: RowFormat | None = None
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    word: str = "row"
    flat: Path | None = None  # a flat file of ids, used where it lies
    measure: Callable[[], int] | None = field(default=None, repr=False)  # of a file with rows: finds its ``size``
    num_bytes: int = 0  # about how much there is to tokenize
    number: int = 0  # of the spec's source that this is, or is a file of
    weight: float | None = None  # of that source

    def place(self, number: int) -> str:
        """Where a row is, for people; a text file is one place."""
        return f"{self.name}, {self.word} {number}" if number else self.name

    def after(self, position: int) -> str:
        """Where units are read next, for people, with what makes a small file of large rows understandable."""
        if self.word == "row":
            return f"{self.name} ({self.num_bytes:,} bytes, {self.size:,} rows), from row {position + 1}"
        return f"{self.name}, after {position:,} of {self.num_bytes:,} bytes" if position else self.name

    def told(self) -> Source:
        """This source with the format that ``auto`` means."""
        # What is wrong with a first row of no format is reported where it is read.
        return replace(self, row_format=self.row_format or self.first_format or "text")

    @property
    def says_what_is_told(self) -> bool:
        """Whether ``auto`` would mean the same format here, so that saying it makes no other data of it."""
        if self.row_format in (None, "tokens"):  # no row tells the latter
            return self.row_format is None
        return (self.first_format or "text") == self.row_format

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


def open_sources(
    dataset: Sequence[DatasetSource],
    places: Places,
    *,
    pretokenized: bool,
    split: Split = "train",
    on_folder: Callable[[str], None] = lambda _: None,
) -> list[Source]:
    """Find every source, and the number and format of its rows. Raises `InvalidData`.

    ``split`` is what the data is for: files of the other split in a folder are skipped. ``on_folder`` receives a
    sentence with the files of each folder or glob that are used and skipped.
    """
    sources: list[Source] = []
    for number, source in enumerate(dataset):
        reader = _Reader(source, pretokenized or source.format == "tokens")
        match source:
            case BuiltinSource():
                found = [_python_docs()]
            case FileSource():
                found = reader.looked_into([_uploaded(reader, file_id, places) for file_id in source.file_ids])
            case PathSource():
                files = _matching(source.path, places, reader.suffixes, split, on_folder)
                found = reader.looked_into([reader.open(file, file.name) for file in files])
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


def _matching(
    pattern: str, places: Places, suffixes: Sequence[str], split: Split, on_folder: Callable[[str], None]
) -> list[Path]:
    """The files that a path, folder or glob means, in order of name. Links that leave the data root are refused."""
    if places.any_path:
        root, given = Path.cwd(), Path(pattern).expanduser()
    elif places.data_root is not None:
        root, given = places.data_root.resolve(), Path(pattern)
    else:
        raise InvalidData(f"dataset.path is {pattern!r}, but this worker opens no folder: set ZETA_DATA_ROOT on it.")
    boundary = None if places.any_path else root
    base, rest = root / given, None
    try:
        if not base.exists():
            prefix, rest = split_glob(str(given))
            base = root / prefix
        if boundary is not None and not base.resolve().is_relative_to(boundary):
            raise _leaves(pattern)
        if rest is None and base.is_file():  # also where its name looks like a pattern
            return [base]
        if not base.is_dir():
            raise _no_file(pattern, suffixes)
        found = find_data_files(base, suffixes, split=split, pattern=rest, boundary=boundary)
    except OSError as error:
        raise InvalidData(f"dataset.path is {pattern!r}, which cannot be read: {error.strerror}.") from error
    if found.leaves_boundary:
        raise _leaves(pattern)
    if not found.used:
        raise _no_file(pattern, suffixes, found.skipped_summary())
    on_folder(found.summary(pattern))
    return list(found.used)


def _leaves(pattern: str) -> InvalidData:
    return InvalidData(f"dataset.path is {pattern!r}, which leaves the data root; name a file inside it.")


def _no_file(pattern: str, suffixes: Sequence[str], skipped: str = "") -> InvalidData:
    found = f"dataset.path is {pattern!r}, where no data file is; name a {', '.join(suffixes)} file."
    return InvalidData(f"{found} {skipped}".rstrip())


def _from_hub(reader: _Reader, source: HubSource, places: Places) -> Source:
    if not places.hub:
        raise InvalidData(f"dataset.hub is {source.hub!r}, but ZETA_HUB is off here; upload the data as a file.")
    if Path(source.hub).exists():  # `datasets` would read it
        raise InvalidData(
            f"dataset.hub is {source.hub!r}, which is also a folder here; rename the folder, or give its files as "
            '{"path": …}.'
        )
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(source.hub, source.config, revision=source.revision)
        refuse_foreign_files(getattr(cast(Any, builder).config, "data_files", None) or {}, source.hub)
        builder.download_and_prepare()
        loaded = builder.as_dataset(split=source.split)
    except InvalidData:
        raise
    except Exception as error:
        raise InvalidData(f"The data set {source.hub!r} ({source.split}) cannot be loaded: {error}") from error
    rows: Any = loaded
    opened = Source(
        source.hub,
        "",
        len(rows),
        lambda: hub_units(rows, source.hub),
        reader.row_format,
        columns=source.columns,
        num_bytes=int(getattr(rows.data, "nbytes", 0)),
    )
    [found] = _with_first_rows([opened])
    said = "auto" if found.says_what_is_told else source.format
    content = str(getattr(rows, "_fingerprint", source.revision))
    return replace(found, fingerprint=f"{content} {said} {_renamed(source.columns)}")


def refuse_foreign_files(data_files: Mapping[str, Sequence[str]], hub: str) -> None:
    """Raise `InvalidData` where the data set's own card names files outside it, which may be this machine's."""
    for file in (str(name) for names in data_files.values() for name in names):
        if not file.startswith(f"hf://datasets/{hub}@") or ".." in PurePosixPath(file).parts or "::/" in file:
            raise InvalidData(f"The data set {hub!r} names {file!r}, which is not one of its own files; use another.")


# --- What is inside ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reader:
    """Reads files as one source of the spec says: its format, its names of columns."""

    source: DatasetSource
    pretokenized: bool

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The suffixes of the files that can be read as what is wanted: token ids, rows, or text."""
        return suffixes_of(self.row_format, pretokenized=self.pretokenized)

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
        units: Callable[[], Iterator[Unit]]
        measure: Callable[[], int]
        if suffix in TEXT_SUFFIXES:
            about = f"{sha256} {suffix} None {_renamed(columns)}"
            return Source(name, about, size, lambda: text_units(path, name, size), num_bytes=size)
        if suffix == ".jsonl":
            word, measure, units = "line", lambda: size, lambda: json_units(path, name, size)
        else:
            batches = parquet_batches if suffix == ".parquet" else arrow_batches
            word, units = "row", lambda: table_units(batches(path, name), name)
            measure = lambda: num_rows(path, name, suffix)  # noqa: E731 - as for `units`
        return Source(
            name,
            f"{sha256} {suffix}",
            0,
            units,
            self.row_format,
            columns=columns,
            word=word,
            num_bytes=size,
            measure=measure,
        )

    def looked_into(self, opened: list[Source]) -> list[Source]:
        """What `open` opened, files with rows completed by what only their rows tell."""
        complete = iter(_with_first_rows([source for source in opened if source.measure is not None]))
        return [source if source.measure is None else self._with_fingerprint(next(complete)) for source in opened]

    def _with_fingerprint(self, source: Source) -> Source:
        """Naming the format that ``auto`` means anyway does not change the fingerprint."""
        named = None if source.says_what_is_told else self.row_format
        return replace(source, fingerprint=f"{source.fingerprint} {named} {_renamed(source.columns)}")


def _with_first_rows(sources: list[Source]) -> list[Source]:
    """The sources with the number of their rows and the format of the first one, found in a confined process."""

    def look(position: Position) -> list[tuple[int, RowFormat | None]]:
        return [_size_and_format(source, position) for source in sources]

    looks: list[tuple[int, RowFormat | None]] = confined(look) if sources else []
    return [
        replace(source, size=size, first_format=first_format)
        for source, (size, first_format) in zip(sources, looks, strict=True)
    ]


def _size_and_format(source: Source, position: Position) -> tuple[int, RowFormat | None]:
    position.move(source.name, "reading")
    size = source.size if source.measure is None else source.measure()
    if source.row_format == "tokens":  # its first row does not matter
        return size, None
    position.move(replace(source, size=size).after(0), "reading")
    first = next((row.fields for unit in source.units() for row in unit.rows()), None)
    return size, format_of(first, source.columns) if isinstance(first, Mapping) else None


def _renamed(columns: Mapping[str, str]) -> str:
    """The names of columns that are not ours already, as a text."""
    return json.dumps({ours: theirs for ours, theirs in columns.items() if ours != theirs}, sort_keys=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
