"""Applies the lines of a run's journal to its job, each exactly once.

A line is identified by job, attempt and line number, starting at 1. Under the job's row lock, only the next expected
line is stored; a lower number is a repetition and a higher one a gap, and both are ignored. The acknowledgement tells
the worker where to continue. Lines of an attempt that isn't the running one are ignored.

The number of log, sample and progress events per job is limited. A warning marks the first event that was dropped.
Later events still update the job's progress, but aren't stored. Events of other types are always stored.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import isfinite
from typing import Any

from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.checkpoints import protected_checkpoints, record_checkpoint
from server.database.events import EventBatch, warn
from server.database.placements import PlacementRow, placements_of
from server.database.tables import AttemptRow, JobRow
from server.database.transitions import lock_job
from server.engine.endings import end_attempt
from server.engine.nodes.ends import record_node_end
from server.engine.nodes.journals import apply_node_line
from server.settings import ServerSettings
from zeta_core.contract.job.events import (
    JOURNAL_LINE,
    CheckpointLine,
    EventType,
    JournalLine,
    ProgressLine,
    StatusLine,
    WarningLine,
)
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.secret_texts import masked, masked_values
from zeta_core.contract.wire.messages import JournalAck, JournalBatch

MAX_EVENTS = int(ServerSettings.model_fields["max_job_events"].default)
LIMITED: frozenset[EventType] = frozenset({"log", "sample", "progress"})
_NOT_FIELDS = {"type", "created_at"}  # columns of their own


@dataclass(frozen=True)
class AppliedBatch:
    """The result of applying a batch; ``num_applied`` counts its new lines.

    ``holder`` is the worker that holds the attempt, if that is not the sender, whose batch was rejected.
    ``has_first_step``: the attempt has made a step. ``is_first_step``: this batch contains the first one.
    """

    ack: JournalAck
    num_applied: int
    attempt_ended: bool
    holder: str | None = None
    has_first_step: bool = False
    is_first_step: bool = False

    @property
    def ended_before_first_step(self) -> bool:
        return self.attempt_ended and not self.has_first_step


async def apply_batch(session: AsyncSession, batch: JournalBatch, *, max_events: int = MAX_EVENTS) -> AppliedBatch:
    """Store the new lines of ``batch`` in this transaction; the caller sends the acknowledgement after the commit.

    ``max_events`` limits the events of the `LIMITED` types for each job.
    """
    job = await lock_job(session, batch.job_id)
    attempt = await session.get(AttemptRow, (batch.job_id, batch.attempt)) if job else None
    if job is None or attempt is None:
        return AppliedBatch(_ack(batch, 0, fenced=True), 0, False)
    placement = await _placement(session, attempt, batch.worker)
    if placement is None and attempt.worker != batch.worker:
        return AppliedBatch(_ack(batch, 0, fenced=True), 0, False, holder=attempt.worker)
    if job.status != JobStatus.RUNNING or job.attempt != batch.attempt:
        stored_line = attempt.stored_line if placement is None or not placement.node_rank else placement.stored_line
        return AppliedBatch(_ack(batch, stored_line, fenced=True), 0, False)
    if placement is not None and placement.node_rank:
        return await _apply_node_batch(session, job, placement, batch)
    protected = set[str]()
    if any(raw.get("type") == "checkpoint" for raw in batch.lines):
        protected = await protected_checkpoints(session, job)
    applier = _BatchApplier(session, job, attempt, max_events, protected, placement)
    stored_line, had_first_step = attempt.stored_line, attempt.first_step is not None
    for number, raw in enumerate(batch.lines, batch.first_line):
        if number != stored_line + 1:
            continue
        await applier.apply(number, parse_line(raw))
        stored_line = number
        if job.status != JobStatus.RUNNING:
            break
    applier.store()
    num_applied, attempt.stored_line = stored_line - attempt.stored_line, stored_line
    ended = job.status != JobStatus.RUNNING
    ack = _ack(batch, stored_line, fenced=False).model_copy(update={"keep": sorted(protected)})
    has_first_step = attempt.first_step is not None
    return AppliedBatch(
        ack, num_applied, ended, has_first_step=has_first_step, is_first_step=has_first_step and not had_first_step
    )


async def _placement(session: AsyncSession, attempt: AttemptRow, worker: str) -> PlacementRow | None:
    """The worker's node of an attempt on several workers."""
    placements = await placements_of(session, attempt.job_id, attempt.attempt) if attempt.num_nodes > 1 else []
    return next((row for row in placements if row.worker == worker), None)


async def _apply_node_batch(
    session: AsyncSession, job: JobRow, placement: PlacementRow, batch: JournalBatch
) -> AppliedBatch:
    """Apply the lines of a node after node 0."""
    before = placement.stored_line
    for number, raw in enumerate(batch.lines, batch.first_line):
        if number == placement.stored_line + 1 and placement.last_line is None:
            await apply_node_line(session, job, placement, parse_line(raw), number=number)
    stored_line, ended = placement.stored_line, job.status != JobStatus.RUNNING
    # Steps are counted on node 0, whose batches alone complete the trace of the job's start.
    return AppliedBatch(_ack(batch, stored_line, fenced=False), stored_line - before, ended, has_first_step=True)


