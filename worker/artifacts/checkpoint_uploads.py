"""Stores the checkpoints of one attempt in the artifact store, in the journal's order, as soon as they are reported.

Uploads don't wait until earlier lines are published: during an outage of Redis, the run continues to save and to
remove its old checkpoints. A failing store (a full disk, a lost mount) is retried for a minute, or for ten minutes once
the run is over. After that, a warning with the reason is published instead of the checkpoint's line. A run
without its final checkpoint did not succeed: its job is paused until the disk has free space, or it has failed.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Collection
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from worker.threads import Outage, log_failure
from zeta_core.contract.job.checkpoint import FINAL_CHECKPOINT, NAME_PATTERN, checkpoint_step
from zeta_core.contract.job.events import LogLine, StatusLine, WarningLine
from zeta_core.contract.job.job import JobError
from zeta_core.contract.job.status import JobStatus, StatusReason
from zeta_core.system.artifact_store import ArtifactStore, BrokenCheckpoint

MAX_RETRY_SECONDS = 60.0
FINAL_RETRY_SECONDS = 600.0  # for the checkpoints of an ended run: its device is free, and its work would be lost
RETRY_PAUSE_SECONDS = 2.0

logger = logging.getLogger(__name__)


class CheckpointUploads:
    def __init__(
        self, store: ArtifactStore, executor: Executor, job_id: str, output: Path, *, save_total_limit: int
    ) -> None:
        self._store = store
        self._executor = executor
        self._job_id = job_id
        self._output = output
        self._save_total_limit = save_total_limit
        self._waiting: list[tuple[int, str]] = []  # (line, name), in the journal's order
        self._work: Future[None] | None = None
        self._began = 0.0
        self._next_try = 0.0
        self._trouble = Outage(f"A checkpoint of {job_id} cannot be stored")
        self._replaced: dict[int, dict[str, Any]] = {}
        self._not_stored: JobError | None = None
        self.keep = frozenset[str]()  # checkpoints that other jobs need, from the server's last acknowledgement

    def add(self, number: int, name: str) -> None:
        """Queue the checkpoint ``name``, which line ``number`` of the journal reports."""
        self._waiting.append((number, name))

    def step(self, *, is_over: bool = False) -> None:
        """Continue with the current checkpoint or start the next one; returns immediately.

        ``is_over`` means that the run has no processes left, so a failing store is retried for longer, unless it
        is full.
        """
        if not self._waiting:
            return
        number, name = self._waiting[0]
        now = time.monotonic()
        if not NAME_PATTERN.match(name):
            self._give_up(number, name, f"The run reported a checkpoint with the invalid name {name[:100]!r}.")
        elif self._work is None:
            if now >= self._next_try:
                self._began = self._began or now
                self._work = self._executor.submit(self._store.put_checkpoint, self._job_id, name, self._output / name)
        elif self._work.done():
            error, self._work = self._work.exception(), None
            if error is None:
                self._trouble.end()
                self._done()
            elif isinstance(error, BrokenCheckpoint):
                self._give_up(number, name, f"The checkpoint {name} could not be stored: {error}", error)
            elif not isinstance(error, OSError):
                raise error
            elif now - self._began < (FINAL_RETRY_SECONDS if is_over and not _is_full(error) else MAX_RETRY_SECONDS):
                self._trouble.begin(error)
                self._next_try = now + RETRY_PAUSE_SECONDS
            else:
                self._give_up(number, name, f"The checkpoint {name} could not be stored: {error}", error)

    def is_settled(self, number: int) -> bool:
        """Whether line ``number`` may be published: its checkpoint is stored, or storing it was given up."""
        return all(number < waiting for waiting, _ in self._waiting)

    def published_line(self, number: int, line: dict[str, Any]) -> dict[str, Any]:
        """Line ``number`` as it is published: replaced if its checkpoint could not be stored."""
        if number in self._replaced:
            return self._replaced[number]
        if self._not_stored is None or line.get("type") != "status" or line.get("status") != JobStatus.SUCCEEDED:
            return line
        is_full = self._not_stored.code == StatusReason.DISK_FULL
        return StatusLine(
            status=JobStatus.PAUSED if is_full else JobStatus.FAILED,
            reason=StatusReason(self._not_stored.code),
            message=self._not_stored.message,
            error=None if is_full else self._not_stored,
        ).model_dump(mode="json")

    def published(self, name: str, *, keep: Collection[str]) -> None:
        """The server has recorded this checkpoint, so older ones may be removed from the store, except ``keep``."""
        self.keep = frozenset(keep)
        step = checkpoint_step(name)
        if step is not None:
            work = self._executor.submit(self._prune, step, self.keep)
            log_failure(work, f"Old checkpoints of {self._job_id} could not be removed")

    def _done(self) -> None:
        self._waiting.pop(0)
        self._began = self._next_try = 0.0

    def _give_up(self, number: int, name: str, message: str, error: BaseException | None = None) -> None:
        self._done()
        if error is not None:
            work = self._executor.submit(self._store.abandon_checkpoint, self._job_id, name)
            log_failure(work, f"The incomplete checkpoint {name} of {self._job_id} could not be removed")
        if (
            checkpoint_step(name) is not None
            and isinstance(error, BrokenCheckpoint)
            and not (self._output / name).exists()
        ):
            replaced = f"The run removed {name} before it could be stored, because it had newer checkpoints."
            self._replaced[number] = LogLine(message=replaced).model_dump(mode="json")
            return
        logger.error("%s", message, extra={"action": "store", "job_id": self._job_id})
        self._replaced[number] = WarningLine(code="checkpoint_not_stored", message=message).model_dump(mode="json")
        if name == FINAL_CHECKPOINT:
            reason = StatusReason.DISK_FULL if _is_full(error) else StatusReason.TRAIN_ERROR
            self._not_stored = JobError(code=reason, message=message)

    def _prune(self, step: int, keep: frozenset[str]) -> None:
        self._store.prune(self._job_id, self._save_total_limit, published_step=step, keep=keep)


def _is_full(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
