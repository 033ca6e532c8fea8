"""Reads a run's ``events.jsonl`` while it grows. Lines are numbered from 1, and only complete lines count.

A line of more than `MAX_LINE_BYTES` is skipped without loading it into memory, and replaced by a warning.
"""

from __future__ import annotations

import errno
import json
import os
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from zeta_core.contract.job.events import StatusLine, WarningLine
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.wire.run_directory import MAX_LINE_BYTES

READ_BYTES = 2**20


class JournalReader:
    """Keeps the offset of each line, so that any line can be read again. The lines themselves stay in the file."""

    def __init__(
        self,
        file: Path,
        on_checkpoint: Callable[[int, str], None],
        on_progress: Callable[[dict[str, Any]], None] = lambda line: None,
    ) -> None:
        """Each callback is called once per line: with number and name of a checkpoint, or with a progress line."""
        self._file = file
        self._ends = array("q", [0])  # byte offset of the end of line n at index n
        self._scanned_to = 0  # byte offset up to which all line ends are known
        self.last_line: int | None = None  # the number of the line that ends the attempt
        self.last_status: JobStatus | None = None
        self.has_steps = False  # whether this attempt has completed a step, so that there may be something to save
        self._on_checkpoint = on_checkpoint
        self._on_progress = on_progress

    def __len__(self) -> int:
        """The number of complete lines, up to the line that ends the attempt."""
        return self.last_line if self.last_line is not None else len(self._ends) - 1

    def scan(self) -> None:
        """Process newly appended lines, a limited amount at a time."""
        if self.last_line is not None:
            return
        try:
            with self._file.open("rb") as journal:
                journal.seek(self._scanned_to)
                data = journal.read(READ_BYTES)
                while b"\n" not in data and len(data) <= MAX_LINE_BYTES and (more := journal.read(READ_BYTES)):
                    data += more
        except FileNotFoundError:
            return
        begin, start = self._scanned_to, 0
        while (end := data.find(b"\n", start)) >= 0 and self.last_line is None:
            self._ends.append(begin + end + 1)
            if not self._is_too_long(len(self._ends) - 1):
                self._process_line(data[start:end])
            start = end + 1
        # An incomplete line is read again once it is complete, unless it is too long already.
        is_too_long = begin + len(data) - self._ends[-1] > MAX_LINE_BYTES
        self._scanned_to = begin + len(data) if is_too_long else self._ends[-1]

    def read(self, number: int) -> dict[str, Any]:
        """Line ``number``, or a warning if it is too long or not a JSON object."""
        if self._is_too_long(number):
            message = (
                f"Dropped a line of the run's journal: it has {self.size(number):,} bytes, more than the limit of "
                f"{MAX_LINE_BYTES:,}."
            )
            return WarningLine(code="line_too_long", message=message).model_dump(mode="json")
        begin, end = self._ends[number - 1], self._ends[number]
        with self._file.open("rb") as journal:
            journal.seek(begin)
            return _parsed(journal.read(end - begin))

    def size(self, number: int) -> int:
        return self._ends[number] - self._ends[number - 1]

    def _is_too_long(self, number: int) -> bool:
        return self.size(number) > MAX_LINE_BYTES

    def cut_torn_line(self) -> None:
        """Remove an incomplete last line whose writer was killed. Call only when no writer is left."""
        if not self._file.exists():
            return
        with self._file.open("rb+") as journal:
            size = journal.seek(0, os.SEEK_END)
            if size == 0:
                return
            position = size
            while position > 0:
                step = min(READ_BYTES, position)
                journal.seek(position - step)
                newline = journal.read(step).rfind(b"\n")
                if newline >= 0:
                    journal.truncate(position - step + newline + 1)
                    return
                position -= step
            journal.truncate(0)

    def append(self, line: StatusLine | WarningLine) -> None:
        """Append a line of the worker durably, in one write, so that it can't interleave with the run's lines."""
        data = line.model_dump_json(exclude_none=True).encode() + b"\n"
        with self._file.open("ab", buffering=0) as journal:
            if journal.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._file))
            os.fsync(journal.fileno())

    def _process_line(self, text: bytes) -> None:
        """Handle the lines that the worker itself acts on."""
        number = len(self._ends) - 1
        if b'"checkpoint"' in text:
            line = _parsed(text)
            if line.get("type") == "checkpoint":
                self._on_checkpoint(number, str(line.get("name")))
        elif b'"progress"' in text:
            line = _parsed(text)
            if line.get("type") == "progress":
                self.has_steps = self.has_steps or line.get("step") is not None
                self._on_progress(line)
        elif b'"status"' in text:
            try:
                status = StatusLine.model_validate_json(text).status
            except ValidationError:
                return  # another type of line or an invalid one; it doesn't end the attempt
            if status != JobStatus.RUNNING:
                self.last_line, self.last_status = number, status


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, dict):
        return value
    message = f"A line of the run's journal is not a JSON object: {text[:200].decode('utf-8', 'replace')}"
    return WarningLine(code="unreadable_line", message=message).model_dump(mode="json")
