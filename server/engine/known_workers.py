"""Tracks the known workers: their latest heartbeats, and how long each has been silent.

All times use this server's monotonic clock, and silence counts only while Redis is reachable. The silence of every
worker restarts at zero when this server starts, when Redis becomes reachable again, and after this server was paused
(by a signal or by a suspended machine): during those times no heartbeat could have arrived.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime

from zeta_core.contract.job.events import utc_now
from zeta_core.contract.wire.messages import (
    HEARTBEAT_GONE_SECONDS,
    BadMessage,
    Heartbeat,
    parse_folder_id,
    read_heartbeat,
)

PAUSED_SECONDS = 5.0  # heartbeats are read twice a second; a longer gap means that the server was paused
MAX_PROCESSES = 10_000  # whose highest beats are remembered
UNLISTED_SECONDS = 86_400.0  # a worker silent for a day is no longer listed


@dataclass
class _LatestHeartbeat:
    heartbeat: Heartbeat
    received_at: float  # monotonic
    last_seen_at: datetime  # the same time, on the system clock
    proven: bool  # a heartbeat arrived while this server was connected; older entries may be from a dead worker


class KnownWorkers:
    def __init__(self, secret: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._secret = secret
        self._clock = clock
        self._seen: dict[str, _LatestHeartbeat] = {}
        self._last_seen_in: dict[tuple[str, str], float] = {}  # by worker and folder (monotonic)
        self._highest_beats: dict[tuple[str, str], int] = {}  # by worker and incarnation
        self._connected_since: float | None = None
        self._read_at = clock()
        self.was_read = False  # whether reading heartbeats was attempted at least once
        self._invalid: dict[bytes | str, str] = {}

    @property
    def is_connected(self) -> bool:
        """Whether heartbeats were read successfully in the last few seconds."""
        return self._connected_since is not None and self._clock() - self._read_at < PAUSED_SECONDS

    def unreachable(self) -> None:
        """Redis is unreachable: until it answers again, no worker counts as silent."""
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
        self._invalid = {}
        for field, entry in entries.items():
            heartbeat = self._read(field, entry)
            if heartbeat is None:
                continue
            name = heartbeat.worker
            earlier = self._seen.get(name)
            is_new = self._is_new(heartbeat)
            if earlier is not None and not is_new:
                continue
            if earlier is None:
                proven = is_new and not is_first_read
                self._seen[name] = _LatestHeartbeat(heartbeat, now, utc_now(), proven=proven)
                changed = True
            else:
                changed = changed or not earlier.proven or earlier.heartbeat.all_slots != heartbeat.all_slots
                changed = changed or earlier.heartbeat.stopping != heartbeat.stopping
                changed = changed or earlier.heartbeat.disk_low != heartbeat.disk_low
                self._seen[name] = _LatestHeartbeat(heartbeat, now, utc_now(), proven=True)
            if folder := parse_folder_id(heartbeat.incarnation):
                self._last_seen_in[name, folder] = now
        return changed

    def _is_new(self, heartbeat: Heartbeat) -> bool:
        """Whether this server has not seen the beat yet, nor a later one of the same process.

        Each beat counts once, so writing overheard heartbeats into Redis again doesn't make a stopped worker ready.
        """
        key = (heartbeat.worker, heartbeat.incarnation)
        if heartbeat.beat <= self._highest_beats.get(key, -1):
            return False
        self._highest_beats.pop(key, None)  # the process seen last is at the end
        self._highest_beats[key] = heartbeat.beat
        if len(self._highest_beats) > MAX_PROCESSES:
            del self._highest_beats[next(iter(self._highest_beats))]
        return True

    def invalid(self) -> dict[bytes | str, str]:
        """The fields without a valid heartbeat in the latest update, with the reasons."""
        return self._invalid

    def workers(self) -> list[Heartbeat]:
        """The latest heartbeat of every worker that was seen within a day, sorted by name."""
        return [seen.heartbeat for _, seen in sorted(self._seen.items()) if self._is_listed(seen)]

    def unlisted(self) -> list[str]:
        """The workers that have been silent for more than `UNLISTED_SECONDS`."""
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
            and seen.proven
            and self._connected_since is not None
            and self._clock() - max(seen.received_at, self._connected_since) < HEARTBEAT_GONE_SECONDS
        )

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
        return self._clock() - max(seen.received_at, self._connected_since) <= UNLISTED_SECONDS

    def _read(self, name: bytes | str, entry: bytes | str) -> Heartbeat | None:
        """The signed heartbeat in one field of the hash; an invalid one is recorded for `invalid`."""
        try:
            heartbeat = read_heartbeat(entry, self._secret)
            if heartbeat.worker.encode() != (name if isinstance(name, bytes) else name.encode()):
                raise BadMessage(f"it is the heartbeat of {heartbeat.worker!r}, stored in the field {name!r}")
        except BadMessage as error:
            self._invalid[name] = f"the heartbeat of the worker {name!r} is invalid: {error}"
            return None
        return heartbeat
