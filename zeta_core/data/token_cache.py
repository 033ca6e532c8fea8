"""The token cache: each dataset is tokenized once, into a flat memory-mapped file of ids, and cached by content.

The cache entry of a dataset is the directory ``<cache>/tokens-<hash>/``. It contains ``tokens.bin`` (little-endian
uint16 or uint32), ``offsets.npy`` (int64, one more than the number of documents), ``rows.npy`` (the source line of each
document) and ``meta.json``. If only some tokens are trained on, ``supervised.bin`` contains a byte for each token.

Guarantees: an entry is written to a temporary directory, flushed, and renamed under a file lock, so one of several
ranks or jobs does the work and the others wait for it. A visible entry is complete, and its size is checked before use.
The hash covers the bytes of the data, the tokenizer with its chat template, the choice of supervised tokens, and the
version of this format. Naming a default explicitly (a format, ``train_on``) does not change the hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from zeta_core.contract.events import ProgressLine
from zeta_core.data.chat import TrainOn
from zeta_core.data.confined import Limits
from zeta_core.data.encode import Encoded, Encoder, bytes_hash, without_default
from zeta_core.data.flat_files import flat_tokens
from zeta_core.data.rows import RowFormat
from zeta_core.data.source import Source
from zeta_core.data.template import DEFAULT_TEMPLATE, is_default, uses_date, with_beginning, without_beginning
from zeta_core.data.token_rows import MASKS, RowColumns
from zeta_core.data.tokenizing import encoded_units
from zeta_core.data.tokens import WHOLE_FORMATS, Ids, Mix, Origin, TokenFile
from zeta_core.failures import InvalidData
from zeta_core.report.journal import Report

FORMAT_VERSION = 8
SECONDS_BETWEEN_LINES = 1.0


def prepare_tokens(
    sources: Sequence[Source],
    tokenizer: Any,
    cache: Path,
    report: Report,
    *,
    train_on: TrainOn | None = None,
    method: str = "sft",
    today: date | None = None,
    processes: int = 1,
    limits: Limits | None = None,
) -> TokenFile:
    """Read the tokens of ``sources`` from the cache, or create them with up to ``processes`` processes.

    ``today`` is the date that chat templates render. If the data contains conversations, the tokenizer gets the
    template that they were rendered with (`zeta_core.data.template`). Raises `InvalidData`, also if there are fewer
    than two tokens.
    """
    today = today or datetime.now(UTC).date()
    if any(source.flat is not None for source in sources):
        _refuse_method(["tokens"], method)
        if any(source.group_by is not None for source in sources):
            raise InvalidData("group_by names a column, but flat files of ids have none; leave it out.")
        if train_on not in (None, "all"):
            raise InvalidData(
                f"train_on is {train_on!r}, but flat files of ids do not mark what is trained on; leave it out, or "
                "provide rows of input_ids with labels."
            )
        return flat_tokens(list(sources), report)
    detected = [source.with_format() for source in sources]
    train_on = without_default(train_on, [source.row_format for source in detected if source.row_format is not None])
    about: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "tokenizer": fingerprint(tokenizer, today),
        "sources": [s.fingerprint for s in sources],
        "train_on": train_on,
        "method": method,
    }
    if any(source.row_format == "tokens" for source in detected):
        about["masks"] = MASKS
    if any(source.group_by is not None for source in detected):
        about["group_by"] = [source.group_by for source in detected]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
    directory = cache / f"tokens-{key}"
    found = _read(directory, key)
    if found is None:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(directory, report):
            found = _read(directory, key)
            if found is None:
                encoder = make_encoder(detected, tokenizer, train_on=train_on, method=method, today=today)
                _write(detected, encoder, train_on, directory, report, processes, limits)
                found = _read(directory, key)
    assert found is not None, "the entry was just written"
    os.utime(directory)  # mark it as used, because the worker's cache evicts the least recently used entries
    tokens, template = found
    if template is not None:
        _set_template(tokenizer, template, report)
    return tokens.mixed(Mix.of(sources))  # weights do not affect the cached tokens


def make_encoder(
    sources: Sequence[Source], tokenizer: Any, *, train_on: TrainOn | None, method: str, today: date
) -> Encoder:
    """The encoder for sources whose format is known. Raises `InvalidData` if ``method`` does not support a format."""
    formats: list[RowFormat] = [source.row_format for source in sources if source.row_format is not None]
    _refuse_method(formats, method)
    train_on = without_default(train_on, formats)
    return Encoder(tokenizer, _dtype(sources, tokenizer), train_on=train_on, method=method, today=today)


def _set_template(tokenizer: Any, added_beginning: str, report: Report) -> None:
    """Set the chat template that the conversations were rendered with, and report how it differs from the tokenizer's.

    The text ``added_beginning`` was put in front of it.
    """
    if not tokenizer.chat_template or is_default(tokenizer.chat_template):
        tokenizer.chat_template = DEFAULT_TEMPLATE
        report.warn(
            "default_chat_template",
            "The tokenizer has no chat template, so conversations are formatted as ChatML, and this template is saved "
            "with the tokenizer. To use another one, set chat_template, or name a tokenizer that has one.",
        )
    if added_beginning:
        tokenizer.chat_template = with_beginning(without_beginning(tokenizer.chat_template), added_beginning)
        report.log(
            f"The tokenizer begins every text with {added_beginning!r}, so conversations begin with it, too. It was "
            "added to the chat template, which is saved with the tokenizer."
        )


def _refuse_method(formats: Sequence[RowFormat], method: str) -> None:
    """Raise `InvalidData` unless preference pairs are used with DPO, and only with DPO."""
    for row_format in formats:
        if (row_format == "preference") != (method == "dpo"):
            fix = "set method to 'dpo'" if row_format == "preference" else "use rows with prompt, chosen and rejected"
            raise InvalidData(f"The data has {row_format} rows, which method {method!r} does not support; {fix}.")


def fingerprint(tokenizer: Any, today: date) -> str:
    """A hash of everything that determines the ids of a tokenizer and the text of conversations."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inside = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    template = without_beginning(getattr(tokenizer, "chat_template", None) or DEFAULT_TEMPLATE)
    day = f" {today}" if uses_date(template) else ""
    special = json.dumps(getattr(tokenizer, "special_tokens_map", {}), sort_keys=True, default=str)
    text = f"{type(tokenizer).__name__} {tokenizer.eos_token_id} {inside} {json.dumps(template)} {special}{day}"
    return hashlib.sha256(text.encode()).hexdigest()


