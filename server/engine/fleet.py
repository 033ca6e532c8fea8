"""The workers as this server sees them: their last heartbeats, and for how long each has been silent.

Times are this server's monotonic clock, never the clocks of others, and count only while Redis can be reached: silence
begins anew when this server starts, when Redis returns, and when this server itself stood still (stopped by a signal, a
suspended machine), because a worker cannot be heard through a dead Redis or by a server that does not listen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime

from zeta_core.contract.events import utc_now
from zeta_core.contract.messages import (
    HEARTBEAT_GONE_SECONDS,
    BadMessage,
    Heartbeat,
    place_of,
    read_heartbeat,
)

STOOD_STILL_SECONDS = 5.0  # Redis is asked twice a second
UNLISTED_SECONDS = 86_400.0  # a worker silent for a day is no longer listed


@dataclass
class _Seen:
    heartbeat: Heartbeat
    moved_at: float  # monotonic
    last_seen_at: datetime
    proven: bool  # it appeared or moved while this server watched; what lay in Redis before may be of a dead worker


class Fleet:
    def __init__(self, secret: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._secret = secret
        self._clock = clock
        self._seen: dict[str, _Seen] = {}
        self._places: dict[tuple[str, str], float] = {}  # when a worker was last heard from a folder, monotonic
        self._watching_since: float | None = None
        self._looked_at = clock()
        self.looked = False  # Redis was asked at least once
        self._invalid: dict[bytes | str, str] = {}

    @property
    def watching(self) -> bool:
        """Whether Redis answered the last time it was asked, which is not long ago."""
        return self._watching_since is not None and self._clock() - self._looked_at < STOOD_STILL_SECONDS

    def unreachable(self) -> None:
        """Redis did not answer: nobody's silence counts until it does."""
        self.looked = True
        self._watching_since = None

    def update(self, entries: Mapping[bytes, bytes] | Mapping[str, str]) -> bool:
        """Take in the whole hash of heartbeats; whether a worker came, or changed what it offers."""
        self.looked = True
        now, changed = self._clock(), False
        if now - self._looked_at > STOOD_STILL_SECONDS:
            self._watching_since = None
        self._looked_at = now
        first_look = self._watching_since is None
        if self._watching_since is None:
            self._watching_since = now
        self._invalid = {}
        for field, entry in entries.items():
            heartbeat = self._read(field, entry)
            if heartbeat is None:
                continue
            name = heartbeat.worker
            earlier = self._seen.get(name)
            if earlier is None:
                self._seen[name] = _Seen(heartbeat, now, utc_now(), proven=not first_look)
                changed = True
            elif (earlier.heartbeat.incarnation, earlier.heartbeat.beat) != (heartbeat.incarnation, heartbeat.beat):
                changed = changed or not earlier.proven or earlier.heartbeat.slots != heartbeat.slots
                changed = changed or earlier.heartbeat.stopping != heartbeat.stopping
                changed = changed or earlier.heartbeat.disk_low != heartbeat.disk_low
                self._seen[name] = _Seen(heartbeat, now, utc_now(), proven=True)
            else:
                continue
            if place := place_of(heartbeat.incarnation):
                self._places[name, place] = now
        return changed

    def invalid(self) -> dict[bytes | str, str]:
        """The fields of the last look that hold no valid heartbeat, with the reason."""
        return self._invalid

    def workers(self) -> list[Heartbeat]:
        """The last heartbeat of every worker heard within a day, by name."""
        return [seen.heartbeat for _, seen in sorted(self._seen.items()) if self._is_listed(seen)]

    def unlisted(self) -> list[str]:
        """The workers that were silent for so long that they are no longer listed."""
        return [name for name, seen in self._seen.items() if not self._is_listed(seen)]

    def forget(self, workers: Collection[str]) -> None:
        """Their heartbeats are removed from Redis; one that lives after all comes back with its next."""
        self._seen = {name: seen for name, seen in self._seen.items() if name not in workers}
        self._places = {place: heard_at for place, heard_at in self._places.items() if place[0] not in workers}

    def get(self, worker: str) -> Heartbeat | None:
        seen = self._seen.get(worker)
        return seen.heartbeat if seen else None

    def last_seen_at(self, worker: str) -> datetime | None:
        seen = self._seen.get(worker)
        return seen.last_seen_at if seen else None

    def is_alive(self, worker: str) -> bool:
        """Whether the worker may be offered a job: it was heard while this server watched, and lately."""
        seen = self._seen.get(worker)
        return (
            seen is not None
            and seen.proven
            and self._watching_since is not None
            and self._clock() - max(seen.moved_at, self._watching_since) < HEARTBEAT_GONE_SECONDS
        )

    def silent_seconds(self, worker: str, place: str | None = None) -> float:
        """How long this server has listened to Redis without hearing the worker (from this folder, if one is given).

        A worker by the same name in another folder says nothing of the trainings that were left in the first.
        """
        if self._watching_since is None:
            return 0.0
        seen = self._seen.get(worker)
        heard_at = (seen.moved_at if seen else None) if place is None else self._places.get((worker, place))
        return self._looked_at - max(heard_at or self._watching_since, self._watching_since)

    def _is_listed(self, seen: _Seen) -> bool:
        if self._watching_since is None:
            return True
        return self._clock() - max(seen.moved_at, self._watching_since) <= UNLISTED_SECONDS

    def _read(self, name: bytes | str, entry: bytes | str) -> Heartbeat | None:
        """The signed heartbeat in one field of the hash; an invalid one is remembered for `invalid`."""
        try:
            heartbeat = read_heartbeat(entry, self._secret)
            if heartbeat.worker.encode() != (name if isinstance(name, bytes) else name.encode()):
                raise BadMessage(f"it is the heartbeat of {heartbeat.worker!r}, in the field {name!r}")
        except BadMessage as error:
            self._invalid[name] = f"the heartbeat of the worker {name!r} is invalid: {error}"
            return None
        return heartbeat
