"""A worker's silence is measured by this server's clock, and only while Redis is reachable."""

import pytest

from server.engine import known_workers
from server.engine.known_workers import KnownWorkers
from server.engine.worker_secrets import WorkerSecrets
from tests.harness.simulated_worker import signed_heartbeat

LEASE_SECONDS = 120.0


class ClockedWorkers:
    """Known workers with one worker and a controlled clock; heartbeats are read twice a second, as by the engine."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.beat = 0
        self.workers = KnownWorkers(WorkerSecrets("secret"), lambda: self.now)
        self.read(beats=True)
        self.read(beats=True)

    def read(self, *, beats: bool) -> None:
        self.beat += beats
        self.workers.update({"w": signed_heartbeat("secret", "w", self.beat)})

    def run(self, seconds: float, *, beats: bool) -> None:
        for _ in range(int(seconds * 2)):
            self.now += 0.5
            self.read(beats=beats)


def test_silence_is_measured_from_the_last_heartbeat() -> None:
    clocked = ClockedWorkers()
    clocked.run(LEASE_SECONDS + 1, beats=True)
    assert clocked.workers.silent_seconds("w") == 0
    clocked.run(LEASE_SECONDS + 1, beats=False)
    assert clocked.workers.silent_seconds("w") == LEASE_SECONDS + 1
    assert not clocked.workers.is_alive("w")


def test_a_redis_outage_does_not_count_as_silence() -> None:
    clocked = ClockedWorkers()
    clocked.run(60, beats=False)
    clocked.now += 10 * LEASE_SECONDS
    clocked.workers.record_outage()
    assert clocked.workers.silent_seconds("w") == 0
    clocked.run(10, beats=False)
    assert clocked.workers.silent_seconds("w") == 9.5
    assert not clocked.workers.is_alive("nobody")


def test_a_suspended_server_does_not_count_silence() -> None:
    clocked = ClockedWorkers()
    clocked.now += 10 * LEASE_SECONDS  # this process was suspended, and the first loop that resumes checks
    assert not clocked.workers.is_connected
    assert clocked.workers.silent_seconds("w") == 0
    clocked.read(beats=False)
    assert clocked.workers.is_connected
    assert clocked.workers.silent_seconds("w") == 0
    clocked.run(LEASE_SECONDS, beats=False)
    assert clocked.workers.silent_seconds("w") == LEASE_SECONDS


def test_a_worker_silent_for_a_day_is_unlisted_until_its_next_heartbeat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(known_workers, "WORKER_EXPIRY_SECONDS", 60.0)
    clocked = ClockedWorkers()
    clocked.now += 1000  # this server was suspended, so the silence was its own
    clocked.read(beats=False)
    clocked.run(60, beats=False)
    assert clocked.workers.expired_workers() == []
    clocked.run(1, beats=False)
    assert (clocked.workers.expired_workers(), clocked.workers.workers()) == (["w"], [])
    clocked.workers.record_outage()
    assert clocked.workers.expired_workers() == []
    clocked.read(beats=False)
    clocked.run(61, beats=False)
    clocked.workers.forget(["w"])
    assert (clocked.workers.expired_workers(), clocked.workers.get("w")) == ([], None)
    clocked.read(beats=True)
    assert clocked.workers.is_alive("w")
    assert [beat.worker for beat in clocked.workers.workers()] == ["w"]


def test_intercepted_heartbeats_do_not_make_a_stopped_worker_ready() -> None:
    clocked = ClockedWorkers()
    intercepted: list[str] = []
    for _ in range(3):
        clocked.run(2, beats=True)
        intercepted.append(signed_heartbeat("secret", "w", clocked.beat))
    clocked.run(20, beats=False)
    assert not clocked.workers.is_alive("w")
    for _ in range(5):
        for entry in intercepted:
            clocked.now += 0.5
            clocked.workers.update({"w": entry})
            assert not clocked.workers.is_alive("w")
    clocked.workers.update({"w": signed_heartbeat("secret", "w", 1, incarnation="second")})
    assert clocked.workers.is_alive("w")
    clocked.run(20, beats=False)
    clocked.workers.update({"w": intercepted[-1]})
    assert not clocked.workers.is_alive("w"), "a heartbeat of the earlier process is a replay, too"
