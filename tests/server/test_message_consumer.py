"""Messages of workers are applied exactly once, even if they are repeated, lost, reordered or invalid."""

import json
import logging
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from sqlalchemy import select, text, update

from server.database.availability import DatabaseUnavailable
from server.database.tables import CheckRow, JobRow
from server.engine.message_consumer import MAX_TRIES
from server.engine.redis_client import UNAPPLIED
from tests.harness.fleet import SECRET, SmallFleet, small_fleet
from tests.harness.simulated_worker import SimulatedWorker, checkpoint, progress, status
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from tests.server.stepped_consumer import SteppedConsumer
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.wire.messages import SERVER_GROUP, SERVER_STREAM, CheckResult, JournalAck, StopRequest
from zeta_core.contract.wire.signatures import sign, sign_body


@pytest.fixture
def fleet(database_url: str | None, tmp_path: Path, redis_url: str) -> Iterator[SmallFleet]:
    with small_fleet(tmp_path, redis_url, database_url) as fleet:
        fleet.start_engine()
        yield fleet


def running_job(fleet: SmallFleet, client: "redis.Redis") -> tuple[SimulatedWorker, str]:
    worker = SimulatedWorker(client, SECRET)
    job_id = fleet.submit()
    worker.start(fleet, job_id)
    return worker, job_id


def stored_steps(fleet: SmallFleet, job_id: str) -> list[int]:
    return [event.fields["step"] for event in fleet.events(job_id) if event.type == "progress"]


def test_repeated_lines_and_lines_after_a_gap_are_ignored(fleet: SmallFleet, client: "redis.Redis") -> None:
    worker, job_id = running_job(fleet, client)
    first = [progress(1, loss=2.0), progress(2, loss=1.5, steps=[{"step": 1}, {"step": 2}])]
    assert worker.publish(job_id, 1, *first).stored_line == 2
    before = fleet.events(job_id)
    assert worker.publish(job_id, 1, *first).stored_line == 2
    assert worker.publish(job_id, 2, progress(99)).stored_line == 2  # line 2 again, with other contents
    assert worker.publish(job_id, 4, progress(4)).stored_line == 2  # line 3 is missing
    after = fleet.events(job_id)
    assert [(event.seq, event.line, event.fields) for event in after] == [
        (event.seq, event.line, event.fields) for event in before
    ]
    now = fleet.job(job_id).progress or {}
    assert (now["step"], now["loss"], "steps" in now) == (2, 1.5, False)
    assert worker.publish(job_id, 2, progress(2), progress(3)).stored_line == 3  # overlapping: only the new is stored
    assert stored_steps(fleet, job_id) == [1, 2, 3]
    fleet.check_events(job_id)


def test_lines_of_an_ended_attempt_are_fenced(fleet: SmallFleet, client: "redis.Redis") -> None:
    worker, job_id = running_job(fleet, client)
    assert worker.publish(job_id, 1, progress(1), status("failed", reason="train_error")).stored_line == 2
    assert fleet.wait_for_status(job_id, "queued").status_reason == "retrying"
    repeated = worker.publish(job_id, 2, status("failed", reason="train_error"))
    assert (repeated.stored_line, repeated.fenced) == (2, True)
    worker.start(fleet, job_id, 2)
    late = worker.publish(job_id, 3, progress(50), status("succeeded"))
    assert (late.stored_line, late.fenced) == (2, True)
    job = fleet.job(job_id)
    assert (job.status, job.attempt, (job.progress or {})["step"]) == ("running", 2, 1)
    assert worker.publish(job_id, 1, progress(2), attempt=2).stored_line == 1
    fleet.check_events(job_id)


def test_a_claim_is_granted_again_only_to_the_same_process(fleet: SmallFleet, client: "redis.Redis") -> None:
    worker, job_id = running_job(fleet, client)
    assert worker.claim(job_id).granted
    worker.incarnation = "another"
    denied = worker.claim(job_id)
    assert (denied.granted, denied.reason) == (False, "the attempt was started by another process")
    stranger = SimulatedWorker(client, SECRET, "stranger")
    assert not stranger.claim(job_id).granted
    assert not worker.claim("job_00000000000000000000").granted
    assert [event.fields["status"] for event in fleet.events(job_id)] == ["running"]


