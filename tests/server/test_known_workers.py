"""A worker's silence is measured by this server's clock, and only while Redis is reachable."""

import pytest

from server.engine import known_workers
from server.engine.known_workers import KnownWorkers
from tests.harness.played_worker import signed_heartbeat

LEASE_SECONDS = 120.0


class Hearing:
    """A fleet of one worker with a clock that the test moves; it looks twice a second, as the engine does."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.beat = 0
        self.fleet = KnownWorkers("secret", lambda: self.now)
        self.look(beats=True)
        self.look(beats=True)

    def look(self, *, beats: bool) -> None:
        self.beat += beats
        self.fleet.update({"w": signed_heartbeat("secret", "w", self.beat)})

    def listen(self, seconds: float, *, beats: bool) -> None:
        for _ in range(int(seconds * 2)):
            self.now += 0.5
            self.look(beats=beats)


def test_silence_is_measured_from_the_last_heartbeat() -> None:
    hearing = Hearing()
    hearing.listen(LEASE_SECONDS + 1, beats=True)
    assert hearing.fleet.silent_seconds("w") == 0
    hearing.listen(LEASE_SECONDS + 1, beats=False)
    assert hearing.fleet.silent_seconds("w") == LEASE_SECONDS + 1
    assert not hearing.fleet.is_alive("w")


def test_a_redis_outage_does_not_count_as_silence() -> None:
    hearing = Hearing()
    hearing.listen(60, beats=False)
    hearing.now += 10 * LEASE_SECONDS
    hearing.fleet.unreachable()
    assert hearing.fleet.silent_seconds("w") == 0
    hearing.listen(10, beats=False)
    assert hearing.fleet.silent_seconds("w") == 9.5
    assert not hearing.fleet.is_alive("nobody")


def test_a_suspended_server_does_not_count_silence() -> None:
    hearing = Hearing()
    hearing.now += 10 * LEASE_SECONDS  # its process was stopped, and whichever loop wakes first asks
    assert not hearing.fleet.is_connected
    assert hearing.fleet.silent_seconds("w") == 0
    hearing.look(beats=False)
    assert hearing.fleet.is_connected
    assert hearing.fleet.silent_seconds("w") == 0
    hearing.listen(LEASE_SECONDS, beats=False)
    assert hearing.fleet.silent_seconds("w") == LEASE_SECONDS


def test_a_worker_silent_for_a_day_is_unlisted_until_its_next_heartbeat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(known_workers, "UNLISTED_SECONDS", 60.0)
    hearing = Hearing()
    hearing.now += 1000  # this server stood still: the silence was its own
    hearing.look(beats=False)
    hearing.listen(60, beats=False)
    assert hearing.fleet.unlisted() == []
    hearing.listen(1, beats=False)
    assert (hearing.fleet.unlisted(), hearing.fleet.workers()) == (["w"], [])
    hearing.fleet.unreachable()
    assert hearing.fleet.unlisted() == []
    hearing.look(beats=False)
    hearing.listen(61, beats=False)
    hearing.fleet.forget(["w"])
    assert (hearing.fleet.unlisted(), hearing.fleet.get("w")) == ([], None)
    hearing.look(beats=True)
    assert hearing.fleet.is_alive("w")
    assert [beat.worker for beat in hearing.fleet.workers()] == ["w"]
