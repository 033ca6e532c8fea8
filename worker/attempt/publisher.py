"""Publishes one attempt's journal in batches: the next one once the server has stored the current one.

A checkpoint is in the artifact store before its line is published. The line that ends the attempt is held back until
`release_end`. A batch is sent again until it is acknowledged, so no loss of data in Redis matters; the
acknowledgement contains the last stored line.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from worker.artifacts.checkpoint_uploads import CheckpointUploads
from worker.attempt.journal_reader import JournalReader
from zeta_core.contract.wire.messages import MAX_BATCH_LINES, JournalAck, JournalBatch

RESEND_SECONDS = 2.0  # doubled each time, so that an outage of the server for days doesn't fill Redis
MAX_RESEND_SECONDS = 16.0
MAX_BATCH_BYTES = 512 * 1024


class Publisher:
    """``is_fenced``: the server considers the attempt over, so nothing more is published."""

    def __init__(
        self,
        journal: JournalReader,
        uploads: CheckpointUploads,
        *,
        job_id: str,
        attempt: int,
        worker: str,
        amend: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> None:
        """``amend`` adds what the worker knows to a line before it is published."""
        self.is_fenced = False
        self._journal = journal
        self._uploads = uploads
        self._job_id = job_id
        self._attempt = attempt
        self._worker = worker
        self._amend = amend
        self._next = 1  # the first line that is not known to be stored
        self._batch: JournalBatch | None = None
        self._sent_at = 0.0
        self._resend_seconds = RESEND_SECONDS
        self._end_released = False

    @property
    def is_done(self) -> bool:
        """Whether the line that ends the attempt is stored."""
        return self._journal.last_line is not None and self._next > self._journal.last_line

    @property
    def has_only_the_end_left(self) -> bool:
        """Whether every line but the one that ends the attempt is stored."""
        return self._journal.last_line is not None and self._next >= self._journal.last_line

    def release_end(self) -> None:
        """Let the last line be published, because the attempt has no processes left."""
        self._end_released = True

    def next_batch(self) -> JournalBatch | None:
        """The batch to send now: a new one, or the current one again if its acknowledgement is overdue."""
        if self.is_fenced or self.is_done:
            return None
        now = time.monotonic()
        if self._batch is None:
            self._batch, self._resend_seconds = self._gather(), RESEND_SECONDS
        elif now - self._sent_at < self._resend_seconds:
            return None
        else:
            self._resend_seconds = min(2 * self._resend_seconds, MAX_RESEND_SECONDS)
        self._sent_at = now
        return self._batch

    def acknowledge(self, ack: JournalAck) -> None:
        """Continue after the last line that the server has stored, which may be an earlier one."""
        if self._batch is not None and not ack.fenced:
            stored = self._batch.lines[: max(0, ack.stored_line + 1 - self._batch.first_line)]
            for name in [str(line.get("name")) for line in stored if line.get("type") == "checkpoint"]:
                self._uploads.published(name, keep=ack.keep)
        if ack.stored_line + 1 != self._next or ack.fenced:
            self._next, self._batch = ack.stored_line + 1, None
        self.is_fenced = ack.fenced and not self.is_done

    def _gather(self) -> JournalBatch | None:
        lines: list[dict[str, Any]] = []
        size = 0
        for number in range(self._next, len(self._journal) + 1):
            size += self._journal.size(number)
            if len(lines) >= MAX_BATCH_LINES or (lines and size > MAX_BATCH_BYTES):
                break
            if not self._uploads.is_settled(number) or (number == self._journal.last_line and not self._end_released):
                break
            lines.append(self._amend(self._uploads.published_line(number, self._journal.read(number))))
        if not lines:
            return None
        return JournalBatch(
            job_id=self._job_id, attempt=self._attempt, worker=self._worker, first_line=self._next, lines=lines
        )
