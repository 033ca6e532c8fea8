"""Publishes one attempt's journal: a batch at a time, the next when the server has stored this one.

A checkpoint is in the artifact store before its line is published. The line that ends the attempt is held back until
`release_end`. A batch is sent again until it is acknowledged, so it survives whatever Redis loses; the
acknowledgement says where to go on. Work on big files is done by the executor's threads.
"""

from __future__ import annotations

import errno
import logging
import time
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from worker.journal import JournalReader
from worker.store import ArtifactStore, BrokenCheckpoint
from zeta_core.contract.checkpoint import NAME_PATTERN
from zeta_core.contract.events import StatusLine, WarningLine
from zeta_core.contract.job import JobError, JobStatus, StatusReason
from zeta_core.contract.messages import MAX_BATCH_LINES, JournalAck, JournalBatch

RESEND_SECONDS = 2.0
MAX_BATCH_BYTES = 512 * 1024
STORE_TRIES_SECONDS = 60.0  # how long a store that refuses a checkpoint (a full disk, a lost mount) is tried again
STORE_REST_SECONDS = 2.0

logger = logging.getLogger(__name__)


class Publisher:
    def __init__(
        self,
        journal: JournalReader,
        store: ArtifactStore,
        executor: Executor,
        *,
        job_id: str,
        attempt: int,
        worker: str,
        output: Path,
        save_total_limit: int,
    ) -> None:
        self.fenced = False
        self._journal = journal
        self._store = store
        self._executor = executor
        self._job_id = job_id
        self._attempt = attempt
        self._worker = worker
        self._output = output
        self._save_total_limit = save_total_limit
        self._next = 1  # the first line that is not known to be stored
        self._batch: JournalBatch | None = None
        self._sent_at = 0.0
        self._end_released = False
        self._putting: tuple[int, Future[None], float] | None = None  # line, work, when it was first tried
        self._put_again_at = 0.0
        self._put_lines: set[int] = set()
        self._replaced: dict[int, dict[str, Any]] = {}
        self._not_stored: JobError | None = None
        self._prune = False

    @property
    def is_done(self) -> bool:
        """Whether the line that ends the attempt is stored."""
        return self._journal.last_line is not None and self._next > self._journal.last_line

    @property
    def only_the_end_is_left(self) -> bool:
        """Whether every line but the one that ends the attempt is stored."""
        return self._journal.last_line is not None and self._next >= self._journal.last_line

    def release_end(self) -> None:
        """Nothing is left of the attempt: its last line may be published."""
        self._end_released = True

    def due(self) -> JournalBatch | None:
        """The batch to send now: a new one, or the present one again when its answer is overdue."""
        if self.fenced or self.is_done:
            return None
        now = time.monotonic()
        if self._batch is None:
            self._batch = self._gather()
        elif now - self._sent_at < RESEND_SECONDS:
            return None
        self._sent_at = now
        return self._batch

    def acknowledge(self, ack: JournalAck) -> None:
        """Go on behind the last stored line, wherever the server says it is."""
        if self._batch is not None and any(line.get("type") == "checkpoint" for line in self._batch.lines):
            self._prune = True
        if ack.stored_line + 1 != self._next or self._batch is None or ack.fenced:
            self._next, self._batch = ack.stored_line + 1, None
        if self._prune and not ack.fenced:
            self._prune = False
            self._executor.submit(self._prune_store)
        self.fenced = ack.fenced and not self.is_done

    def _gather(self) -> JournalBatch | None:
        lines: list[dict[str, Any]] = []
        size = 0
        for number in range(self._next, len(self._journal) + 1):
            if len(lines) >= MAX_BATCH_LINES or (lines and size + self._journal.size(number) > MAX_BATCH_BYTES):
                break
            is_end = number == self._journal.last_line
            if is_end and not self._end_released:
                break
            line = self._replaced.get(number) or self._journal.read(number)
            if line.get("type") == "checkpoint" and not self._is_put(number, line):
                break
            if is_end:
                line = self._true_end(line)
            lines.append(self._replaced.get(number, line))
            size += self._journal.size(number)
        if not lines:
            return None
        return JournalBatch(
            job_id=self._job_id, attempt=self._attempt, worker=self._worker, first_line=self._next, lines=lines
        )

    def _is_put(self, number: int, line: dict[str, Any]) -> bool:
        """Whether the line may be published: its checkpoint is stored, or it was replaced by the reason why not."""
        if number in self._put_lines:
            return True
        name = str(line.get("name"))
        if not NAME_PATTERN.match(name):
            self._give_up(number, name, f"The training told of a checkpoint by the name {name[:100]!r}, which is none.")
            return True
        now = time.monotonic()
        if self._putting is None or self._putting[0] != number:
            self._putting = (number, self._submit_put(name), now)
            return False
        _, work, began = self._putting
        if not work.done():
            return False
        error = work.exception()
        if error is None:
            self._put_lines.add(number)
        elif not isinstance(error, OSError | BrokenCheckpoint):
            raise error
        elif isinstance(error, OSError) and now - began < STORE_TRIES_SECONDS:
            if now >= self._put_again_at:
                logger.warning("%s of %s cannot be stored yet: %s", name, self._job_id, error)
                self._put_again_at = now + STORE_REST_SECONDS
                self._putting = (number, self._submit_put(name), began)
            return False
        else:
            self._give_up(number, name, f"The checkpoint {name} could not be stored: {error}", error)
        self._putting = None
        return True

    def _submit_put(self, name: str) -> Future[None]:
        return self._executor.submit(self._store.put_checkpoint, self._job_id, name, self._output / name)

    def _give_up(self, number: int, name: str, message: str, error: BaseException | None = None) -> None:
        """Publish a warning in the place of the checkpoint; without its final one a training did not succeed."""
        logger.error("%s", message, extra={"action": "store", "job_id": self._job_id, "attempt": self._attempt})
        self._replaced[number] = WarningLine(code="checkpoint_not_stored", message=message).model_dump(mode="json")
        if name == "final":
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = StatusReason.DISK_FULL if full else StatusReason.TRAIN_ERROR
            self._not_stored = JobError(code=reason, message=message)

    def _true_end(self, line: dict[str, Any]) -> dict[str, Any]:
        if self._not_stored is None or line.get("status") != JobStatus.SUCCEEDED:
            return line
        return StatusLine(
            status=JobStatus.FAILED,
            reason=StatusReason(self._not_stored.code),
            message=self._not_stored.message,
            error=self._not_stored,
        ).model_dump(mode="json")

    def _prune_store(self) -> None:
        try:
            self._store.prune(self._job_id, self._save_total_limit)
        except OSError as error:
            logger.warning("Old checkpoints of %s could not be removed: %s", self._job_id, error)