def test_invalid_lines_do_not_block_later_lines(fleet: SmallFleet, client: "redis.Redis") -> None:
    worker, job_id = running_job(fleet, client)
    strange: list[dict[str, Any]] = [
        {"type": "log", "message": "a NUL \0 and half a pair \ud800"},
        {"type": "telepathy", "step": 1},
        {"type": "progress", "phase": "training", "step": "many"},
        {},
        {"type": "warning", "code": "odd", "message": "from a newer version", "field_of_tomorrow": [1]},
    ]
    worker.send_raw(
        {**sign_body(_batch_of_another_version(worker, job_id, strange), worker.key, channel=SERVER_STREAM)}
    )
    ack = worker.receive(JournalAck, job_id)
    assert isinstance(ack, JournalAck)
    assert ack.stored_line == 5
    kept = [event for event in fleet.events(job_id) if event.line is not None]
    assert [event.type for event in kept] == ["log", "warning", "warning", "warning", "warning"]
    assert kept[1].fields["code"] == "unreadable_line"
    assert kept[4].fields["field_of_tomorrow"] == [1]
    assert "\0" not in kept[0].fields["message"]
    assert worker.publish(job_id, 6, progress(1, loss=float("nan"))).stored_line == 6
    assert len(fleet.job(job_id).warnings) == 4


def test_messages_without_a_valid_signature_are_dropped(
    fleet: SmallFleet, client: "redis.Redis", caplog: pytest.LogCaptureFixture
) -> None:
    worker, job_id = running_job(fleet, client)
    forged = SimulatedWorker(client, "another secret", worker.name)
    with caplog.at_level(logging.WARNING):
        forged.send(forged.batch(job_id, 1, status("succeeded")))
        worker.send_raw({"nonsense": "1"})
        worker.send_raw(
            {**sign(StopRequest(job_id=job_id, attempt=1, action="cancel"), worker.key, channel=SERVER_STREAM)}
        )
        assert worker.publish(job_id, 1, progress(1)).stored_line == 1
    assert "do server and worker have the same ZETA_WORKER_SECRET?" in caplog.text
    assert fleet.job(job_id).status == "running"
    wait_until(lambda: client.xlen(SERVER_STREAM) == 0, 10, "the stream to be empty")


def test_the_consumer_group_is_recreated_after_flushall(fleet: SmallFleet, client: "redis.Redis") -> None:
    worker, job_id = running_job(fleet, client)
    client.flushall()
    assert worker.publish(job_id, 1, progress(1)).stored_line == 1
    groups: Any = client.xinfo_groups(SERVER_STREAM)
    assert [group["name"] for group in groups] == [SERVER_GROUP]


def test_checkpoints_are_kept_up_to_the_limit_and_reset_failures(fleet: SmallFleet, client: "redis.Redis") -> None:
    worker, job_id = running_job(fleet, client)
    worker.publish(job_id, 1, checkpoint(2), status("failed", reason="process_killed"))
    assert fleet.wait_for_status(job_id, "queued").failures == 1
    worker.start(fleet, job_id, 2)
    worker.publish(job_id, 1, checkpoint(2), attempt=2)
    assert fleet.job(job_id).failures == 1  # nothing new was reached
    worker.publish(job_id, 2, *[checkpoint(step) for step in (4, 6, 8)], checkpoint(8, "final"), attempt=2)
    assert fleet.job(job_id).failures == 0
    assert fleet.checkpoints(job_id) == ["final", "step-4", "step-6", "step-8"]


