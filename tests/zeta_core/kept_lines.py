"""A place for what a training says, to be looked at."""

from __future__ import annotations

from zeta_core.contract.events import JournalLine


class KeptLines:
    """Every line that was written."""

    def __init__(self) -> None:
        self.lines: list[JournalLine] = []

    def write(self, line: JournalLine) -> None:
        self.lines.append(line)

    def close(self) -> None: ...
