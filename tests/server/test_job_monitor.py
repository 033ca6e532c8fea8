"""Stop requests are repeated until they take effect, lost workers lose their attempts, stale attempts are fenced."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from server.engine import known_workers
from server.engine.known_workers import KnownWorkers
from server.engine.worker_secrets import WorkerSecrets
from tests.harness.fleet import SECRET, SmallFleet, small_fleet
from tests.harness.simulated_worker import SimulatedWorker, progress, signed_heartbeat, status
from tests.harness.waiting import wait_until
from zeta_core.contract.wire.messages import SERVER_STREAM, WORKERS_HASH, JournalAck, StopRequest


@pytest.fixture
def fleet(tmp_path: Path, redis_url: str) -> Iterator[SmallFleet]:
    with small_fleet(tmp_path, redis_url, lease_seconds=2) as fleet:
        fleet.start_engine()
        yield fleet


def test_a_stop_request_is_repeated_until_the_attempt_has_ended(fleet: SmallFleet, client: "redis.Redis") -> None:
    worker = SimulatedWorker(client, SECRET)
    job_id = fleet.submit()
    worker.start(fleet, job_id)
    fleet.request(job_id, "cancel")
    for _ in range(2):
        worker.send_heartbeat((job_id, 1))
        request = worker.receive(StopRequest, job_id)
        assert isinstance(request, StopRequest)
        assert (request.attempt, request.action) == (1, "cancel")
    worker.publish(job_id, 1, status("cancelled"))
    fleet.wait_for_status(job_id, "cancelled")


@pytest.mark.extended
def test_a_worker_silent_beyond_its_lease_loses_its_attempt_and_is_fenced(
    fleet: SmallFleet, client: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    silent, other = SimulatedWorker(client, SECRET, "silent"), SimulatedWorker(client, SECRET, "other")
    job_id = fleet.submit()
    silent.start(fleet, job_id)
    wait_until(lambda: fleet.job(job_id).status == "queued", 15, "the lease to run out")
    (attempt,) = fleet.attempts(job_id)
    assert (attempt.reason, fleet.job(job_id).lost_workers, fleet.job(job_id).failures) == ("worker_lost", 1, 0)
    other.start(fleet, job_id, 2)

    def is_fenced() -> bool:
        silent.send_heartbeat((job_id, 1))
        other.send_heartbeat((job_id, 2))
        return any(isinstance(message, JournalAck) and message.fenced for message in silent.receive_all())

    wait_until(is_fenced, 20, "the returned worker to receive a fenced acknowledgement")
    assert (fleet.job(job_id).status, fleet.job(job_id).attempt) == ("running", 2)

    monkeypatch.setattr(known_workers, "WORKER_EXPIRY_SECONDS", 1.0)  # instead of a day
    wait_until(lambda: client.hlen(WORKERS_HASH) == 0, 30, "the heartbeats of both to be removed")

    def listed_again() -> bool:
        other.send_heartbeat((job_id, 2))
        return fleet.engine is not None and [beat.worker for beat in fleet.engine.workers()] == ["other"]

    wait_until(listed_again, 30, "the worker that still runs to be listed again")


def test_heartbeats_with_a_wrong_secret_or_name_are_rejected() -> None:
    fleet = KnownWorkers(WorkerSecrets(SECRET))
    fleet.update({"a": signed_heartbeat("another", "a", 1), "b": signed_heartbeat(SECRET, "a", 1), "c": "nonsense"})
    assert fleet.workers() == []


def test_an_engine_restarts_repeatedly_while_workers_send_messages(
    tmp_path: Path, redis_url: str, client: "redis.Redis"
) -> None:
    with small_fleet(tmp_path, redis_url) as fleet:
        fleet.start_engine()
        worker = SimulatedWorker(client, SECRET)
        job_id = fleet.submit()
        worker.start(fleet, job_id)
        stored = 0
        for _ in range(10):
            stored = worker.publish(job_id, stored + 1, progress(stored + 1)).stored_line
            for line in range(stored + 1, stored + 6):
                worker.send(worker.batch(job_id, line, progress(line)))
            fleet.stop_engine()  # which has a time limit
            fleet.start_engine()
            worker.receive_all()
            stored = fleet.attempts(job_id)[0].stored_line
        repeated = worker.batch(job_id, stored + 1, progress(stored + 1))
        worker.send(repeated)
        wait_until(lambda: fleet.attempts(job_id)[0].stored_line > stored, 10, "the line to be stored")
        wait_until(lambda: client.xlen(SERVER_STREAM) == 0, 10, "everything else to be read")
        fleet.check_events(job_id)