@pytest.mark.extended
def test_two_consumers_on_one_postgresql_store_every_line_once_in_order(
    tmp_path: Path, redis_url: str, postgres_url: str, shared_valkey: ValkeyServer
) -> None:
    num_jobs, num_lines = 6, 60
    with (
        small_fleet(tmp_path / "one", redis_url, postgres_url) as one,
        small_fleet(tmp_path / "two", redis_url, postgres_url) as two,
        shared_valkey.client() as client,
    ):
        one.start_engine()
        two.start_engine()
        worker = SimulatedWorker(client, SECRET, slots=num_jobs)
        jobs = [one.submit() for _ in range(num_jobs)]
        for job_id in jobs:
            worker.start(one, job_id)

        def publish_twice(job_id: str, seed: int) -> None:
            """Send overlapping batches twice and quickly, then repeat the lines that were not stored."""
            order = random.Random(seed)
            with shared_valkey.client() as own:
                publisher = SimulatedWorker(own, SECRET)
                while (stored := one.attempts(job_id)[0].stored_line) < num_lines:
                    for first in range(stored + 1, num_lines + 1, 5):
                        last = min(first + order.randint(5, 12), num_lines)
                        lines = [progress(step) for step in range(first, last + 1)]
                        for _ in range(2):
                            publisher.send(publisher.batch(job_id, first, *lines))
                    wait_until(lambda: own.xlen(SERVER_STREAM) == 0, 20, "the consumers to read everything")

        threads = [threading.Thread(target=publish_twice, args=(job, seed)) for seed, job in enumerate(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for job_id in jobs:
            assert stored_steps(one, job_id) == list(range(1, num_lines + 1))
            one.check_events(job_id)
        consumers: Any = client.xinfo_consumers(SERVER_STREAM, SERVER_GROUP)
        assert len(consumers) == 2  # both have read


def test_a_checkpoint_is_kept_while_an_unfinished_job_starts_from_it(fleet: SmallFleet, client: "redis.Redis") -> None:
    worker, job_id = running_job(fleet, client)
    ack = worker.publish(job_id, 1, *[checkpoint(step) for step in (1, 2, 3)])
    assert ack.keep == []
    resumed = fleet.submit(spec={"model": "m", "resume_from_checkpoint": f"{job_id}/step-1"})
    begun = fleet.submit(spec={"model": {"job": job_id, "checkpoint": "step-2"}})
    ack = worker.publish(job_id, 4, *[checkpoint(step) for step in (4, 5, 6, 7)])
    assert ack.keep == ["step-1", "step-2"]
    assert fleet.checkpoints(job_id) == ["step-1", "step-2", "step-5", "step-6", "step-7"]

    async def end(*others: str) -> None:
        async with fleet.database.write() as session:
            await session.execute(update(JobRow).where(JobRow.id.in_(others)).values(status="cancelled"))

    fleet.loop.run(end(resumed, begun))
    assert worker.publish(job_id, 8, checkpoint(8)).keep == []
    assert fleet.checkpoints(job_id) == ["step-6", "step-7", "step-8"]


def _batch_of_another_version(worker: SimulatedWorker, job_id: str, lines: list[dict[str, Any]]) -> str:
    """A batch that is not validated by our models."""
    batch = worker.batch(job_id, 1, *[{}] * len(lines)).model_dump(mode="json")
    return json.dumps({**batch, "lines": lines})


# --- Messages that can't be stored now --------------------------------------------------------------------------------


RESULT = CheckResult(check_id="a check", worker="simulated", failure="the check failed")


def consumer_of_checks(fleet: SmallFleet) -> SteppedConsumer:
    """A consumer of a database that has asked for `RESULT`."""

    async def prepare() -> None:
        async with fleet.database.write() as session:  # the table that the check of the database writes to
            await session.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32))"))
            session.add(CheckRow(id=RESULT.check_id, worker=RESULT.worker, created_at=utc_now()))

    fleet.loop.run(prepare())
    return SteppedConsumer(fleet)


def fail_passes(stepped: SteppedConsumer, number: int) -> None:
    """Run passes that each fail because the database rejects the first message."""
    for _ in range(number):
        with pytest.raises(DatabaseUnavailable):
            stepped.one_pass()


def checks_stored(fleet: SmallFleet) -> list[str]:
    async def read() -> list[str]:
        async with fleet.database.read() as session:
            return list((await session.scalars(select(CheckRow.id).where(CheckRow.failure.is_not(None)))).all())

    return fleet.loop.run(read())


def test_a_long_database_outage_removes_no_message(tmp_path: Path, redis_url: str, client: "redis.Redis") -> None:
    with small_fleet(tmp_path, redis_url) as fleet:
        stepped = consumer_of_checks(fleet)
        stepped.one_pass()
        SimulatedWorker(client, SECRET).send(RESULT)
        file = fleet.settings.home / "zeta.db"
        file.rename(tmp_path / "away.db")
        fail_passes(stepped, 3 * MAX_TRIES)
        assert stepped.dropped.counts == {}
        (tmp_path / "away.db").rename(file)
        stepped.one_pass()
        assert checks_stored(fleet) == ["a check"]
        stepped.close()


def test_a_message_that_a_writable_database_keeps_rejecting_is_removed(
    tmp_path: Path, redis_url: str, postgres_url: str, client: "redis.Redis", caplog: pytest.LogCaptureFixture
) -> None:
    with (
        small_fleet(tmp_path, redis_url, postgres_url) as fleet,
        psycopg.connect(postgres_url, autocommit=True) as admin,
    ):
        stepped = consumer_of_checks(fleet)
        admin.execute(
            "CREATE FUNCTION reject() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'out of range' USING ERRCODE = '22003'; END $$"
        )
        admin.execute(
            "CREATE FUNCTION refuse_for_now() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'no space' USING ERRCODE = '53400'; END $$"
        )
        admin.execute("CREATE TRIGGER t BEFORE UPDATE ON checks FOR EACH ROW EXECUTE FUNCTION refuse_for_now()")
        worker = SimulatedWorker(client, SECRET)
        worker.send(RESULT)
        worker.send(RESULT)
        fail_passes(stepped, MAX_TRIES - 1)
        assert stepped.dropped.counts == {}
        fail_passes(stepped, 1)  # removes the first and tries the second
        assert stepped.dropped.counts == {UNAPPLIED: 1}
        admin.execute("DROP TRIGGER t ON checks")
        admin.execute("CREATE TRIGGER t BEFORE UPDATE ON checks FOR EACH ROW EXECUTE FUNCTION reject()")
        stepped.one_pass()
        assert stepped.dropped.counts == {UNAPPLIED: 2}
        assert client.xlen(SERVER_STREAM) == 0
        assert "invalid entry" not in caplog.text
        stepped.close()
