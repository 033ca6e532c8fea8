"""Forged, replayed, late and malformed messages of workers have no effect, are counted, and block nobody."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.harness.fleet import SECRET, SmallFleet, small_fleet
from tests.harness.simulated_worker import SimulatedWorker, progress, signed_heartbeat, status
from tests.harness.waiting import wait_until
from zeta_core.contract.wire.messages import SERVER_STREAM, WORKERS_HASH, CheckResult, Claim
from zeta_core.contract.wire.signatures import (
    CLOCK_WINDOW_SECONDS,
    MAX_BODY_BYTES,
    WorkerKey,
    derive_key,
    sign,
    sign_body,
    sign_heartbeat,
)

HOUR_SECONDS = 3600.0


@pytest.fixture
def fleet(tmp_path: Path, redis_url: str) -> Iterator[SmallFleet]:
    with small_fleet(tmp_path, redis_url) as fleet:
        fleet.start_engine()
        yield fleet


def rejected(fleet: SmallFleet) -> Counter[str]:
    """The number of rejected messages, by reason."""
    assert fleet.engine is not None
    return fleet.engine.dropped.rejected


def is_alive(fleet: SmallFleet, worker: str) -> bool:
    assert fleet.engine is not None
    return fleet.engine.is_alive(worker)


def wait_until_read(client: redis.Redis) -> None:
    wait_until(lambda: client.xlen(SERVER_STREAM) == 0, 30, "the server to read the stream")


def running(fleet: SmallFleet, client: redis.Redis, name: str) -> tuple[SimulatedWorker, str]:
    worker = SimulatedWorker(client, SECRET, name)
    job_id = fleet.submit()
    worker.start(fleet, job_id)
    return worker, job_id


# --- Replayed and late messages ---------------------------------------------------------------------------------------


def test_three_intercepted_heartbeats_do_not_make_a_stopped_worker_ready(
    fleet: SmallFleet, client: redis.Redis
) -> None:
    sent_at = time.time() - 2 * CLOCK_WINDOW_SECONDS
    intercepted = [signed_heartbeat(SECRET, "a", beat, sent_at=sent_at + beat) for beat in (1, 2, 3)]
    for number, entry in enumerate([*intercepted, *intercepted[:2]]):
        client.hset(WORKERS_HASH, "a", entry)
        if number == 0:
            wait_until(lambda: bool(engine_workers(fleet)), 10, "the heartbeat to be read")
        else:
            wait_until(lambda count=number: rejected(fleet).total() >= count, 10, "the heartbeat to be rejected")
        assert not is_alive(fleet, "a")
    assert rejected(fleet) == {"clock": 2, "replay": 2}
    job_id = fleet.submit()
    assert fleet.job(job_id).worker is None


def engine_workers(fleet: SmallFleet) -> list[Any]:
    assert fleet.engine is not None
    return list(fleet.engine.workers())


def test_a_replayed_or_late_claim_is_rejected(fleet: SmallFleet, client: redis.Redis) -> None:
    worker, _ = running(fleet, client, "a")
    waiting = fleet.submit()
    claim = Claim(job_id=waiting, attempt=1, worker="a", incarnation=worker.incarnation)
    now = time.time()
    late = [sign(claim, worker.key, channel=SERVER_STREAM, sent_at=now + ahead) for ahead in (-90, 90, -HOUR_SECONDS)]
    for fields in late:
        worker.send_raw({**fields})
    intercepted = sign(claim, worker.key, channel=SERVER_STREAM)
    for _ in range(3):
        worker.send_raw({**intercepted})
    wait_until_read(client)
    assert (rejected(fleet)["clock"], rejected(fleet)["replay"]) == (3, 2)
    assert len(worker.receive_all()) == 1, "only the first claim in time is answered"
    fleet.stop_engine()
    fleet.start_engine()  # like another server on the same stream
    worker.send_raw({**intercepted})
    wait_until_read(client)
    assert rejected(fleet)["replay"] == 1
    assert worker.receive_all() == []


def test_journal_lines_are_stored_however_late_they_arrive(fleet: SmallFleet, client: redis.Redis) -> None:
    worker, job_id = running(fleet, client, "a")
    worker.clock_ahead_seconds = -5 * HOUR_SECONDS  # an outage of hours
    assert worker.publish(job_id, 1, progress(1)).stored_line == 1
    intercepted = sign(worker.batch(job_id, 2, progress(2)), worker.key, channel=SERVER_STREAM)
    for _ in range(3):
        worker.send_raw({**intercepted})
    wait_until_read(client)
    assert len(worker.receive_all()) == 3
    assert worker.publish(job_id, 3, status("succeeded")).stored_line == 3
    assert fleet.wait_for_status(job_id, "succeeded").attempt == 1
    assert [event.fields.get("step") for event in fleet.events(job_id) if event.type == "progress"] == [1, 2]
    assert rejected(fleet).total() == 0


def test_a_worker_whose_clock_jumps_keeps_its_job_and_gets_no_new_one(fleet: SmallFleet, client: redis.Redis) -> None:
    worker, job_id = running(fleet, client, "a")
    worker.clock_ahead_seconds = 600

    def is_rejected() -> bool:
        worker.send_heartbeat((job_id, 1))
        return rejected(fleet)["clock"] > 0 and not is_alive(fleet, "a")

    wait_until(is_rejected, 20, "the heartbeat to be rejected")
    engine = fleet.engine
    assert engine is not None
    assert 590 < (engine.clock_ahead_seconds("a") or 0) <= 600
    assert worker.publish(job_id, 1, progress(1)).stored_line == 1
    assert fleet.job(job_id).status == "running"
    worker.clock_ahead_seconds = 0

    def is_accepted() -> bool:
        worker.send_heartbeat((job_id, 1))
        return is_alive(fleet, "a")

    wait_until(is_accepted, 20, "the worker to be accepted again")


# --- Messages in another worker's name --------------------------------------------------------------------------------


def test_no_worker_can_report_on_the_attempt_of_another(
    fleet: SmallFleet, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    worker, job_id = running(fleet, client, "a")
    other = SimulatedWorker(client, SECRET, "b")
    other.send_heartbeat()
    other.send(other.batch(job_id, 1, status("succeeded")))  # its own name
    other.send(worker.batch(job_id, 1, status("succeeded")))  # the other's name, with its own key
    other.send(Claim(job_id=job_id, attempt=1, worker="a", incarnation=worker.incarnation))
    wait_until_read(client)
    assert rejected(fleet)["sender"] == 3
    assert f"worker b reported on attempt 1 of {job_id}, which worker a holds" in caplog.text
    assert fleet.job(job_id).status == "running"
    assert worker.publish(job_id, 1, progress(1)).stored_line == 1


def test_the_key_of_one_worker_cannot_sign_for_another(fleet: SmallFleet, client: redis.Redis) -> None:
    worker, job_id = running(fleet, client, "a")
    own = derive_key(SECRET, "b")
    stolen = WorkerKey("a", own.secret_id, own.key)  # it names A, and signs with B's key
    SimulatedWorker(client, stolen, "a").send(worker.batch(job_id, 1, status("succeeded")))
    client.hset(WORKERS_HASH, "b", sign_heartbeat(heartbeat_of(fleet, "a"), own, channel=WORKERS_HASH))
    wait_until_read(client)
    wait_until(lambda: rejected(fleet)["sender"] == 1, 10, "the heartbeat in another's name to be rejected")
    assert rejected(fleet)["signature"] == 1
    assert fleet.job(job_id).status == "running"


def heartbeat_of(fleet: SmallFleet, name: str) -> Any:
    return next(beat for beat in engine_workers(fleet) if beat.worker == name)


def test_a_check_is_answered_only_by_the_worker_that_was_asked(fleet: SmallFleet, client: redis.Redis) -> None:
    other = SimulatedWorker(client, SECRET, "b")
    other.send(CheckResult(check_id="0" * 64, worker="b", failure="made up"))
    wait_until_read(client)
    assert rejected(fleet) == {"sender": 1}


def test_a_report_cannot_change_the_model_or_files_of_the_next_attempt(fleet: SmallFleet, client: redis.Redis) -> None:
    """The next attempt would otherwise read a checkpoint that a run names, which may be that of another project."""
    worker, job_id = running(fleet, client, "a")
    decided = fleet.job(job_id).resolved_spec
    foreign = {"model": {"job": "job_1"}, "files": {"file_1": {"filename": "a.txt"}}, "resources": {"gpus": 8}}
    report = status("running", resolved_spec={**foreign, "learning_rate": 0.5})
    assert worker.publish(job_id, 1, report).stored_line == 1
    stored = fleet.job(job_id).resolved_spec
    assert stored.learning_rate == 0.5
    for name in foreign:
        assert stored.value(name) == decided.value(name)


# --- Malformed messages -----------------------------------------------------------------------------------------------

BODIES: dict[str, str] = {
    "nested 100,000 deep": '{"kind":"claim","job_id":' + "[" * 100_000,
    "a closed nesting": "[" * 50_000 + "]" * 50_000,
    "an unknown kind": '{"kind":"telepathy"}',
    "no object": "[1, 2]",
    "a number of 5,000 digits": "1" * 5_000,
    "not a number": '{"kind":"claim","job_id":"job_1","attempt":NaN,"worker":"a","incarnation":"i"}',
    "an infinite number": '{"kind":"claim","job_id":"job_1","attempt":1e400,"worker":"a","incarnation":"i"}',
    "an attempt of the wrong type": '{"kind":"claim","job_id":"job_1","attempt":"first","worker":"a","incarnation":1}',
    "lines of another type": '{"kind":"journal_batch","job_id":"","attempt":1,"worker":"a","first_line":1,"lines":7}',
    "an empty body": "",
}
EXTREME: dict[str, tuple[str, Any]] = {
    "an attempt beyond 64 bits": ("attempt", 2**70),
    "an attempt beyond 32 bits": ("attempt", 2**40),
    "a negative attempt": ("attempt", -1),
    "a first line beyond 64 bits": ("first_line", 2**70),
    "an id with NUL": ("job_id", "job_\0"),
    "an id with half a pair": ("job_id", "job_\ud800"),
    "a huge id": ("job_id", "j" * 1_000_000),
}


def test_signed_messages_with_malformed_contents_block_nothing(fleet: SmallFleet, client: redis.Redis) -> None:
    worker, job_id = running(fleet, client, "a")
    for body in BODIES.values():
        worker.send_raw({**sign_body(body, worker.key, channel=SERVER_STREAM)})
    worker.send_raw({**sign_body(" " * (MAX_BODY_BYTES + 1), worker.key, channel=SERVER_STREAM)})
    began = time.monotonic()
    assert worker.publish(job_id, 1, progress(1)).stored_line == 1
    assert time.monotonic() - began < 30
    assert rejected(fleet) == {"malformed": len(BODIES) + 1}


def test_signed_messages_with_extreme_values_are_rejected(fleet: SmallFleet, client: redis.Redis) -> None:
    worker, job_id = running(fleet, client, "a")
    batch = worker.batch(job_id, 1, progress(1)).model_dump(mode="json")
    for name, value in EXTREME.values():
        worker.send_raw({**sign_body(json.dumps({**batch, name: value}), worker.key, channel=SERVER_STREAM)})
    assert worker.publish(job_id, 1, progress(1)).stored_line == 1
    assert rejected(fleet) == {"malformed": len(EXTREME)}
    assert fleet.engine is not None
    assert fleet.engine.dropped.counts == {"stream": len(EXTREME)}
    assert fleet.job(job_id).status == "running"


def test_a_worker_of_an_earlier_version_is_rejected_with_the_fix(
    fleet: SmallFleet, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    client.xadd(SERVER_STREAM, {"body": "{}", "signature": "0" * 64})
    client.hset(WORKERS_HASH, "old", '{"body": "{}", "signature": "0"}')
    wait_until(lambda: rejected(fleet) == {"version": 2}, 20, "both messages to be rejected")
    assert "does not sign the time of its messages; upgrade it" in caplog.text
