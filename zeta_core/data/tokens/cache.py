"""The token cache: each dataset is tokenized once, into a flat memory-mapped file of ids, and cached by content.

The cache entry of a dataset is the directory ``<cache>/tokens-<hash>/``. It contains ``tokens.bin`` (little-endian
uint16 or uint32), ``offsets.npy`` (int64, one more than the number of documents), ``rows.npy`` (the source line of each
document), ``hashes.npy`` (uint64, a hash of each document's ids), ``groups.npy`` (uint64, a hash of each document's
value of ``group_by``; empty without it), ``labels.npy`` (whether each document is a desirable answer; empty for data
without such labels) and ``meta.json``. If only some tokens are trained on, ``supervised.bin`` contains a byte for each
token.

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
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from zeta_core.contract.spec.sources import PREFERENCE_FORMATS
from zeta_core.data.documents.conversations import TrainOn
from zeta_core.data.documents.rendering import without_default
from zeta_core.data.documents.template import DEFAULT_TEMPLATE, is_default, uses_date, with_beginning, without_beginning
from zeta_core.data.rows.formats import RowFormat, required
from zeta_core.data.rows.token_rows import MASKS
from zeta_core.data.sandbox import ProcessLimits
from zeta_core.data.sources import Source
from zeta_core.data.tokens.encoder import Encoder
from zeta_core.data.tokens.flat_files import flat_tokens
from zeta_core.data.tokens.parallel_encoding import encoded_units
from zeta_core.data.tokens.statistics import SECONDS_BETWEEN_LINES, TokenStatistics
from zeta_core.data.tokens.token_file import WHOLE_FORMATS, Ids, Mix, Origin, TokenFile
from zeta_core.failures import InvalidData
from zeta_core.report.reporter import Reporter
from zeta_core.system.durable_files import flush, part_path, rename_durably

FORMAT_VERSION = 10


def prepare_tokens(
    sources: Sequence[Source],
    tokenizer: Any,
    cache: Path,
    report: Reporter,
    *,
    train_on: TrainOn | None = None,
    method: str = "sft",
    today: date | None = None,
    processes: int = 1,
    limits: ProcessLimits | None = None,
    seconds_between_lines: float = SECONDS_BETWEEN_LINES,
) -> TokenFile:
    """Read the tokens of ``sources`` from the cache, or create them with up to ``processes`` processes.

    ``today`` is the date that chat templates render, and ``seconds_between_lines`` the time between reports of
    progress. If the data contains conversations, the tokenizer gets the template that they were rendered with
    (`zeta_core.data.documents.template`). Raises `InvalidData`, also if there are fewer than two tokens.
    """
    today = today or datetime.now(UTC).date()
    if any(source.flat is not None for source in sources):
        reject_for_flat(sources, train_on=train_on, method=method)
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
                seconds = seconds_between_lines
                _write(detected, encoder, train_on, directory, report, processes, limits, seconds)
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
    _reject_method(formats, method)
    train_on = without_default(train_on, formats)
    return Encoder(tokenizer, _dtype(sources, tokenizer), train_on=train_on, today=today)


def reject_for_flat(sources: Sequence[Source], *, train_on: TrainOn | None, method: str) -> None:
    """Raise `InvalidData` for options that flat files of ids do not support."""
    _reject_method(["tokens"], method)
    if any(source.group_by is not None for source in sources):
        raise InvalidData("group_by names a column, but flat files of ids have none; remove it.")
    if train_on not in (None, "all"):
        raise InvalidData(
            f"train_on is {train_on!r}, but flat files of ids do not mark what is trained on; remove it, or "
            "provide rows of input_ids with labels."
        )


def no_trained_token_error(sources: Sequence[Source], num_untrained: int, masks: Sequence[str]) -> InvalidData:
    """The error for data without tokens to train on. ``masks`` exclude all tokens of ``num_untrained`` rows."""
    names = ", ".join(source.name for source in sources)
    if num_untrained:
        return InvalidData(
            f"{names}: no token is trained on in any of the {num_untrained:,} rows; their {' and '.join(masks)} "
            "exclude all tokens (the first token of a row is never trained on)."
        )
    contain = "contains" if len(sources) == 1 else "contain"
    return InvalidData(f"{names} {contain} no text to train on; provide at least one document with some words.")


def _set_template(tokenizer: Any, added_beginning: str, report: Reporter) -> None:
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


def _reject_method(formats: Sequence[RowFormat], method: str) -> None:
    """Raise `InvalidData` unless the rows have the format of a method that learns preferences, or no such format."""
    wanted = PREFERENCE_FORMATS.get(method)
    for row_format in formats:
        methods = [name for name, read in PREFERENCE_FORMATS.items() if read == row_format]
        if row_format != wanted and (wanted is not None or methods):
            fix = f"set method to {' or '.join(map(repr, methods))}"
            if wanted is not None and not methods:
                *columns, last = dict.fromkeys(("prompt", *required(wanted)))
                fix = f"use rows with {', '.join(columns)} and {last}"
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
def _locked(directory: Path, report: Reporter) -> Generator[None]:
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
        rows, hashes, groups, labels = (
            np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("rows", "hashes", "groups", "labels")
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
        labels=cast("NDArray[np.bool_]", labels) if len(labels) else None,
        origins=tuple(Origin(**origin) for origin in meta["origins"]),
        num_duplicates=meta["num_duplicates"],
        num_empty=meta["num_empty"],
        num_split=meta["num_split"],
        num_control_tokens=meta["num_control_tokens"],
        first_control_token=meta["first_control_token"],
        num_with_unused_turns=meta["num_unused_ends"],
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
    report: Reporter,
    processes: int,
    limits: ProcessLimits | None,
    seconds_between_lines: float,
) -> None:
    part = part_path(directory)
    for leftover in (part, directory):  # left by an interrupted process
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir()
    supervised = train_on != "all" and any(source.row_format in WHOLE_FORMATS for source in sources)
    ids_given = any(source.row_format == "tokens" for source in sources)
    statistics = TokenStatistics(sources, report, seconds_between_lines)
    with (part / "tokens.bin").open("wb") as ids, (part / "supervised.bin").open("wb") as mask:
        for number, position, encoded in encoded_units(sources, encoder, processes=processes, limits=limits):
            ids.write(encoded.ids_N.tobytes())
            if supervised or ids_given:
                mask.write(encoded.supervised_mask(continues_document=statistics.is_in_document).tobytes())
            statistics.add(number, position, encoded)
    statistics.check_columns()
    if statistics.num_tokens < 2 or statistics.blank:
        raise no_trained_token_error(sources, statistics.num_untrained, statistics.masks)
    supervised = supervised or statistics.masked
    if not supervised:
        (part / "supervised.bin").unlink()
    np.save(part / "offsets.npy", statistics.offsets)
    np.save(part / "rows.npy", statistics.rows)
    np.save(part / "hashes.npy", statistics.hashes)
    grouped = any(source.group_by is not None for source in sources)
    np.save(part / "groups.npy", statistics.groups if grouped else np.empty(0, np.uint64))
    np.save(part / "labels.npy", statistics.labels)
    meta = {"version": FORMAT_VERSION, "dtype": encoder.dtype.str, "supervised": supervised, **statistics.meta()}
    (part / "meta.json").write_text(json.dumps(meta))
    for file in part.iterdir():
        flush(file)
    flush(part)
    rename_durably(part, directory)
    statistics.report_progress(1.0)
    documents = "1 document" if statistics.num_documents == 1 else f"{statistics.num_documents:,} documents"
    report.log(f"Tokenized {documents} into {statistics.num_tokens:,} tokens.")
