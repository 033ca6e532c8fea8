"""A job's full log: the output of all attempts in order, each preceded by a header line.

An attempt on several workers has a log for each node, in the order of their ranks.

The worker appends the log to the artifact store. It is read in chunks, so its size doesn't matter.

Proxies cut idle connections, so a followed log without output sends keep-alives: a carriage return every 15 seconds,
which terminals don't show. A program that needs the exact bytes sets ``quiet_seconds`` instead. Then there are no
keep-alives, the response ends normally after that time without output, and the program continues with ``offset``, the
number of bytes that it has received (docs/decisions/0020-http-limits-and-proxies.md).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from sqlalchemy import select

from server.artifacts import attempt_log_key
from server.database.placements import PlacementRow
from server.database.tables import AttemptRow, JobRow
from server.jobs.event_stream import IsDisconnected
from server.service import Service
from zeta_core.contract.errors import NotFound
from zeta_core.contract.job.status import ENDED, JobStatus
from zeta_core.system.artifact_store import ArtifactStore, storage_errors

CHUNK_BYTES = 1 << 18
POLL_SECONDS = 0.5  # polling interval of a followed log
BACKWARD_BYTES = 1 << 16
KEEP_ALIVE_SECONDS = 15.0  # like the event stream; proxies often cut connections after 60 s without data
KEEP_ALIVE = b"\r"


@dataclass(frozen=True)
class LoggedAttempt:
    """The log of an attempt, or of one node of it; ``number`` counts them in their order, from 1."""

    number: int
    header: bytes
    store: ArtifactStore
    key: PurePosixPath
    is_over: bool


async def read_attempts(service: Service, job_id: str, attempt: int | None) -> tuple[list[LoggedAttempt], bool]:
    """The requested attempts, and whether the job has ended. Raises `NotFound`."""
    async with service.database.read() as session:
        job = await session.get(JobRow, job_id)
        query = select(AttemptRow).where(AttemptRow.job_id == job_id).order_by(AttemptRow.attempt)
        rows = list(await session.scalars(query))
        several = PlacementRow.job_id == job_id
        nodes = list(await session.scalars(select(PlacementRow).where(several).order_by(PlacementRow.node_rank)))
    has_ended = job is None or JobStatus(job.status) in ENDED
    if attempt is not None:
        rows = [row for row in rows if row.attempt == attempt]
        if not rows:
            raise NotFound(
                f"Job {job_id} has no attempt {attempt}; `zeta job {job_id}` lists its attempts.",
                code="attempt_not_found",
                param="attempt",
            )
        has_ended = has_ended or rows[0].finished_at is not None
    logs = [(row, rank, worker) for row in rows for rank, worker in _nodes_of(row, nodes)]
    return [_to_logged_attempt(service, number, *log) for number, log in enumerate(logs, start=1)], has_ended


async def require_readable(service: Service, job_id: str, attempt: int | None) -> None:
    """Raise `NotFound`, or `Unavailable` if the store fails, before the response with the log begins."""
    attempts, _ = await read_attempts(service, job_id, attempt)
    if attempts:
        await asyncio.to_thread(_size, attempts[-1])


def _nodes_of(row: AttemptRow, nodes: Sequence[PlacementRow]) -> list[tuple[int, str]]:
    """The rank and worker of each node; an attempt on one worker has node 0 only."""
    several = [(node.node_rank, node.worker) for node in nodes if node.attempt == row.attempt]
    return several or [(0, row.worker)]


def _to_logged_attempt(service: Service, number: int, row: AttemptRow, rank: int, worker: str) -> LoggedAttempt:
    node = f", node {rank}" if row.num_nodes > 1 else ""
    header = f"=== attempt {row.attempt}{node} on {worker}, started {row.started_at:%Y-%m-%dT%H:%M:%SZ} ===\n"
    key = attempt_log_key(row.job_id, row.attempt, rank)
    return LoggedAttempt(number, header.encode(), service.artifacts.store, key, row.finished_at is not None)


@dataclass(frozen=True)
class LogSelection:
    """The part of a job's log to read, and whether to follow it."""

    attempt: int | None = None  # unset: all of them
    tail: int | None = None  # only the last lines
    offset: int = 0  # number of bytes that the reader already has
    follow: bool = False  # until the job has ended
    quiet_seconds: float | None = None  # with follow: end after this time without output, and send no keep-alives


