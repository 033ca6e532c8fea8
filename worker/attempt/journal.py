"""Reads a training's ``events.jsonl`` while it grows, by line number from 1; only whole lines count.

A line of more than `LONGEST_LINE_BYTES` is passed over without being held in memory, and is read as a warning.
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

from zeta_core.contract.events import StatusLine, WarningLine
from zeta_core.contract.job import JobStatus
from zeta_core.contract.layout import LONGEST_LINE_BYTES

READ_BYTES = 2**20


class JournalReader:
    """Keeps where each line begins, so that any line can be read again; the lines themselves stay in the file."""

    def __init__(
        self,
        file: Path,
        on_checkpoint: Callable[[int, str], None],
        on_progress: Callable[[dict[str, Any]], None] = lambda line: None,
    ) -> None:
        """Both are called once for a line: with its number and the checkpoint's name, and with a progress line."""
        self._file = file
        self._ends = array("q", [0])  # byte offset of the end of line n at index n
        self._looked_at = 0  # byte offset: up to here no line ends that is not known
        self.last_line: int | None = None  # the number of the line that ends the attempt
        self.last_status: JobStatus | None = None
        self.has_steps = False  # a step was made in this attempt, so there may be something to save
        self._on_checkpoint = on_checkpoint
        self._on_progress = on_progress

    def __len__(self) -> int:
        """The number of whole lines seen; those after the one that ends the attempt do not count."""
        return self.last_line if self.last_line is not None else len(self._ends) - 1

    def scan(self) -> None:
        """Take notice of what the file has grown by, a bounded part at a time."""
        if self.last_line is not None:
            return
        try:
            with self._file.open("rb") as journal:
                journal.seek(self._looked_at)
                data = journal.read(READ_BYTES)
                while b"\n" not in data and len(data) <= LONGEST_LINE_BYTES and (more := journal.read(READ_BYTES)):
                    data += more
        except FileNotFoundError:
            return
        begin, start = self._looked_at, 0
        while (end := data.find(b"\n", start)) >= 0 and self.last_line is None:
            self._ends.append(begin + end + 1)
            if not self._is_too_long(len(self._ends) - 1):
                self._notice(data[start:end])
            start = end + 1
        # The rest is read again with the end of its line, but not where the line is too long already.
        is_too_long = begin + len(data) - self._ends[-1] > LONGEST_LINE_BYTES
        self._looked_at = begin + len(data) if is_too_long else self._ends[-1]

    def read(self, number: int) -> dict[str, Any]:
        """Line ``number``, or a warning in the place of one that is too long or is not a JSON object."""
        if self._is_too_long(number):
            message = (
                f"A line of the training's journal has {self.size(number):,} bytes, more than the "
                f"{LONGEST_LINE_BYTES:,} allowed, and is left out."
            )
            return WarningLine(code="line_too_long", message=message).model_dump(mode="json")
        begin, end = self._ends[number - 1], self._ends[number]
        with self._file.open("rb") as journal:
            journal.seek(begin)
            return _parsed(journal.read(end - begin))

    def size(self, number: int) -> int:
        return self._ends[number] - self._ends[number - 1]

    def _is_too_long(self, number: int) -> bool:
        return self.size(number) > LONGEST_LINE_BYTES

    def cut_torn_line(self) -> None:
        """Remove the beginning of a line whose writer was killed; only when no writer is left."""
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
        """Write a line of the worker's own, durably: one write, so that it falls between two of the training's."""
        data = line.model_dump_json(exclude_none=True).encode() + b"\n"
        with self._file.open("ab", buffering=0) as journal:
            if journal.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._file))
            os.fsync(journal.fileno())

    def _notice(self, text: bytes) -> None:
        """Look at the lines that the worker itself acts on; all others are only passed on."""
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
                return  # another type of line, or one that cannot be read: it does not end the attempt
            if status != JobStatus.RUNNING:
                self.last_line, self.last_status = number, status


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, dict):
        return value
    message = f"A line of the training's journal is no JSON object: {text[:200].decode('utf-8', 'replace')}"
    return WarningLine(code="unreadable_line", message=message).model_dump(mode="json")