def parse_line(raw: dict[str, Any]) -> JournalLine:
    """The line as a contract model, without secrets; samples keep the text that the model has generated.

    An invalid line becomes a warning, so that later lines are not blocked.
    """
    try:
        line = sanitize(raw)
        return JOURNAL_LINE.validate_python(line if raw.get("type") == "sample" else masked_values(line))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in fault["loc"])
        message = f"Invalid line in the run's journal ({field}: {fault['msg']}): {str(raw)[:300]}"
        return WarningLine(code="unreadable_line", message=masked(sanitize(message)))


def sanitize(value: Any) -> Any:
    """The value without contents that databases reject: NUL, lone surrogates and non-finite numbers."""
    kind = type(value)  # exactly one of JSON's types; faster than `isinstance`
    if kind is str:
        if value.isascii() and "\0" not in value:
            return value
        return value.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
    if kind is float:
        return value if isfinite(value) else None
    if kind is dict:
        return {
            name if name.isascii() and "\0" not in name else sanitize(name): sanitize(item)
            for name, item in value.items()
        }
    if kind is list:
        return [sanitize(item) for item in value]
    return value


class _BatchApplier:
    """Applies the lines of one batch to a locked job and its running attempt.

    What every line changes is kept here and written to the rows once, by `store`, because assigning an attribute of a
    row takes longer than everything else.
    """

    def __init__(
        self,
        session: AsyncSession,
        job: JobRow,
        attempt: AttemptRow,
        max_events: int,
        protected: Collection[str],
        placement: PlacementRow | None,
    ) -> None:
        """``placement`` is that of node 0 if the attempt has several nodes."""
        self._session, self._job, self._attempt = session, job, attempt
        self._max_events, self._protected, self._placement = max_events, protected, placement
        self._events = EventBatch(session, job)
        self._progress: dict[str, Any] = {}
        self._first_step, self._last_step = attempt.first_step, attempt.last_step
        self._num_limited_events = job.num_limited_events
        self._attempt_number = attempt.attempt

    def store(self) -> None:
        """Hand over the events, and update the rows."""
        if self._progress:
            self._job.progress = {**(self._job.progress or {}), **self._progress}
        self._attempt.first_step, self._attempt.last_step = self._first_step, self._last_step
        self._job.num_limited_events = self._num_limited_events
        self._events.store()

    async def apply(self, number: int, line: JournalLine) -> None:
        job, attempt, fields = self._job, self._attempt, _fields(line)
        match line:
            case StatusLine() if line.status != JobStatus.RUNNING:
                self.store()
                if self._placement is None:
                    await end_attempt(self._session, job, line, line=number)
                else:
                    await record_node_end(self._session, job, self._placement, line, number)
                return  # `change_status` has appended the event
            case StatusLine():
                if line.resolved_spec is not None:
                    job.resolved_spec = job.resolved_spec.with_report(line.resolved_spec)
                    attempt.device_kind = line.resolved_spec.device_kind
            case ProgressLine():
                self._progress.update(fields)
                self._progress.pop("steps", None)  # the curve is in the event
                if line.step is not None:
                    self._first_step = line.step if self._first_step is None else min(self._first_step, line.step)
                    self._last_step = line.step
            case CheckpointLine():
                await record_checkpoint(
                    self._session, job, line, attempt=self._attempt_number, protected=self._protected
                )
                if line.request is not None:
                    fulfilled = min(line.request, job.num_save_requests)
                    job.fulfilled_save_request = max(job.fulfilled_save_request, fulfilled)
            case WarningLine():
                warn(job, line)
            case _:
                pass
        if line.type not in LIMITED or self._fits_limit():
            self._append(line, fields, number=number)

    def _append(self, line: JournalLine, fields: dict[str, Any], *, number: int | None) -> None:
        """Store a line as an event; ``number`` is its number in the journal, or ``None`` for the server's own lines."""
        self._events.append(
            attempt=self._attempt_number, line=number, type=line.type, created_at=line.created_at, fields=fields
        )

    def _fits_limit(self) -> bool:
        """Count one more event of a limited type; returns whether to store it. The first dropped one adds a warning."""
        if self._num_limited_events < self._max_events:
            self._num_limited_events += 1
            return True
        if self._num_limited_events == self._max_events:
            self._num_limited_events += 1
            message = (
                f"The job has reached its limit of {self._max_events} log, sample and progress events; "
                "later ones are not stored."
            )
            line = WarningLine(code="events_cut", message=message)
            warn(self._job, line)
            self._append(line, _fields(line), number=None)
        return False


def _fields(line: JournalLine) -> dict[str, Any]:
    return line.model_dump(mode="json", exclude=_NOT_FIELDS, exclude_none=True)


def _ack(batch: JournalBatch, stored_line: int, *, fenced: bool) -> JournalAck:
    return JournalAck(job_id=batch.job_id, attempt=batch.attempt, stored_line=stored_line, fenced=fenced)
