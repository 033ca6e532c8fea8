"""Stores an attempt's log while it runs, and the rest of its files once all its processes have exited.

The rest is the end of the log, TensorBoard's files, and checkpoints that the run changed at its end. A failing
store (a full disk, a lost mount) is retried for a minute; after that, the attempt ends without the missing files.
Nothing is stored for a job that was deleted while its worker was cut off.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from concurrent.futures import Executor, Future
from pathlib import Path

from worker.artifacts.job_log import JobLog
from worker.threads import Outage
from zeta_core.contract.job.checkpoint import NAME_PATTERN
from zeta_core.contract.wire.run_directory import TENSORBOARD_DIRECTORY
from zeta_core.system.artifact_store import ArtifactStore, BrokenCheckpoint

LOG_SECONDS = 1.0
LOG_PAUSE_FACTOR = 10.0  # between two transfers of the log: this many times as long as the last one took
MAX_RETRY_SECONDS = 60.0
RETRY_PAUSE_SECONDS = 2.0

logger = logging.getLogger(__name__)


class OutputUploads:
    """``output`` is the folder of the run's checkpoints."""

    def __init__(self, store: ArtifactStore, executor: Executor, job_id: str, output: Path, log: JobLog) -> None:
        self._store = store
        self._executor = executor
        self._job_id = job_id
        self._output = output
        self._log = log
        self._work: Future[None] | None = None
        self._completing = False
        self._next_try = 0.0
        self._log_seconds = 0.0  # how long the log was last stored; object stores get it as a whole each time
        self._began: float | None = None
        self._trouble = Outage(f"The files of {job_id} cannot be stored in the artifact store")

    def copy_log(self) -> None:
        """Store the new part of the log, about once a second, or less often if that takes long."""
        now = time.monotonic()
        if self._is_working() or now < self._next_try:
            return
        self._collect_result()  # a failure recurs or ends by itself; `complete` stores the whole log later
        self._next_try = now + max(LOG_SECONDS, LOG_PAUSE_FACTOR * self._log_seconds)
        self._work = self._executor.submit(self._copy_log)

    def complete(self, *, succeeded: bool, keep: Collection[str]) -> bool:
        """Store the remaining files; returns whether this is done, or has been tried for long enough.

        The checkpoints in ``keep`` stay unchanged in the store: other jobs resume from them, with the optimizer state
        that the run removed from its own copies.
        """
        if self._is_working():
            return False
        now = time.monotonic()
        is_stored = self._collect_result() and self._completing
        if is_stored:
            return True
        self._began = self._began or now
        if now - self._began > MAX_RETRY_SECONDS:
            logger.error("The log of %s could not be completed in the artifact store.", self._job_id)
            return True
        if not self._completing or now >= self._next_try:
            self._completing, self._next_try = True, now + RETRY_PAUSE_SECONDS
            self._work = self._executor.submit(self._complete, succeeded, frozenset(keep))
        return False

    def _is_working(self) -> bool:
        return self._work is not None and not self._work.done()

    def _collect_result(self) -> bool:
        """Whether a transfer has finished and succeeded."""
        work, self._work = self._work, None
        if work is None:
            return False
        error = work.exception()
        if error is None:
            self._trouble.end()
            return True
        if not isinstance(error, OSError | BrokenCheckpoint):
            raise error
        self._trouble.begin(error, is_expected=True)
        return False

    def _copy_log(self) -> None:
        began = time.monotonic()
        if not self._store.is_deleted(self._job_id):
            self._log.copy()
        self._log_seconds = time.monotonic() - began

    def _complete(self, succeeded: bool, keep: frozenset[str]) -> None:
        """Store the complete log, the curves, and the checkpoints as the run left them (it strips some)."""
        if self._store.is_deleted(self._job_id):
            logger.info("%s was deleted; its remaining files are not stored.", self._job_id)
            return
        self._log.complete()
        curves = self._output / TENSORBOARD_DIRECTORY
        if curves.is_dir():
            self._store.put_curves(self._job_id, curves)
        if not succeeded or not self._output.is_dir():
            return
        for entry in sorted(self._output.iterdir()):
            if not NAME_PATTERN.match(entry.name) or entry.name in keep:
                continue
            if self._store.manifest_bytes(self._job_id, entry.name) is not None:
                self._store.put_checkpoint(self._job_id, entry.name, entry)