async def read(
    service: Service, job_id: str, selection: LogSelection, is_disconnected: IsDisconnected
) -> AsyncGenerator[bytes]:
    """The log's bytes after ``offset``, with keep-alives for a followed log.

    A followed log ends when the job ends, when its reader disconnects, or after ``quiet_seconds``.
    """
    attempts, has_ended = await read_attempts(service, job_id, selection.attempt)
    starts = await asyncio.to_thread(_tail_starts, attempts, selection.tail) if selection.tail is not None else {}
    last = min(starts, default=1) - 1  # attempts up to this one were sent, or precede the tail
    separator = b""  # before the next header: a line break if the log before it does not end with one
    skip = _Skip(selection.offset)
    idle = _Idle(selection.quiet_seconds)
    with service.engine.event_signal.subscribe(job_id) as subscription, service.stopping.wakes(subscription):

        async def wait_for_output() -> bool:
            """Wait for more output; returns whether the reader still wants it."""
            await subscription.wait(POLL_SECONDS)
            return not idle.is_over and not await is_disconnected()

        while True:
            for logged in attempts:
                if logged.number <= last:
                    continue
                last = logged.number
                if head := skip.drop_from(separator + logged.header):
                    yield head
                separator = b""
                start = starts.get(logged.number, 0)
                offset = start + skip.jump(await asyncio.to_thread(_size, logged) - start)
                while True:
                    chunk = await asyncio.to_thread(_read, logged, offset)
                    if chunk:
                        offset += len(chunk)
                        separator = b"" if chunk.endswith(b"\n") else b"\n"
                        if rest := skip.drop_from(chunk):
                            yield rest
                            idle.reset()
                    elif not selection.follow or logged.is_over or service.stopping.requested:
                        break
                    elif not await wait_for_output():
                        return
                    else:
                        if idle.needs_keep_alive():
                            yield KEEP_ALIVE
                        now, has_ended = await read_attempts(service, job_id, selection.attempt)
                        logged = next((current for current in now if current.number == logged.number), logged)
            if not selection.follow or has_ended or service.stopping.requested or not await wait_for_output():
                return
            if idle.needs_keep_alive():
                yield KEEP_ALIVE
            attempts, has_ended = await read_attempts(service, job_id, selection.attempt)


class _Skip:
    """Skips the bytes that the reader already has."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes

    def drop_from(self, piece: bytes) -> bytes:
        """The part of ``piece`` that the reader does not have yet."""
        rest = piece[self._num_bytes :]
        self._num_bytes -= len(piece) - len(rest)
        return rest

    def jump(self, size: int) -> int:
        """How many of the next ``size`` bytes to skip unread. The last byte is always read, as it may end a line."""
        jumped = max(0, min(self._num_bytes, size - 1))
        self._num_bytes -= jumped
        return jumped


class _Idle:
    """Measures how long a followed log has sent no output."""

    def __init__(self, quiet_seconds: float | None) -> None:
        self._quiet_seconds = quiet_seconds
        self.reset()

    def reset(self) -> None:
        """Start measuring again, because bytes were sent."""
        self._since = time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether ``quiet_seconds`` have passed without output."""
        return self._quiet_seconds is not None and time.monotonic() - self._since >= self._quiet_seconds

    def needs_keep_alive(self) -> bool:
        """Whether a keep-alive is due; returning true restarts the interval."""
        if self._quiet_seconds is not None or time.monotonic() - self._since < KEEP_ALIVE_SECONDS:
            return False
        self.reset()
        return True


@storage_errors()
def _size(logged: LoggedAttempt) -> int:
    return logged.store.size(logged.key) or 0  # nothing may have been written yet


@storage_errors()
def _read(logged: LoggedAttempt, offset: int) -> bytes:
    try:
        with logged.store.open(logged.key) as file:
            file.seek(offset)
            return file.read(CHUNK_BYTES)
    except FileNotFoundError:  # nothing was written yet
        return b""


def _tail_starts(attempts: list[LoggedAttempt], lines: int) -> dict[int, int]:
    """The offset of the last ``lines`` lines by attempt; earlier attempts are omitted."""
    starts: dict[int, int] = {}
    for logged in reversed(attempts):
        starts[logged.number], num_lines = _last_lines(logged, lines)
        lines -= num_lines
        if lines <= 0:
            break
    return starts


@storage_errors()
def _last_lines(logged: LoggedAttempt, lines: int) -> tuple[int, int]:
    """The offset at which the last ``lines`` lines of a file begin, and how many lines there are."""
    try:
        file = logged.store.open(logged.key)
    except FileNotFoundError:
        return 0, 0
    with file:
        end = file.seek(0, 2)
        if lines == 0 or end == 0:
            return end, 0
        file.seek(end - 1)
        position = end - 1 if file.read(1) == b"\n" else end  # a final newline doesn't start another line
        seen = 0
        while position > 0:
            start = max(0, position - BACKWARD_BYTES)
            file.seek(start)
            block = file.read(position - start)
            at = len(block)
            while (at := block.rfind(b"\n", 0, at)) != -1:
                seen += 1
                if seen == lines:
                    return start + at + 1, lines
            position = start
    return 0, seen + 1
