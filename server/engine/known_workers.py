"""Tracks the known workers: their latest heartbeats, and how long each has been silent.

All times use this server's monotonic clock, and silence counts only while Redis is reachable. The silence of every
worker restarts at zero when this server starts, when Redis becomes reachable again, and after this server was paused
(by a signal or by a suspended machine): during those times no heartbeat could have arrived.

Intercepted heartbeats that are written into Redis again don't make a stopped worker ready: each beat counts once, and
only within the clock window. A worker whose clock leaves the window while it runs gets no new jobs, but isn't silent,
because its runs continue. After a restart of this server, such a worker counts as silent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from server.engine.worker_secrets import WorkerSecrets
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.wire.messages import (
    HEARTBEAT,
    HEARTBEAT_GONE_SECONDS,
    WORKERS_HASH,
    Heartbeat,
    SecretRejected,
    parse_folder_id,
)
from zeta_core.contract.wire.signatures import (
    BadMessage,
    BadSender,
    BadTime,
    Envelope,
    Replayed,
    WorkerKey,
    read_heartbeat_envelope,
)
from zeta_core.system.replay_guard import check_time

PAUSED_SECONDS = 5.0  # heartbeats are read twice a second; a longer gap means that the server was paused
MAX_PROCESSES = 10_000  # whose highest beats are remembered
WORKER_EXPIRY_SECONDS = 86_400.0  # a worker that was silent for a day is no longer listed


@dataclass(frozen=True)
class _LatestHeartbeat:
    heartbeat: Heartbeat
    secret_id: str
    nonce: str
    received_at: float  # monotonic
    last_seen_at: datetime  # the same time, on the system clock; that of the heartbeat if it arrived before the start
    is_proven: bool  # a heartbeat arrived while this server was connected; older entries may be from a dead worker
    ahead_seconds: float | None  # by how much the worker's clock is ahead of this server's; none: unknown
    is_in_time: bool  # the clocks differ by less than the clock window


@dataclass(frozen=True)
class _VerifiedEntry:
    """An entry of the hash whose signature was verified with this secret."""

    entry: bytes | str
    worker: str
    secret_id: str


class KnownWorkers:
    def __init__(
        self,
        secrets: WorkerSecrets,
        clock: Callable[[], float] = time.monotonic,
        system_clock: Callable[[], float] = time.time,
    ) -> None:
        self._secrets = secrets
        self._clock = clock
        self._system_clock = system_clock
        self._seen: dict[str, _LatestHeartbeat] = {}
        self._verified: dict[bytes | str, _VerifiedEntry] = {}  # by field of the hash, in the latest update
        self._last_seen_in: dict[tuple[str, str], float] = {}  # by worker and folder (monotonic)
        self._highest_beats: dict[tuple[str, str], int] = {}  # by worker and incarnation
        self._in_time: set[tuple[str, str]] = set()  # processes with at least one beat within the clock window
        self._invalid_since: dict[tuple[str, str], float] = {}  # by worker and incarnation: a secret that is not valid
        self._reported: dict[str, str] = {}  # by worker: the nonce of the last heartbeat reported in `rejected`
        self._connected_since: float | None = None
        self._read_at = clock()
        self.was_read = False  # whether reading heartbeats was attempted at least once
        self.invalid: dict[bytes | str, BadMessage] = {}  # the fields without a valid heartbeat in the latest update
        self.rejected: list[BadMessage] = []  # why valid heartbeats did not count in the latest update
        self.secret_rejections: list[tuple[WorkerKey, SecretRejected]] = []  # to send to workers with an invalid secret

    @property
    def is_connected(self) -> bool:
        """Whether heartbeats were read successfully in the last few seconds."""
        return self._connected_since is not None and self._clock() - self._read_at < PAUSED_SECONDS

    def record_outage(self) -> None:
        """Record that Redis is unreachable: until it answers again, no worker counts as silent."""
        self.was_read = True
        self._connected_since = None

    def update(self, entries: Mapping[bytes, bytes] | Mapping[str, str]) -> bool:
        """Update from the whole hash of heartbeats; returns whether a worker appeared or its offered slots changed."""
        self.was_read = True
        now, changed = self._clock(), False
        if now - self._read_at > PAUSED_SECONDS:
            self._connected_since = None
        self._read_at = now
        is_first_read = self._connected_since is None
        if self._connected_since is None:
            self._connected_since = now
        self.invalid, self.rejected, self.secret_rejections = {}, [], []
        earlier, self._verified = self._verified, {}
        for field, entry in entries.items():
            # Heartbeats are read more often than they are sent, and verifying an entry is the largest part of the work.
            verified = earlier.get(field)
            if verified is not None and verified.entry == entry and self._accepts_secret_of(verified):
                self._verified[field] = verified
                continue
            try:
                envelope, heartbeat = self._read(field, entry)
            except BadMessage as error:
                self.invalid[field] = error
            else:
                changed = self._take(envelope, heartbeat, now, is_first_read=is_first_read) or changed
                self._verified[field] = _VerifiedEntry(entry, heartbeat.worker, envelope.secret_id)
        return changed

    def _accepts_secret_of(self, verified: _VerifiedEntry) -> bool:
        return self._secrets.rejection(verified.worker, verified.secret_id) is None

    def _take(self, envelope: Envelope, heartbeat: Heartbeat, now: float, *, is_first_read: bool) -> bool:
        """Update from one heartbeat; returns whether the worker appeared or its offered slots changed."""
        name = heartbeat.worker
        earlier = self._seen.get(name)
        if earlier is not None and earlier.nonce == envelope.nonce:
            return False
        if not self._is_new(heartbeat):
            self._reject(envelope, Replayed(f"the heartbeat of worker {name} was received before"))
            return False
        try:
            check_time(envelope, self._system_clock())
        except BadTime as error:
            return self._take_late(envelope, heartbeat, earlier, error, now)
        self._in_time.add((name, heartbeat.incarnation))
        self._secrets.note_use(self._secrets.derive(name, envelope.secret_id))
        latest = _LatestHeartbeat(
            heartbeat,
            envelope.secret_id,
            envelope.nonce,
            received_at=now,
            last_seen_at=utc_now(),
            is_proven=earlier is not None or not is_first_read,
            ahead_seconds=None if is_first_read else envelope.sent_at - self._system_clock(),
            is_in_time=True,
        )
        return self._store(latest, earlier, is_heard=True)

    def _take_late(
        self, envelope: Envelope, heartbeat: Heartbeat, earlier: _LatestHeartbeat | None, error: BadTime, now: float
    ) -> bool:
        """Update from a heartbeat outside the clock window. Its worker gets no jobs.

        If it is the first one of a worker, it may be from before this server was started.
        """
        is_running = (heartbeat.worker, heartbeat.incarnation) in self._in_time
        if earlier is not None:
            self._reject(envelope, error)
            if not is_running and earlier.is_in_time:
                return False
        latest = _LatestHeartbeat(
            heartbeat,
            envelope.secret_id,
            envelope.nonce,
            received_at=now if is_running or earlier is None else earlier.received_at,
            last_seen_at=datetime.fromtimestamp(min(envelope.sent_at, self._system_clock()), UTC),
            is_proven=earlier is not None and earlier.is_proven,
            ahead_seconds=None if earlier is None else envelope.sent_at - self._system_clock(),
            is_in_time=False,
        )
        return self._store(latest, earlier, is_heard=is_running or earlier is None)

    def _store(self, latest: _LatestHeartbeat, earlier: _LatestHeartbeat | None, *, is_heard: bool) -> bool:
        """Returns whether the worker appeared or its offered slots changed."""
        beat = latest.heartbeat
        self._seen[beat.worker] = latest
        if is_heard and (folder := parse_folder_id(beat.incarnation)):
            self._last_seen_in[beat.worker, folder] = latest.received_at
        return earlier is None or _offer(earlier) != _offer(latest)

    def _reject(self, envelope: Envelope, error: BadMessage) -> None:
        """Report a heartbeat that does not count, once for all times that it is read."""
        if self._reported.get(envelope.worker) != envelope.nonce:
            self._reported[envelope.worker] = envelope.nonce
            self.rejected.append(error)

    def _is_new(self, heartbeat: Heartbeat) -> bool:
        """Whether this server has not seen the beat yet, nor a later one of the same process."""
        key = (heartbeat.worker, heartbeat.incarnation)
        if heartbeat.beat <= self._highest_beats.get(key, -1):
            return False
        self._highest_beats.pop(key, None)  # the process seen last is at the end
        self._highest_beats[key] = heartbeat.beat
        if len(self._highest_beats) > MAX_PROCESSES:
            oldest = next(iter(self._highest_beats))
            del self._highest_beats[oldest]
            self._in_time.discard(oldest)
        return True

    def workers(self) -> list[Heartbeat]:
        """The latest heartbeat of every worker that was seen within a day, sorted by name."""
        return [seen.heartbeat for _, seen in sorted(self._seen.items()) if self._is_listed(seen)]

    def expired_workers(self) -> list[str]:
        """The workers that have been silent for more than `WORKER_EXPIRY_SECONDS`."""
        return [name for name, seen in self._seen.items() if not self._is_listed(seen)]

    def forget(self, workers: Collection[str]) -> None:
        """Forget workers whose heartbeats were removed from Redis; a new heartbeat makes a worker known again."""
        self._seen = {name: seen for name, seen in self._seen.items() if name not in workers}
        self._last_seen_in = {key: seen_at for key, seen_at in self._last_seen_in.items() if key[0] not in workers}

    def get(self, worker: str) -> Heartbeat | None:
        seen = self._seen.get(worker)
        return seen.heartbeat if seen else None

    def last_seen_at(self, worker: str) -> datetime | None:
        seen = self._seen.get(worker)
        return seen.last_seen_at if seen else None

    def is_alive(self, worker: str) -> bool:
        """Whether the worker can be offered a job: a heartbeat arrived recently while this server was connected."""
        seen = self._seen.get(worker)
        return (
            seen is not None
            and seen.is_proven
            and seen.is_in_time
            and self._secrets.rejection(worker, seen.secret_id) is None
            and self._connected_since is not None
            and self._clock() - max(seen.received_at, self._connected_since) < HEARTBEAT_GONE_SECONDS
        )

    def clock_ahead_seconds(self, worker: str) -> float | None:
        """By how much the worker's clock is ahead of this server's; ``None`` if that is not known."""
        seen = self._seen.get(worker)
        return seen.ahead_seconds if seen is not None else None

    def silent_seconds(self, worker: str, folder: str | None = None) -> float:
        """How long this server has been connected to Redis without a heartbeat from the worker.

        If ``folder`` is given, only heartbeats from that folder count: a worker with the same name in another folder
        doesn't know about the runs in this one.
        """
        if self._connected_since is None:
            return 0.0
        seen = self._seen.get(worker)
        seen_at = (seen.received_at if seen else None) if folder is None else self._last_seen_in.get((worker, folder))
        return self._read_at - max(seen_at or self._connected_since, self._connected_since)

    def _is_listed(self, seen: _LatestHeartbeat) -> bool:
        if self._connected_since is None:
            return True
        return self._clock() - max(seen.received_at, self._connected_since) <= WORKER_EXPIRY_SECONDS

    def _read(self, field: bytes | str, entry: bytes | str) -> tuple[Envelope, Heartbeat]:
        """The signed heartbeat in one field of the hash. Raises `BadMessage`."""
        envelope = read_heartbeat_envelope(entry)
        try:
            key = self._secrets.key_for_reading(envelope)
        except BadSender as error:
            self._answer_rejected(envelope, error)
            raise
        heartbeat = envelope.open(HEARTBEAT, key, channel=WORKERS_HASH)
        if not heartbeat.worker == envelope.worker == (field if isinstance(field, str) else field.decode("latin-1")):
            raise BadSender(f"worker {envelope.worker} sent the heartbeat of {heartbeat.worker!r} in field {field!r}")
        return envelope, heartbeat

    def _answer_rejected(self, envelope: Envelope, error: BadSender) -> None:
        """Let a worker know that its secret is not valid, if the heartbeat is signed with that secret.

        The secret may be new, and added through another server, so the table must have been read since.
        """
        key = self._secrets.derive(envelope.worker, envelope.secret_id)
        with suppress(BadMessage):
            heartbeat = envelope.open(HEARTBEAT, key, channel=WORKERS_HASH)
            check_time(envelope, self._system_clock())
            since = self._invalid_since.setdefault((envelope.worker, heartbeat.incarnation), time.monotonic())
            if not self._secrets.is_newer_than(since):
                return
            self.secret_rejections.append((key, SecretRejected(incarnation=heartbeat.incarnation, reason=str(error))))


def _offer(seen: _LatestHeartbeat) -> object:
    """The parts of a heartbeat that the scheduler uses."""
    beat = seen.heartbeat
    return seen.is_proven, seen.is_in_time, beat.all_slots, beat.stopping, beat.disk_low
