"""Reading the rows of opened sources in one pass: each row is checked, and a sample is rendered and tokenized."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np

from zeta_core.contract.job.check import CheckedData
from zeta_core.data.rows.row import Row, parsed_list
from zeta_core.data.rows.token_rows import MaskPresence
from zeta_core.data.rows.turns import ROLES
from zeta_core.data.sandbox import Position
from zeta_core.data.sources import Source
from zeta_core.data.tokens.encoder import Encoder
from zeta_core.data.tokens.flat_files import IdType
from zeta_core.failures import InvalidData

FIRST_ROWS = 100  # all tokenized
SPREAD_ROWS = 100  # tokenized from the rest of the data
SAMPLE_TOKENS = 400_000  # beyond this, only a fraction of the data's beginning is tokenized
MAX_KINDS = 1000  # of rows; a row of a further kind is tokenized only if it belongs to the sample
MAX_LENGTHS = 10_000
MAX_ERRORS = 50  # per process
_REASONING = ("<think>", "[THINK]")


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
    untrained_rows: int = 0  # of ids, all of which are excluded by masks
    formats: list[str] = field(default_factory=list[str])
    shapes: list[str] = field(default_factory=list[str])
    unused_columns: list[str] = field(default_factory=list[str])
    lengths: list[int] = field(default_factory=list[int])
    id_type: IdType | None = None  # of a flat file of ids

    def to_checked_data(self, seq_len: int) -> CheckedData:
        """The report for users, for sequences of ``seq_len``."""
        note = None
        if not self.complete:
            note = (
                f"Only the first {self.rows:,} rows were checked, because the time was limited; the run checks "
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


class RowPass:
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
        self._unit_number = 0  # of the unit that is read, from 1, over all sources
        self._num_regular = 0  # rows of the sample that count for the estimate
        self._seen: set[object] = set()
        self._columns: set[object] = set()  # combinations of columns that were seen
        # (mapped or unused, the number of the source, the column), in the order in which they were found
        self._seen_columns: dict[tuple[str, int, str], None] = {}
        self._all_seen = True  # every combination of columns was examined
        self._masks = [MaskPresence() for _ in sources]
        self._text_tokens = [0] * len(sources)  # of text files, each of which is one document in many pieces
        self._is_blank = True  # only white space so far
        self._found = CheckedRows()
        self._errors: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """Check the rows. Returns the findings, or the errors with the numbers of their units, as JSON."""
        bytes_before = 0
        try:
            for number, source in enumerate(self._sources):
                if not self._check_source(number, source, bytes_before):
                    self._found.complete = False
                    break
                bytes_before += source.num_bytes
        except InvalidData as error:
            self._add_error(error)
        if self._errors:
            return {"errors": self._errors}
        masks = [(mask.rows_with, mask.rows_without) for mask in self._masks]
        seen = {"seen": list(self._seen_columns), "all_seen": self._all_seen}
        texts = {"text_tokens": self._text_tokens, "blank": self._is_blank}
        return {"found": asdict(self._found), "columns": masks, **seen, **texts}

    def _check_source(self, number: int, source: Source, bytes_before: int) -> bool:
        """Check the rows of a source. Returns false if there was no time for all rows."""
        self._position.move(source.after(0), "reading")
        at, sampled_rows, sampled_tokens, complete = 0, 0, 0, True
        size = sampled_size = 0  # in characters of text, or in rows
        for unit in source.units_with_faults():
            self._unit_number += 1
            if self._unit_number % self._processes != self._number:
                at = unit.position
                continue
            if time.monotonic() > self._deadline:
                complete = False
                break
            done = (bytes_before + source.num_bytes * at / max(1, source.size)) / self._total_bytes
            self._position.move(source.after(at), "reading")
            for row in unit.rows():
                self._found.rows += row.ends_document
                try:
                    if row.fault is not None:
                        raise row.fault
                    fields = source.fields(row)
                    source.group(row)
                except InvalidData as error:
                    self._add_error(error)
                    if source.layout is None or len(self._errors) >= MAX_ERRORS:
                        return True  # the other rows have the same fault, or there are enough errors
                    continue
                text = str(fields["text"]) if source.row_format == "text" else None
                is_blank = text is not None and not text.strip()
                self._is_blank = self._is_blank and is_blank
                row_size = 1 if text is None else len(text)
                size += row_size
                is_new = self._is_new(source, row)
                # Blank text would distort the number of tokens per character.
                is_regular = not is_blank and (
                    not sampled_rows or source.row_format == "tokens" or self._needs_sample(done)
                )
                if is_regular or is_new:
                    try:
                        num_tokens = self._tokenize(source, row, self._masks[number])
                    except InvalidData as error:
                        self._add_error(error)
                        if len(self._errors) >= MAX_ERRORS:
                            return True
                        continue
                    self._position.move(source.after(at), "reading")
                    if is_regular:
                        sampled_rows += 1
                        sampled_size += row_size
                        sampled_tokens += num_tokens
                        self._num_regular += 1
                self._note_columns(source, row)
            at = unit.position
        num_tokens = round(sampled_tokens * size / max(1, sampled_size))
        self._found.tokens += num_tokens
        if source.is_one_document:
            self._text_tokens[number] = num_tokens
        return complete

    def _add_error(self, error: InvalidData) -> None:
        self._errors.append({"error": error.message, "code": error.code, "unit": self._unit_number})

    def _needs_sample(self, done: float) -> bool:
        """Whether the sample takes another row after this share of the data has been read."""
        is_few = self._num_regular * self._processes < FIRST_ROWS + SPREAD_ROWS * done
        return is_few and self._found.sampled_tokens * self._processes < SAMPLE_TOKENS * (1 + done) / 2

    def _is_new(self, source: Source, row: Row) -> bool:
        """Whether the row has a kind of turn that no earlier row has."""
        kind = (source.number, frozenset(_kinds(row.fields)))
        if kind in self._seen or len(self._seen) >= MAX_KINDS:
            return False
        self._seen.add(kind)
        return True

    def _note_columns(self, source: Source, row: Row) -> None:
        """Record the unused columns. Each combination of columns is examined only once."""
        columns = (source.name, row.unread, *row.fields)
        if columns in self._columns:
            return
        if len(self._columns) >= MAX_KINDS:
            self._all_seen = False
        else:
            self._columns.add(columns)
            for kind, names in (("unused", source.unused_columns(row)), ("mapped", source.mapped_columns(row))):
                self._seen_columns.update(dict.fromkeys((kind, source.number, name) for name in names))

    def _tokenize(self, source: Source, row: Row, masks: MaskPresence) -> int:
        """Render and tokenize a row of the sample, and return its number of tokens."""
        encoded = self._encoder.encode(source, [row], self._position)
        masks.merge(encoded.rows_with, encoded.rows_without)
        num_tokens = len(encoded.ids_N)
        trained_N = encoded.supervised_N
        found = self._found
        found.largest_id = max(found.largest_id, int(encoded.ids_N.max(initial=0)))
        found.untrained_rows += encoded.num_untrained
        if len(found.lengths) < MAX_LENGTHS and not source.is_one_document:
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
