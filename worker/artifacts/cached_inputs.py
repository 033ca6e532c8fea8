"""The inputs of the jobs that a worker accepted last, which its caches of data and models probably hold.

Heartbeats report them, so that the scheduler prefers this worker for further jobs with the same inputs. Losing this
file only loses that preference.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path

from pydantic import FiniteFloat, TypeAdapter, ValidationError

from worker.artifacts.cleanup import CACHE_RETENTION_SECONDS
from zeta_core.contract.wire.messages import MAX_CACHED_INPUTS, InputKey
from zeta_core.system.durable_files import write_atomically

REPEAT_SECONDS = 60.0  # a repeated use is recorded at most this often

_TIMES: TypeAdapter[dict[InputKey, FiniteFloat]] = TypeAdapter(dict[InputKey, FiniteFloat])

logger = logging.getLogger(__name__)


class CachedInputs:
    """The keys of inputs in ``file``, each with the time of its last use, in seconds since 1970."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._used_at = _read(file)

    @property
    def keys(self) -> tuple[str, ...]:
        """The inputs that were used within the time for which caches are kept, the newest first."""
        oldest = time.time() - CACHE_RETENTION_SECONDS
        newest_first = sorted(self._used_at.items(), key=lambda entry: entry[1], reverse=True)
        return tuple(key for key, used_at in newest_first if used_at >= oldest)[:MAX_CACHED_INPUTS]

    def add(self, keys: Iterable[str]) -> None:
        """Record that a job used these inputs now."""
        now = time.time()
        new = {key: now for key in keys if now - self._used_at.get(key, 0.0) > REPEAT_SECONDS}
        if new:
            self._used_at |= new
            self._used_at = {key: self._used_at[key] for key in self.keys}
            self._write()

    def clear(self) -> None:
        """Forget all inputs, because the caches are being emptied."""
        if self._used_at:
            self._used_at = {}
            self._write()

    def _write(self) -> None:
        try:
            write_atomically(self._file, json.dumps(self._used_at).encode())
        except OSError as error:
            logger.warning("%s could not be written: %s", self._file, error, extra={"action": "cached_inputs"})


def _read(file: Path) -> dict[str, float]:
    """The stored times; none if the file is missing or damaged, because heartbeats allow only valid keys."""
    try:
        return _TIMES.validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return {}
