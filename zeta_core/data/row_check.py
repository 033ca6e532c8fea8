"""Checking the rows of opened sources before a training, in seconds: all rows are read, and a sample is tokenized.

Every row is decoded, and its columns, roles and values are checked. Rendering and tokenizing take longer, so they are
done for the first rows, for rows from the whole data, and for each row with a turn that no earlier row has (by its
role, fields, neighbours, and whether it is empty). The code is the training's, so the messages are the same.

Guarantees: rows are only read in a confined process (`zeta_core.data.confined`). The error is the first one in the
data. Results of the whole data are cached in ``<cache>/rows-<hash>.json``, under the content of the data, the
tokenizer, and the options that matter; errors are cached, too.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, date, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from zeta_core.contract.data_files.data_folder import Split
from zeta_core.contract.job.check import CheckedData
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.sources import Dataset, DatasetSource, HubSource, PathSource, dataset_sources
from zeta_core.data.chat import TrainOn
from zeta_core.data.confined import Confined, Limits, Position, send_message
from zeta_core.data.encode import Encoder
from zeta_core.data.source import Source
from zeta_core.data.sources import Places, open_sources
from zeta_core.data.token_cache import fingerprint, make_encoder
from zeta_core.data.token_rows import RowColumns
from zeta_core.data.tokenizing import num_processes
from zeta_core.data.turns import ROLES
from zeta_core.data.units import Row, parsed_list
from zeta_core.environment import variables
from zeta_core.failures import InvalidData

VERSION = 2  # of the results in the cache
FIRST_ROWS = 100  # all tokenized
SPREAD_ROWS = 100  # tokenized from the rest of the data
SAMPLE_TOKENS = 400_000  # beyond this, only a fraction of the data's beginning is tokenized
MOST_PROCESSES = 4  # because trainings run on the same machine
BYTES_PER_PROCESS = 4 << 20
MOST_KINDS = 1000  # of rows; a row of a further kind is tokenized only if it belongs to the sample
MOST_LENGTHS = 10_000
MOST_COLUMNS = 100
_REASONING = ("<think>", "[THINK]")

DataField = Literal["dataset", "eval_dataset"]


@dataclass
class CheckedRows:
    """The findings of a check. ``tokens`` is an estimate; ``lengths`` are those of the tokenized documents."""

    complete: bool = True
    rows: int = 0
    sampled_rows: int = 0
    sampled_tokens: int = 0
    trained_tokens: int = 0  # of the sample
    tokens: int = 0
    largest_id: int = 0
    formats: list[str] = field(default_factory=list[str])
    shapes: list[str] = field(default_factory=list[str])
    unused_columns: list[str] = field(default_factory=list[str])
    lengths: list[int] = field(default_factory=list[int])

    def described(self, seq_len: int) -> CheckedData:
        """The report for users, for sequences of ``seq_len``."""
        note = None
        if not self.complete:
            note = (
                f"Only the first {self.rows:,} rows were checked, because the time was limited; the training checks "
                "the other rows when it starts. A larger ZETA_CHECK_SECONDS on the server allows more time."
            )
        num_too_long = sum(length > seq_len for length in self.lengths)
        return CheckedData(
            rows=self.rows,
            complete=self.complete,
            formats=self.formats,
            shapes=self.shapes,
            unused_columns=self.unused_columns,
            sampled_rows=self.sampled_rows,
            tokens=self.tokens,
            trained_share=round(self.trained_tokens / max(1, self.sampled_tokens), 4),
            longest_tokens=max(self.lengths, default=0),
            too_long_share=round(num_too_long / max(1, len(self.lengths)), 4),
            note=note,
        )


def check_dataset(
    name: DataField, spec: JobSpec, dataset: Dataset, places: Places, tokenizer: Any, cache: Path, *, seconds: float
) -> CheckedRows | str:
    """Check the rows of a field of the spec, or return the reason why they are not checked. Raises `InvalidData`."""
    split: Split = "train" if name == "dataset" else "held_out"
    try:
        if reason := _why_unchecked(dataset_sources(dataset), places):
            return reason
        sources = open_sources(
            dataset_sources(dataset), places, pretokenized=spec.use_pretokenized, method=spec.method, split=split
        )
        if any(source.flat is not None for source in sources):
            return "Flat files of ids are read when the training starts."
        group_by = spec.group_by if split == "train" else None
        return check_rows(
            [replace(source.with_format(), group_by=group_by) for source in sources],
            tokenizer,
            cache,
            train_on=spec.train_on,
            method=spec.method,
            today=datetime.now(UTC).date(),
            seconds=seconds,
        )
    except InvalidData as error:
        raise InvalidData(error.message, hint=error.hint, code=error.code, param=error.param or name) from error


def _why_unchecked(dataset: Sequence[DatasetSource], places: Places) -> str:
    if any(isinstance(source, HubSource) for source in dataset):
        return "Data on the Hub is downloaded and checked when the training starts."
    if places.data_root is None and not places.any_path and any(isinstance(source, PathSource) for source in dataset):
        return "The worker that ran the check has no data folder (ZETA_DATA_ROOT), so it could not read the rows."
    return ""


def check_rows(
    sources: Sequence[Source],
    tokenizer: Any,
    cache: Path,
    *,
    train_on: TrainOn | None,
    method: str,
    today: date,
    seconds: float,
) -> CheckedRows:
    """Check the rows of sources with known formats for about ``seconds``. Raises `InvalidData` for the first error."""
    encoder = make_encoder(sources, tokenizer, train_on=train_on, method=method, today=today)
    about = {
        "version": VERSION,
        "tokenizer": fingerprint(tokenizer, today),
        "sources": [[s.name, s.fingerprint, sorted(s.drop_columns), s.at, s.group_by] for s in sources],
        "train_on": train_on,
        "method": method,
    }
    kept = cache / f"rows-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]}.json"
    found = _read(kept)
    if found is None:
        with variables(TOKENIZERS_PARALLELISM="false"):  # the tokenizer's threads do not survive a fork
            found = _check(sources, encoder, seconds)
        if found.get("complete", True):
            cache.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(found))
    if "error" in found:
        raise InvalidData(found["error"], code=found["code"])
    return CheckedRows(**found)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: object = json.loads(path.read_text())
        path.touch()  # the worker's cache evicts the least recently used entries
    except (OSError, ValueError):
        return None
    return cast("dict[str, Any]", found) if isinstance(found, dict) else None


def _check(sources: Sequence[Source], encoder: Encoder, seconds: float) -> dict[str, Any]:
    """The result of all processes, or the first error in the data, as stored in the cache."""
    deadline = time.monotonic() + seconds
    if sys.platform != "linux":
        results = [_Check(sources, encoder, Position(), deadline).run()]
    else:
        processes = num_processes(sources, MOST_PROCESSES, bytes_each=BYTES_PER_PROCESS)
        results = _in_processes(sources, encoder, deadline, processes)
    failed = [result for result in results if "error" in result]
    if failed:
        return min(failed, key=lambda result: result["turn"])
    try:
        return asdict(_merged(sources, results))
    except InvalidData as error:
        return {"error": error.message, "code": error.code}


def _in_processes(sources: Sequence[Source], encoder: Encoder, deadline: float, processes: int) -> list[dict[str, Any]]:
    """The result of each process, which checks a share of the units."""
    team: list[Confined] = []
    limits = Limits.for_processes(processes)
    with ExitStack() as ending:
        for number in range(processes):

            def work(pipe: Connection, position: Position, number: int = number) -> None:
                check = _Check(sources, encoder, position, deadline, number, processes)
                send_message(pipe, kind="result", value=check.run())

            team.append(Confined(work, limits, name=f"check-rows-{number}", others=team))
            ending.callback(team[-1].close)
        return [_result(member) for member in team]


def _result(process: Confined) -> dict[str, Any]:
    """The result of a process. An exceeded limit has no known place in the data, so it counts as the last error.

    It depends on the machine, so it is not cached.
    """
    try:
        return process.receive()["value"]
    except InvalidData as error:
        return {"error": error.message, "code": error.code, "turn": sys.maxsize, "complete": False}


def _merged(sources: Sequence[Source], results: Sequence[dict[str, Any]]) -> CheckedRows:
    """The results of several processes as one. Raises `InvalidData` if only some rows of a source have a mask."""
    found = CheckedRows(
        formats=sorted({str(source.row_format) for source in sources}),
        shapes=sorted({source.shape for source in sources if source.shape}),
    )
    columns = [RowColumns() for _ in sources]
    seen = {(kind, source.number): dict[str, None]() for source in sources for kind in ("mapped", "unused")}
    for result in results:
        one = CheckedRows(**result["found"])
        found.complete &= one.complete
        found.rows += one.rows
        found.sampled_rows += one.sampled_rows
        found.sampled_tokens += one.sampled_tokens
        found.trained_tokens += one.trained_tokens
        found.tokens += one.tokens
        found.largest_id = max(found.largest_id, one.largest_id)
        found.lengths += one.lengths
        for of_source, (rows_with, rows_without) in zip(columns, result["columns"], strict=True):
            of_source.merge(rows_with, rows_without)
        for kind, number, name in result["seen"]:
            seen[kind, number][name] = None
    unused = dict.fromkeys(name for (kind, _), names in seen.items() if kind == "unused" for name in names)
    found.unused_columns = list(unused)[:MOST_COLUMNS]
    for source, of_source in zip(sources, columns, strict=True):
        source.check_masks(of_source)
        if found.complete and all(result["all_seen"] for result in results):
            source.check_columns(seen["mapped", source.number], seen["unused", source.number])
    if found.complete and not found.rows:
        names = ", ".join(source.name for source in sources)
        raise InvalidData(f"{names}: contains no text to train on; provide at least one document with some words.")
    return found


class _Check:
    """One pass over the rows of all sources, until the deadline. Each of n processes checks every n-th unit."""

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: Encoder,
        position: Position,
        deadline: float,
        number: int = 0,
        processes: int = 1,
    ) -> None:
        self._sources = sources
        self._encoder = encoder
        self._position = position
        self._deadline = deadline
        self._number = number
        self._processes = processes
        self._total_bytes = max(1, sum(source.num_bytes for source in sources))
        self._turn = 0  # the number of the unit
        self._num_regular = 0  # rows of the sample that count for the estimate
        self._seen: set[object] = set()
        self._columns: set[object] = set()  # combinations of columns that were seen
        self._seen_columns: dict[
            tuple[str, int, str], None
        ] = {}  # mapped or unused, the number of the source, the name
        self._all_seen = True  # every combination of columns was examined
        self._masks = [RowColumns() for _ in sources]
        self._found = CheckedRows()

    def run(self) -> dict[str, Any]:
        """Check the rows. Returns the findings, or the first error with the number of its unit, as JSON."""
        bytes_before = 0
        try:
            for source, masks in zip(self._sources, self._masks, strict=True):
                if not self._check_source(source, bytes_before, masks):
                    self._found.complete = False
                    break
                bytes_before += source.num_bytes
        except InvalidData as error:
            return {"error": error.message, "code": error.code, "turn": self._turn}
        masks = [(one.rows_with, one.rows_without) for one in self._masks]
        seen = {"seen": list(self._seen_columns), "all_seen": self._all_seen}
        return {"found": asdict(self._found), "columns": masks, **seen}

    def _check_source(self, source: Source, bytes_before: int, masks: RowColumns) -> bool:
        """Check the rows of a source. Returns false if there was no time for all rows."""
        self._position.move(source.after(0), "reading")
        at, num_rows, sampled_rows, sampled_tokens, complete = 0, 0, 0, 0, True
        for unit in source.units():
            self._turn += 1
            if self._turn % self._processes != self._number:
                at = unit.position
                continue
            if time.monotonic() > self._deadline:
                complete = False
                break
            done = (bytes_before + source.num_bytes * at / max(1, source.size)) / self._total_bytes
            self._position.move(source.after(at), "reading")
            for row in unit.rows():
                num_rows += 1
                self._found.rows += row.ends_document
                source.fields(row)  # checks the row
                source.group(row)
                is_new = self._is_new(source, row)
                is_regular = not sampled_rows or source.row_format == "tokens" or self._has_room(done)
                if is_regular or is_new:
                    num_tokens = self._tokenize(source, row, masks)
                    self._position.move(source.after(at), "reading")
                    if is_regular:
                        sampled_rows += 1
                        sampled_tokens += num_tokens
                        self._num_regular += 1
                self._note_columns(source, row)
            at = unit.position
        self._found.tokens += round(sampled_tokens * num_rows / max(1, sampled_rows))
        return complete

    def _has_room(self, done: float) -> bool:
        """Whether the sample takes another row after this share of the data has been read."""
        is_few = self._num_regular * self._processes < FIRST_ROWS + SPREAD_ROWS * done
        return is_few and self._found.sampled_tokens * self._processes < SAMPLE_TOKENS * (1 + done) / 2

    def _is_new(self, source: Source, row: Row) -> bool:
        """Whether the row has a kind of turn that no earlier row has."""
        kind = (source.number, frozenset(_kinds(row.fields)))
        if kind in self._seen or len(self._seen) >= MOST_KINDS:
            return False
        self._seen.add(kind)
        return True

    def _note_columns(self, source: Source, row: Row) -> None:
        """Record the unused columns. Each combination of columns is examined only once."""
        columns = (source.name, row.unread, *row.fields)
        if columns in self._columns:
            return
        if len(self._columns) >= MOST_KINDS:
            self._all_seen = False
        else:
            self._columns.add(columns)
            for kind, names in (("unused", source.unused_columns(row)), ("mapped", source.mapped_columns(row))):
                self._seen_columns.update(dict.fromkeys((kind, source.number, name) for name in names))

    def _tokenize(self, source: Source, row: Row, masks: RowColumns) -> int:
        """Render and tokenize a row of the sample, and return its number of tokens."""
        encoded = self._encoder.encode(source, [row], self._position)
        masks.merge(encoded.rows_with, encoded.rows_without)
        num_tokens = len(encoded.ids_N)
        trained_N = encoded.supervised_N
        found = self._found
        found.largest_id = max(found.largest_id, int(encoded.ids_N.max(initial=0)))
        if len(found.lengths) < MOST_LENGTHS:
            found.lengths += [int(length) for length in encoded.lengths_D if length]
        found.sampled_rows += 1
        found.sampled_tokens += num_tokens
        found.trained_tokens += (
            num_tokens - int(np.count_nonzero(encoded.lengths_D)) if trained_N is None else int(trained_N.sum())
        )
        return num_tokens


def _kinds(fields: Mapping[str, object]) -> Iterator[object]:
    """The kinds of the values in a row. The kind of a turn determines how a chat template renders it."""
    for name, value in fields.items():
        value = parsed_list(value)
        turns = cast("list[object]", value) if isinstance(value, list) else [value]
        if not any(isinstance(turn, Mapping) for turn in turns):
            yield name, type(value), not value
            continue
        kinds = [_kind(turn) for turn in turns]
        for before, kind, after in zip([None, *kinds], kinds, [*kinds[1:], None], strict=False):
            yield name, kind, None if before is None else before[0], None if after is None else after[0]


def _kind(turn: object) -> tuple[object, ...]:
    """The role of a turn, its fields with a value, and whether its text is blank or contains reasoning."""
    if not isinstance(turn, Mapping):
        return (type(turn),)
    fields = cast("Mapping[str, Any]", turn)
    role: object = fields.get("role") or fields.get("from")
    content: object = fields.get("content", fields.get("value"))
    text = content if isinstance(content, str) else ""
    present = frozenset(name for name, value in fields.items() if value not in (None, "", [], {}))
    has_reasoning = any(mark in text for mark in _REASONING)
    return ROLES.get(str(role)), present, type(content), not text.strip(), has_reasoning, fields.get("weight") == 0
