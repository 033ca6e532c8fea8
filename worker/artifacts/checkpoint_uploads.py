"""Puts the checkpoints of one attempt into the artifact store, in the journal's order, as soon as it tells of them.

It does not wait for the publication of earlier lines: while Redis is away the training goes on saving, and removes its
old checkpoints. A store that refuses (a full disk, a lost mount) is tried again for a minute, or ten when the training
is over; then the line is published as the reason why its checkpoint is not there, and without its final one a training
did not succeed: it is paused until the disk has room, or has failed.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Collection
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from worker.artifacts.store import ArtifactStore, BrokenCheckpoint
from worker.threads import Outage, log_failure
from zeta_core.contract.job.checkpoint import NAME_PATTERN, step_of
from zeta_core.contract.job.events import LogLine, StatusLine, WarningLine
from zeta_core.contract.job.job import JobError
from zeta_core.contract.job.status import JobStatus, StatusReason

TRIES_SECONDS = 60.0
LAST_TRIES_SECONDS = 600.0  # for what an ended training leaves: the device is free, and its work would be lost
REST_SECONDS = 2.0

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
        self._trouble = Outage(f"The artifact store refuses a checkpoint of {job_id}")
        self._replaced: dict[int, dict[str, Any]] = {}
        self._not_stored: JobError | None = None
        self.keep = frozenset[str]()  # what other jobs need, as the server said with the last checkpoint

    def add(self, number: int, name: str) -> None:
        """Line ``number`` of the journal tells of the checkpoint ``name``."""
        self._waiting.append((number, name))

    def step(self, *, is_over: bool = False) -> None:
        """Go on with the checkpoint under way, or begin with the next one; returns at once.

        ``is_over``: nothing of the training is left, so the store is tried for longer, unless it is full.
        """
        if not self._waiting:
            return
        number, name = self._waiting[0]
        now = time.monotonic()
        if not NAME_PATTERN.match(name):
            self._give_up(number, name, f"The training told of a checkpoint by the name {name[:100]!r}, which is none.")
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
            elif now - self._began < (LAST_TRIES_SECONDS if is_over and not _is_full(error) else TRIES_SECONDS):
                self._trouble.begin(error)
                self._next_try = now + REST_SECONDS
            else:
                self._give_up(number, name, f"The checkpoint {name} could not be stored: {error}", error)

    def is_settled(self, number: int) -> bool:
        """Whether line ``number`` may be published: its checkpoint is stored, or is known not to be."""
        return all(number < waiting for waiting, _ in self._waiting)

    def truth(self, number: int, line: dict[str, Any]) -> dict[str, Any]:
        """What is to be published as line ``number``: the line itself, or what became of it."""
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
        """The server has stored the line of this checkpoint: the store may forget what it replaces, except ``keep``."""
        self.keep = frozenset(keep)
        step = step_of(name)
        if step is not None:
            work = self._executor.submit(self._prune, step, self.keep)
            log_failure(work, f"Old checkpoints of {self._job_id} could not be removed")

    def _done(self) -> None:
        self._waiting.pop(0)
        self._began = self._next_try = 0.0

    def _give_up(self, number: int, name: str, message: str, error: BaseException | None = None) -> None:
        self._done()
        if step_of(name) is not None and isinstance(error, BrokenCheckpoint) and not (self._output / name).exists():
            replaced = f"{name} was removed by the training, which had newer ones, before it could be stored."
            self._replaced[number] = LogLine(message=replaced).model_dump(mode="json")
            return
        logger.error("%s", message, extra={"action": "store", "job_id": self._job_id})
        self._replaced[number] = WarningLine(code="checkpoint_not_stored", message=message).model_dump(mode="json")
        if name == "final":
            reason = StatusReason.DISK_FULL if _is_full(error) else StatusReason.TRAIN_ERROR
            self._not_stored = JobError(code=reason, message=message)

    def _prune(self, step: int, keep: frozenset[str]) -> None:
        self._store.prune(self._job_id, self._save_total_limit, published_step=step, keep=keep)


def _is_full(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
