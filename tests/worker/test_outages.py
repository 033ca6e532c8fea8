"""No exception ends a thread or a step of a worker, whatever Redis contains or responds."""

from __future__ import annotations

import logging
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.harness.fleet import SmallFleet, small_fleet
from tests.harness.non_redis_server import non_redis_server
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from worker.threads import Outage, RetryingThread, log_failure
from zeta_core.contract.wire.messages import LAST_STREAM_ID, WORKERS_HASH, worker_stream


@pytest.mark.extended
def test_invalid_entries_stop_no_worker_and_are_gone_after_a_restart(fleet: SmallFleet, client: redis.Redis) -> None:
    worker = fleet.start_worker()
    job_id = fleet.submit(steps="60", seconds_per_step="0.05")
    fleet.wait_for_step(job_id, 3)
    client.hset(WORKERS_HASH, mapping={"w1": b"\xff\xfe", "other": "[" * 50_000})
    poison: list[dict[Any, Any]] = [
        {b"\x80": b"\x81"},
        {"body": "{}", "signature": "é"},
        {"body": b"\xff", "signature": "0" * 64},
    ]
    for fields in poison:
        client.xadd(worker_stream("w1"), fields)
    client.xadd(worker_stream("w1"), {"nonsense": "1"}, id=LAST_STREAM_ID.decode())
    fleet.wait_for_status(job_id, "succeeded")
    assert client.xlen(worker_stream("w1")) == 0
    worker.terminate()
    worker.wait(30)
    fleet.start_worker()
    assert fleet.wait_for_status(fleet.submit(steps="3"), "succeeded").attempt == 1
    log = (fleet.folder / "w1.log").read_text()
    assert log.count("Removed an invalid entry from the stream zeta:worker:w1") == 1
    assert "Traceback" not in log


def test_a_stream_key_of_another_type_is_removed(fleet: SmallFleet, client: redis.Redis) -> None:
    fleet.start_worker()
    client.set(worker_stream("w1"), "not a stream")
    assert fleet.wait_for_status(fleet.submit(steps="3"), "succeeded").attempt == 1


@pytest.mark.extended
def test_invalid_responses_from_redis_cost_no_attempt(tmp_path: Path, own_valkey: ValkeyServer) -> None:
    with small_fleet(tmp_path, own_valkey.url) as fleet:
        engine = fleet.start_engine()
        fleet.start_worker()
        job_id = fleet.submit(steps="200", seconds_per_step="0.05")
        fleet.wait_for_step(job_id, 3)
        log = fleet.folder / "w1.log"
        own_valkey.kill()
        with non_redis_server(own_valkey.port):
            for line in ("heartbeat cannot be sent", "Redis cannot be written", "Redis cannot be read"):
                wait_until(lambda line=line: line in log.read_text(), 60, f"the outage '{line}' to be logged")
            wait_until(lambda: "messages" in engine.loops.troubles(), 60, "the server to notice")
        own_valkey.start()
        assert fleet.wait_for_status(job_id, "succeeded").attempt == 1
        assert fleet.wait_for_status(fleet.submit(steps="3"), "succeeded", 60).attempt == 1
        assert "Exception in thread" not in log.read_text()
        fleet.check_events(job_id)


@pytest.mark.extended
def test_a_thread_survives_every_exception_and_logs_each_type_once(caplog: pytest.LogCaptureFixture) -> None:
    failures = iter([SystemExit(3), MemoryError("no memory"), MemoryError("no memory"), KeyError("x")])
    passes: list[int] = []

    def one_pass() -> None:
        if failure := next(failures, None):
            raise failure
        passes.append(1)
        loop.stopped.wait(0.01)

    loop = RetryingThread("test", "The test fails", one_pass)
    with caplog.at_level(logging.INFO):
        loop.start()
        wait_until(lambda: len(passes) > 2, 60, "the loop to continue")
        loop.stop(10)
    kinds = [record.exc_info[0] for record in caplog.records if record.exc_info]
    assert kinds == [SystemExit, MemoryError, KeyError]
    assert caplog.records[-1].getMessage() == "The test fails: recovered."


def test_a_failing_step_does_not_affect_the_others(caplog: pytest.LogCaptureFixture) -> None:
    outage = Outage("The step fails")
    for _ in range(3):
        with outage.catching_errors():
            raise ValueError("odd")
    with outage.catching_errors():
        pass
    assert [record.levelno for record in caplog.records if record.levelno >= logging.WARNING] == [logging.WARNING]


class Mute(Exception):
    """Its message can't be read."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_an_error_without_a_readable_message_ends_no_thread(caplog: pytest.LogCaptureFixture) -> None:
    failures = iter([Mute(), Mute()])
    recovered = threading.Event()

    def one_pass() -> None:
        if failure := next(failures, None):
            raise failure
        recovered.set()
        loop.stopped.wait(0.01)

    loop = RetryingThread("test", "The test fails", one_pass)
    loop.start()
    assert recovered.wait(60), "the loop did not continue"
    loop.stop(10)
    assert "Mute (its message could not be read)" in caplog.text


def test_a_failure_of_background_work_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ThreadPoolExecutor(max_workers=1) as executor:
        log_failure(executor.submit(shutil.rmtree, tmp_path / "missing"), "The files could not be removed")
        log_failure(executor.submit(shutil.rmtree, tmp_path), "Nothing to report")
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage().startswith("The files could not be removed: [Errno 2]")