# --- The cache --------------------------------------------------------------------------------------------------------


@contextmanager
def _locked(directory: Path, report: Report) -> Generator[None]:
    """Hold the lock of a cache entry, and log a message if another process holds it."""
    lock = FileLock(f"{directory}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report.log("Another process is tokenizing the same data; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _read(directory: Path, key: str) -> tuple[TokenFile, str | None] | None:
    """The entry, and the beginning that its chat template was given; ``None`` if it is missing or incomplete.

    The beginning is ``None`` if no chat template was used.
    """
    try:
        meta = json.loads((directory / "meta.json").read_text())
        num_tokens, dtype = int(meta["num_tokens"]), np.dtype(meta["dtype"])
        files = {"tokens.bin": num_tokens * dtype.itemsize, "supervised.bin": num_tokens if meta["supervised"] else 0}
        if any(size and (directory / name).stat().st_size != size for name, size in files.items()):
            return None
        offsets = np.load(directory / "offsets.npy", mmap_mode="r", allow_pickle=False)
        rows, hashes, groups = (
            np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("rows", "hashes", "groups")
        )
    except (OSError, ValueError, KeyError):
        return None
    if len(offsets) != meta["num_documents"] + 1 or {len(rows), len(hashes)} != {meta["num_documents"]}:
        return None
    supervised = np.memmap(directory / "supervised.bin", np.bool_, "r") if meta["supervised"] else None
    tokens = TokenFile(
        ids=cast(Ids, np.memmap(directory / "tokens.bin", dtype=dtype, mode="r")),
        offsets=cast("NDArray[np.int64]", offsets),
        largest_id=meta["largest_id"],
        fingerprint=key,
        supervised=supervised,
        rows=cast("NDArray[np.int64]", rows),
        hashes=cast("NDArray[np.uint64]", hashes),
        groups=cast("NDArray[np.uint64]", groups) if len(groups) else None,
        origins=tuple(Origin(**origin) for origin in meta["origins"]),
        num_duplicates=meta["num_duplicates"],
        num_empty=meta["num_empty"],
        num_split=meta["num_split"],
        num_control_tokens=meta["num_control_tokens"],
        first_control_token=meta["first_control_token"],
        num_unused_ends=meta["num_unused_ends"],
        unused_columns=tuple(meta["unused_columns"]),
        is_templated=meta["templated"],
        num_untrained=meta["num_untrained"],
        num_padding=meta["num_padding"],
        masks=tuple(meta["masks"]),
    )
    return tokens, meta["added_beginning"] if meta["templated"] else None


def _dtype(sources: Sequence[Source], tokenizer: Any) -> np.dtype[Any]:
    ids_given = any(source.row_format == "tokens" for source in sources)
    return np.dtype("<u4") if len(tokenizer) > 1 << 16 or ids_given else np.dtype("<u2")


def _write(
    sources: Sequence[Source],
    encoder: Encoder,
    train_on: TrainOn | None,
    directory: Path,
    report: Report,
    processes: int,
    limits: Limits | None,
) -> None:
    aside = directory.with_name(directory.name + ".part")
    for left_over in (aside, directory):  # left by an interrupted process
        shutil.rmtree(left_over, ignore_errors=True)
    aside.mkdir()
    supervised = train_on != "all" and any(source.row_format in WHOLE_FORMATS for source in sources)
    ids_given = any(source.row_format == "tokens" for source in sources)
    written = _Written(sources, supervised or ids_given, report)
    with (aside / "tokens.bin").open("wb") as ids, (aside / "supervised.bin").open("wb") as mask:
        for number, position, encoded in encoded_units(sources, encoder, processes=processes, limits=limits):
            ids.write(encoded.ids_N.tobytes())
            learned_N = written.add(number, position, encoded)
            if supervised or ids_given:
                mask.write(learned_N.tobytes())
    written.check_masks()
    written.check_dropped_columns()
    if written.num_tokens < 2 or written.blank:
        names = ", ".join(source.name for source in sources)
        if written.num_untrained:
            raise InvalidData(
                f"{names}: no token is trained on in any of the {written.num_untrained:,} rows; their "
                f"{' and '.join(written.masks)} exclude all tokens (the first token of a row is never trained on)."
            )
        raise InvalidData(f"{names}: contains no text to train on; provide at least one document with some words.")
    supervised = supervised or written.masked
    if not supervised:
        (aside / "supervised.bin").unlink()
    np.save(aside / "offsets.npy", written.offsets)
    np.save(aside / "rows.npy", written.rows)
    np.save(aside / "hashes.npy", written.hashes)
    grouped = any(source.group_by is not None for source in sources)
    np.save(aside / "groups.npy", written.groups if grouped else np.empty(0, np.uint64))
    meta = {"version": FORMAT_VERSION, "dtype": encoder.dtype.str, "supervised": supervised, **written.meta()}
    (aside / "meta.json").write_text(json.dumps(meta))
    for file in aside.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    aside.rename(directory)
    written.report_progress(1.0)
    documents = "1 document" if written.num_documents == 1 else f"{written.num_documents:,} documents"
    report.log(f"Tokenized {documents} into {written.num_tokens:,} tokens.")


class _Written:
    """Counts what has been written so far, and reports the progress."""

    def __init__(self, sources: Sequence[Source], supervised: bool, report: Report) -> None:
        self._sources = sources
        self._supervised = supervised
        self._report = report
        self._reported_at = time.monotonic()
        self._open_length = self._open_hash = 0
        self._hashes: list[NDArray[np.uint64]] = []
        self._groups: list[NDArray[np.uint64]] = []
        self._documents = [0] * len(sources)
        self._largest = 0
        self._num_empty = self._num_split = self._num_control_tokens = self._num_unused_ends = 0
        self._num_padding = 0
        self._columns = [RowColumns() for _ in sources]
        self._masked = [False] * len(sources)
        self._templated = False
        self._added_beginning = self._first_control_token = ""
        self._unused_columns: dict[str, None] = {}  # in the order in which they were found
        self._lengths: list[NDArray[np.int64]] = []
        self._rows: list[NDArray[np.int64]] = []
        self.num_documents = 0
        self.num_tokens = 0
        self.num_untrained = 0
        self.blank = True  # only white space so far

    def add(self, source: int, position: int, encoded: Encoded) -> NDArray[np.bool_]:
        """Count the documents of a unit, and return the mask of its supervised tokens."""
        before = self.num_documents
        learned_N = encoded.supervised_N
        if learned_N is None and self._supervised:
            learned_N = np.ones(len(encoded.ids_N), dtype=np.bool_)
            starts = (np.cumsum(encoded.lengths_D) - encoded.lengths_D)[encoded.lengths_D > 0]
            learned_N[starts[1:] if self._open_length else starts] = False
        if encoded.ends_D.all() and not self._open_length:
            full = encoded.lengths_D > 0
            each = encoded.lengths_D, encoded.rows_D, encoded.hashes_D, encoded.groups_D
            self._take(*(array[full] for array in each))
            self._num_empty += int((~full).sum())
        else:
            self._add_pieces(encoded)
        self.num_tokens += len(encoded.ids_N)
        self.blank &= encoded.blank
        self._largest = max(self._largest, int(encoded.ids_N.max(initial=0)))
        self._documents[source] += self.num_documents - before
        self._num_split += encoded.num_split
        self._num_padding += encoded.num_padding
        self.num_untrained += encoded.num_untrained
        self._columns[source].merge(encoded.rows_with, encoded.rows_without)
        self._masked[source] |= self._sources[source].row_format == "tokens" and encoded.supervised_N is not None
        self._templated |= encoded.templated
        self._added_beginning = self._added_beginning or encoded.added_beginning
        self._num_control_tokens += encoded.num_control_tokens
        self._first_control_token = self._first_control_token or encoded.first_control_token
        self._num_unused_ends += encoded.num_unused_ends
        self._unused_columns.update(dict.fromkeys(encoded.unused_columns))
        if time.monotonic() - self._reported_at >= SECONDS_BETWEEN_LINES:
            done = sum(other.num_bytes for other in self._sources[:source])
            here = self._sources[source]
            done += here.num_bytes * position / max(1, here.size)
            self.report_progress(done / max(1, sum(other.num_bytes for other in self._sources)))
        return np.empty(0, np.bool_) if learned_N is None else learned_N

    def _add_pieces(self, encoded: Encoded) -> None:
        """Count documents that consist of several pieces. Their hash is computed from the hashes of the pieces."""
        for length, ends, row, digest in zip(
            encoded.lengths_D.tolist(), encoded.ends_D, encoded.rows_D.tolist(), encoded.hashes_D.tolist(), strict=True
        ):
            self._open_hash = digest if not self._open_length else bytes_hash(b"%d %d" % (self._open_hash, digest))
            self._open_length += length
            if ends and self._open_length:
                digests = np.array([self._open_hash], dtype=np.uint64)
                self._take(np.array([self._open_length]), np.array([row]), digests, np.zeros_like(digests))
            self._num_empty += bool(ends and not self._open_length)
            if ends:
                self._open_length = 0

    def _take(self, lengths: NDArray[Any], rows: NDArray[Any], hashes: NDArray[Any], groups: NDArray[Any]) -> None:
        self._lengths.append(lengths)
        self._rows.append(rows)
        self._hashes.append(hashes)
        self._groups.append(groups)
        self.num_documents += len(lengths)

    @property
    def offsets(self) -> NDArray[np.int64]:
        return np.cumsum(np.concatenate(([0], *self._lengths)), dtype=np.int64)

    @property
    def rows(self) -> NDArray[np.int64]:
        return np.concatenate(self._rows).astype(np.int64)

    @property
    def hashes(self) -> NDArray[np.uint64]:
        return np.concatenate(self._hashes)

    @property
    def groups(self) -> NDArray[np.uint64]:
        return np.concatenate(self._groups)

    @property
    def masked(self) -> bool:
        """Whether a mask of rows of ids excludes tokens."""
        return any(self._masked)

    @property
    def masks(self) -> list[str]:
        """The columns of rows of ids that determine which tokens are trained on."""
        return [name for name in MASKS if any(name in columns.rows_with for columns in self._columns)]

    def check_masks(self) -> None:
        """Raise `InvalidData` if only some rows of a file have a mask."""
        for source, columns in zip(self._sources, self._columns, strict=True):
            if columns.inconsistent is not None:
                name, row = columns.inconsistent
                raise InvalidData(
                    f"{source.place(row)}: has no {name!r}, which other rows have; add it to every row, or to none."
                )

    def check_dropped_columns(self) -> None:
        """Raise `InvalidData` if ``drop_columns`` names a column that no row has, such as a misspelt one."""
        for source in self._sources:
            if missing := sorted(source.drop_columns - self._unused_columns.keys()):
                raise InvalidData(
                    f"{source.at}.drop_columns names {missing[0]!r}, which no row has; correct the name, or remove it."
                )

    def report_progress(self, share: float) -> None:
        self._reported_at = time.monotonic()
        line = ProgressLine(phase="loading_data", documents=self.num_documents, share=round(min(1.0, share), 4))
        self._report.write(line)

    def meta(self) -> dict[str, Any]:
        hashes = self.hashes
        if any(source.row_format == "preference" for source in self._sources):
            hashes = hashes[::2] ^ (hashes[1::2] * np.uint64(3))  # a pair is one sample
        origins: Iterable[Origin] = (
            Origin(source.name, source.word, str(source.row_format), count, masked, source.shape)
            for source, count, masked in zip(self._sources, self._documents, self._masked, strict=True)
        )
        return {
            "largest_id": self._largest,
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "num_duplicates": int(len(hashes) - len(np.unique(hashes))),
            "num_empty": self._num_empty,
            "num_split": self._num_split,
            "num_untrained": self.num_untrained,
            "num_padding": self._num_padding,
            "masks": self.masks,
            "templated": self._templated,
            "added_beginning": self._added_beginning,
            "num_control_tokens": self._num_control_tokens,
            "first_control_token": self._first_control_token,
            "num_unused_ends": self._num_unused_ends,
            "unused_columns": list(self._unused_columns),
            "origins": [asdict(origin) for origin in origins],
        }
