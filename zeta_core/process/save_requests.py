"""Requests to save a checkpoint and continue, which the worker writes into the run directory."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ValidationError

from zeta_core.contract.wire.run_directory import SaveFile


class SaveRequests:
    """The newest request of the ``save`` file. It is read only when it has changed, because every step asks."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._version: tuple[int, int] | None = None
        self._number = 0

    def newest(self) -> int:
        """The number of the newest request, or 0 if there is none."""
        try:
            stat = os.stat(self._file)
            if (stat.st_ino, stat.st_mtime_ns) != self._version:
                self._number = SaveFile.model_validate_json(self._file.read_bytes()).number
                self._version = stat.st_ino, stat.st_mtime_ns
        except (FileNotFoundError, ValidationError):  # none yet, or one of another version
            pass
        return self._number
