"""Writing the journal of a run directory, ``events.jsonl``, which is append-only.

Each line is one write of a complete line, so a reader never sees a part of one, and a written line is not lost if the
process is killed. If the machine fails, lines since the last checkpoint's fsync may be lost; the worker publishes lines
as they are written.
"""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

from pydantic import JsonValue

from zeta_core.contract.job.events import (
    CheckpointLine,
    ErrorLine,
    JournalLine,
    ProgressLine,
    StatusLine,
    WarningLine,
)
from zeta_core.contract.wire.run_directory import MAX_LINE_BYTES

SECONDS_BEYOND_LIMIT = 30.0  # between progress lines after the limit
SHORTENED_LINE_BYTES = MAX_LINE_BYTES // 4
MAX_CHARACTERS = 16_384  # per text, in a line that exceeds SHORTENED_LINE_BYTES
_LIMIT_REACHED = (
    "The journal has reached its limit of {} lines. From now on it contains only checkpoints, the end of the run, and "
    "occasional progress; the log contains everything."
)


class JournalWriter:
    """Appends lines to a journal. After ``max_lines``: only checkpoints, the end, errors, and occasional progress."""

    def __init__(self, path: Path, max_lines: int | None = None) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.max_lines = max_lines
        self._num_lines = 0
        self._progress_at = 0.0

    def write(self, line: JournalLine) -> None:
        """Append a line. Raises `OSError`; a line that does not fit on the disk is removed completely."""
        if self._is_omitted(line):
            return
        self._num_lines += 1
        self._append(line)
        if self._num_lines == self.max_lines:
            self._append(WarningLine(code="journal_limit", message=_LIMIT_REACHED.format(self.max_lines)))

    def _is_omitted(self, line: JournalLine) -> bool:
        if self.max_lines is None or self._num_lines < self.max_lines:
            return False
        if isinstance(line, ProgressLine) and time.monotonic() - self._progress_at >= SECONDS_BEYOND_LIMIT:
            self._progress_at = time.monotonic()
            return False
        return not isinstance(line, StatusLine | CheckpointLine | ErrorLine)

    def _append(self, line: JournalLine) -> None:
        data = line.model_dump_json(exclude_none=True).encode() + b"\n"
        if len(data) > SHORTENED_LINE_BYTES:
            data = json.dumps(_shortened(line.model_dump(mode="json", exclude_none=True))).encode() + b"\n"
        written = os.write(self._file, data)
        if written != len(data):
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        os.close(self._file)


def _shortened(value: JsonValue) -> JsonValue:
    """``value`` with long texts truncated; a library's error message may contain a whole row of data."""
    match value:
        case str() if len(value) > MAX_CHARACTERS:
            return f"{value[:MAX_CHARACTERS]} ... ({len(value) - MAX_CHARACTERS:,} more characters)"
        case list():
            return [_shortened(item) for item in value]
        case dict():
            return {name: _shortened(item) for name, item in value.items()}
        case _:
            return value
