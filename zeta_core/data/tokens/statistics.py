"""Counting the documents that are written to the token cache: their lengths, rows, hashes, and statistics.

Shapes as in `zeta_core.data.tokens.encoder`: N tokens, D documents or pieces of documents.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zeta_core.contract.job.events import ProgressLine
from zeta_core.data.rows.token_rows import MASKS, MaskPresence
from zeta_core.data.sources import Source
from zeta_core.data.tokens.encoder import Encoded, bytes_hash
from zeta_core.data.tokens.token_file import Origin
from zeta_core.report.reporter import Reporter

SECONDS_BETWEEN_LINES = 1.0


class TokenStatistics:
    """Counts what has been written so far, and reports the progress."""

    def __init__(self, sources: Sequence[Source], report: Reporter, seconds_between_lines: float) -> None:
        self._seconds_between_lines = seconds_between_lines
        self._sources = sources
        self._report = report
        self._reported_at = time.monotonic()
        self._open_length = self._open_hash = 0
        self._hashes: list[NDArray[np.uint64]] = []
        self._groups: list[NDArray[np.uint64]] = []
        self._labels: list[NDArray[np.bool_]] = []
        self._documents = [0] * len(sources)
        self._largest = 0
        self._num_empty = self._num_split = self._num_control_tokens = self._num_with_unused_turns = 0
        self._num_padding = 0
        self._columns = [MaskPresence() for _ in sources]
        self._masked = [False] * len(sources)
        self._templated = False
        self._added_beginning = self._first_control_token = ""
        # By the number of the source in the spec, in the order in which they were found.
        self._unused_columns: dict[int, dict[str, None]] = {source.number: {} for source in sources}
        self._mapped_columns: dict[int, dict[str, None]] = {source.number: {} for source in sources}
        self._lengths: list[NDArray[np.int64]] = []
        self._rows: list[NDArray[np.int64]] = []
        self.num_documents = 0
        self.num_tokens = 0
        self.num_untrained = 0
        self.blank = True  # only white space so far

    def add(self, source: int, position: int, encoded: Encoded) -> None:
        """Count the documents of a unit of the source with the index ``source``, read up to ``position``."""
        before = self.num_documents
        if encoded.ends_D.all() and not self._open_length:
            full = encoded.lengths_D > 0
            each = encoded.lengths_D, encoded.rows_D, encoded.hashes_D, encoded.groups_D
            self._append(*(array[full] for array in each))
            if encoded.labels_D is not None:  # answers are never divided into pieces
                self._labels.append(encoded.labels_D[full])
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
        self._num_with_unused_turns += encoded.num_with_unused_turns
        number = self._sources[source].number
        self._unused_columns[number].update(dict.fromkeys(encoded.unused_columns))
        self._mapped_columns[number].update(dict.fromkeys(encoded.mapped_columns))
        if time.monotonic() - self._reported_at >= self._seconds_between_lines:
            done = sum(other.num_bytes for other in self._sources[:source])
            here = self._sources[source]
            done += here.num_bytes * position / max(1, here.size)
            self.report_progress(done / max(1, sum(other.num_bytes for other in self._sources)))

    def _add_pieces(self, encoded: Encoded) -> None:
        """Count documents that consist of several pieces. Their hash is computed from the hashes of the pieces."""
        for length, ends, row, digest in zip(
            encoded.lengths_D.tolist(), encoded.ends_D, encoded.rows_D.tolist(), encoded.hashes_D.tolist(), strict=True
        ):
            self._open_hash = digest if not self._open_length else bytes_hash(b"%d %d" % (self._open_hash, digest))
            self._open_length += length
            if ends and self._open_length:
                digests = np.array([self._open_hash], dtype=np.uint64)
                self._append(np.array([self._open_length]), np.array([row]), digests, np.zeros_like(digests))
            self._num_empty += bool(ends and not self._open_length)
            if ends:
                self._open_length = 0

    def _append(self, lengths: NDArray[Any], rows: NDArray[Any], hashes: NDArray[Any], groups: NDArray[Any]) -> None:
        self._lengths.append(lengths)
        self._rows.append(rows)
        self._hashes.append(hashes)
        self._groups.append(groups)
        self.num_documents += len(lengths)

    @property
    def is_in_document(self) -> bool:
        """Whether the last document continues in the next unit."""
        return self._open_length > 0

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
    def labels(self) -> NDArray[np.bool_]:
        """Whether each document is a desirable answer; empty if the answers have no labels."""
        return np.concatenate(self._labels) if self._labels else np.empty(0, np.bool_)

    @property
    def masked(self) -> bool:
        """Whether a mask of rows of ids excludes tokens."""
        return any(self._masked)

    @property
    def masks(self) -> list[str]:
        """The columns of rows of ids that determine which tokens are trained on."""
        given = {name for columns in self._columns for name in columns.masks}
        return [name for name in MASKS if name in given]

    def check_columns(self) -> None:
        """Raise `InvalidData` if only some rows of a file have a mask, or if ``columns`` has no effect."""
        for source, columns in zip(self._sources, self._columns, strict=True):
            source.check_masks(columns)
            source.check_columns(self._mapped_columns[source.number], self._unused_columns[source.number])

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
            "num_unused_ends": self._num_with_unused_turns,
            "unused_columns": list(dict.fromkeys(name for names in self._unused_columns.values() for name in names)),
            "origins": [asdict(origin) for origin in origins],
        }
