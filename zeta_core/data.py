"""From the sources of a spec to documents: pieces of text, or rows of token ids.

Trusted: nothing. A file is read as text, JSON, parquet or Arrow, never unpickled, and no data set's own code runs.
Every fault names the file as its sender called it and the line (or row), and is `InvalidData`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any, cast

from zeta_core.contract.formats import ROW_SUFFIXES, TEXT_SUFFIXES, TOKEN_SUFFIXES
from zeta_core.contract.identifiers import is_hub_id
from zeta_core.contract.layout import file_key
from zeta_core.contract.spec import BuiltinSource, DatasetSource, FileSource, HubSource, PathSource
from zeta_core.failures import InvalidData

_PIECE_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Piece:
    """A stretch of one document: ``text``, or ``ids`` where the data is tokenized; the last piece ends it."""

    text: str = ""
    ids: Sequence[int] | None = None
    ends_document: bool = True


@dataclass(frozen=True)
class Source:
    """One thing to read: ``name`` for people, ``fingerprint`` that changes with its content, and its pieces."""

    name: str
    fingerprint: str
    pieces: Callable[[], Iterator[Piece]] = field(repr=False)
    holds_ids: bool = False
    flat: Path | None = None  # a flat file of ids, used where it lies


@dataclass(frozen=True)
class Places:
    """Where sources may be found. ``data_root`` ``None`` lets ``path`` name any file (a script of the user's own)."""

    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    artifacts_root: Path | None = None
    data_root: Path | None = None
    any_path: bool = False
    hub: bool = True


def open_sources(dataset: Sequence[DatasetSource], places: Places, *, pretokenized: bool) -> list[Source]:
    """Find every source and look at its outside; nothing but files' bytes (for the fingerprint) is read yet."""
    sources: list[Source] = []
    for source in dataset:
        reader = _Reader(source, pretokenized or source.format == "tokens")
        match source:
            case BuiltinSource():
                sources.append(_python_docs())
            case FileSource():
                sources += [_uploaded(reader, file_id, places) for file_id in source.file_ids]
            case PathSource():
                sources += [reader.open(file, file.name) for file in _matching(source.path, places, reader.suffixes)]
            case HubSource():
                sources.append(_from_hub(reader, source, places))
    return sources


# --- Where sources are ------------------------------------------------------------------------------------------------


def _python_docs() -> Source:
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return Source("python-docs", digest, lambda: (Piece(text) for text in texts))


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
    return Source(
        source.hub, fingerprint, lambda: reader.rows(source.hub, cast("Iterator[Any]", iter(rows))), reader.pretokenized
    )


# --- What is inside ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reader:
    """Reads files as one source of the spec says: its format, its names of columns."""

    source: DatasetSource
    pretokenized: bool

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The endings of the files that can be read as what is wanted: token ids, or text."""
        return (*ROW_SUFFIXES, *(TOKEN_SUFFIXES if self.pretokenized else TEXT_SUFFIXES))

    def open(self, path: Path, name: str, *, sha256: str | None = None) -> Source:
        if path.stat().st_size == 0:
            raise InvalidData(f"{name} is empty; give a file with at least one document.")
        suffix = Path(name).suffix.lower()
        if self.pretokenized and suffix in TOKEN_SUFFIXES:
            return Source(name, f"{sha256 or _sha256(path)} {suffix}", lambda: iter(()), flat=path)
        if self.pretokenized or suffix in (".parquet", ".arrow"):
            readers = {".parquet": self._parquet, ".arrow": self._arrow, ".jsonl": self._json_lines}
        else:
            readers = {**dict.fromkeys(TEXT_SUFFIXES, self._text), ".jsonl": self._json_lines}
        if suffix not in readers:
            tokens = "tokens as " if self.pretokenized else ""
            raise InvalidData(f"{name} has no known format; give {tokens}{', '.join(self.suffixes)}.")
        sha256 = sha256 or _sha256(path)
        columns = json.dumps(self.source.columns, sort_keys=True)
        return Source(name, f"{sha256} {suffix} {columns}", lambda: readers[suffix](path, name), self.pretokenized)

    def rows(self, name: str, rows: Iterator[Any], word: str = "row") -> Iterator[Piece]:
        """Pieces of rows of named columns, numbered from 1."""
        for number, row in enumerate(rows, 1):
            yield self._row(name, word, number, row)

    def _row(self, name: str, word: str, number: int, row: object) -> Piece:
        where = f"{name}, {word} {number}"
        if not isinstance(row, Mapping):
            raise InvalidData(f"{where}: is not an object with named fields.")
        column = self.source.columns.get("input_ids" if self.pretokenized else "text", None)
        column = column or ("input_ids" if self.pretokenized else "text")
        if column not in row:
            has = ", ".join(sorted(str(key) for key in row)[:8]) or "none"
            ours = "input_ids" if self.pretokenized else "text"
            if ours == "text" and ("messages" in row or {"prompt", "completion"} <= row.keys()):
                raise InvalidData(f"{where}: is chat data ({has}), which is not available yet; give lines with 'text'.")
            raise InvalidData(
                f"{where}: has no {column!r} (it has: {has}); name the right one with columns: "
                f'{{"{ours}": "..."}} in the source.'
            )
        value: object = row[column]
        if self.pretokenized:
            if not isinstance(value, list) or not all(
                type(item) is int and item >= 0 for item in cast(list[Any], value)
            ):
                raise InvalidData(f"{where}: {column!r} is not a list of token ids.")
            return Piece(ids=cast(list[int], value))
        if not isinstance(value, str):
            raise InvalidData(f"{where}: {column!r} is {type(value).__name__}, not text.")
        return Piece(value)

    def _text(self, path: Path, name: str) -> Iterator[Piece]:
        """The whole file is one document, read in pieces of whole lines."""
        lines: list[str] = []
        size = 0
        for _, line in _decoded_lines(path, name):
            lines.append(line)
            size += len(line)
            if size >= _PIECE_CHARACTERS:
                yield Piece("".join(lines), ends_document=False)
                lines, size = [], 0
        yield Piece("".join(lines))

    def _json_lines(self, path: Path, name: str) -> Iterator[Piece]:
        for number, line in _decoded_lines(path, name):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InvalidData(f"{name}, line {number}: is not JSON ({error}).") from error
            yield self._row(name, "line", number, row)

    def _parquet(self, path: Path, name: str) -> Iterator[Piece]:
        import pyarrow as pa
        import pyarrow.parquet as parquet

        try:
            batches = parquet.ParquetFile(path).iter_batches(batch_size=1024)
            yield from self.rows(name, (row for batch in batches for row in batch.to_pylist()))
        except pa.ArrowException as error:
            raise InvalidData(f"{name} is not readable as parquet: {error}") from error

    def _arrow(self, path: Path, name: str) -> Iterator[Piece]:
        import pyarrow as pa

        try:
            with pa.memory_map(str(path)) as memory:
                try:
                    reader: Any = pa.ipc.open_stream(memory)
                except pa.ArrowInvalid:
                    memory.seek(0)
                    reader = pa.ipc.open_file(memory)
                    reader = (reader.get_batch(index) for index in range(reader.num_record_batches))
                yield from self.rows(name, (row for batch in reader for row in batch.to_pylist()))
        except pa.ArrowException as error:
            raise InvalidData(f"{name} is not readable as Arrow: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _decoded_lines(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, line ends kept, a byte-order mark dropped."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InvalidData(
                    f"{name}, line {number}: is not UTF-8 text (byte {raw[error.start]:#04x}); save it as UTF-8."
                ) from error
