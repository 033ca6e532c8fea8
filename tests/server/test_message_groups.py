"""Messages that are waiting are applied in one transaction, and one that fails or waits affects no other."""

import threading
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from sqlalchemy import event, text

from server.engine.redis_client import UNAPPLIED
from tests.harness.fleet import SECRET, SmallFleet, small_fleet
from tests.harness.simulated_worker import SimulatedWorker, progress, status
from tests.harness.waiting import wait_until
from tests.server.stepped_consumer import SteppedConsumer, dispatched_job
from zeta_core.contract.wire.messages import SERVER_STREAM, Claim, JournalAck, worker_stream
from zeta_core.system.redis_access import RedisUnavailable

# Statements of a group's transaction: begin and commit, rows read and locked, and one per table that changes.
MAX_STATEMENTS = 16


@pytest.fixture
def fleet(database_url: str | None, tmp_path: Path, redis_url: str) -> Iterator[SmallFleet]:
    with small_fleet(tmp_path, redis_url, database_url) as fleet:
        yield fleet


@pytest.fixture
def postgres_fleet(postgres_url: str, tmp_path: Path, redis_url: str) -> Iterator[SmallFleet]:
    with small_fleet(tmp_path, redis_url, postgres_url) as fleet:
        yield fleet


@pytest.fixture
def stepped(request: pytest.FixtureRequest) -> Iterator[SteppedConsumer]:
    name = "postgres_fleet" if "postgres_fleet" in request.fixturenames else "fleet"
    stepped = SteppedConsumer(request.getfixturevalue(name))
    yield stepped
    stepped.close()


@contextmanager
def counted_statements(fleet: SmallFleet) -> Generator[Counter[str]]:
    """Count the ``statements`` and ``commits`` of transactions that write."""
    counts = Counter[str]()
    engine = fleet.database._writer.sync_engine  # pyright: ignore[reportPrivateUsage]

    def count_statement(*_: Any) -> None:
        counts["statements"] += 1

    def count_commit(_: Any) -> None:
        counts["commits"] += 1

    event.listen(engine, "before_cursor_execute", count_statement)
    event.listen(engine, "commit", count_commit)
    try:
        yield counts
    finally:
        event.remove(engine, "before_cursor_execute", count_statement)
        event.remove(engine, "commit", count_commit)


def running_jobs(stepped: SteppedConsumer, client: "redis.Redis", number: int) -> dict[str, SimulatedWorker]:
    """Running jobs, each on a worker of its own."""
    workers = [SimulatedWorker(client, SECRET, f"worker-{position}") for position in range(number)]
    jobs = {dispatched_job(stepped.fleet, worker.name): worker for worker in workers}
    for job_id, worker in jobs.items():
        worker.send(Claim(job_id=job_id, attempt=1, worker=worker.name, incarnation=worker.incarnation))
    drain(stepped, client)
    for job_id, worker in jobs.items():
        assert stepped.fleet.job(job_id).status == "running"
        worker.receive_all()
    return jobs


def drain(stepped: SteppedConsumer, client: "redis.Redis") -> None:
    """Run passes until the stream is empty."""
    while client.xlen(SERVER_STREAM):
        stepped.one_pass()


def send_ends(jobs: dict[str, SimulatedWorker]) -> None:
    for job_id, worker in jobs.items():
        worker.send(worker.batch(job_id, 1, status("running"), progress(1)))
        worker.send(worker.batch(job_id, 3, status("succeeded")))


def test_the_ends_of_many_jobs_are_one_transaction_with_few_statements(
    fleet: SmallFleet, stepped: SteppedConsumer, client: "redis.Redis"
) -> None:
    jobs = running_jobs(stepped, client, 20)
    send_ends(jobs)
    with counted_statements(fleet) as counts:
        stepped.one_pass()
    assert counts["commits"] == 1
    assert counts["statements"] <= MAX_STATEMENTS
    assert client.xlen(SERVER_STREAM) == 0
    assert stepped.num_wakes == 1
    assert fleet.end_counts() == {"completed": 20}
    for job_id, worker in jobs.items():
        acks = [message for message in worker.receive_all() if isinstance(message, JournalAck)]
        assert [ack.stored_line for ack in acks] == [2, 3]
        assert fleet.job(job_id).status == "succeeded"
        fleet.check_events(job_id)


def test_a_message_that_fails_does_not_affect_those_of_its_group(
    fleet: SmallFleet, stepped: SteppedConsumer, client: "redis.Redis"
) -> None:
    jobs = running_jobs(stepped, client, 4)
    poisoned = list(jobs)[1]
    reject_events_of(fleet, poisoned)
    send_ends(jobs)
    drain(stepped, client)
    assert stepped.dropped.counts == {UNAPPLIED: 1}  # the next one of the same job leaves a gap, and so has no effect
    assert (fleet.job(poisoned).status, fleet.job(poisoned).last_seq) == ("running", 1)
    assert fleet.end_counts() == {"completed": 3}
    for job_id in jobs.keys() - {poisoned}:
        assert fleet.job(job_id).status == "succeeded"
        fleet.check_events(job_id)


def reject_events_of(fleet: SmallFleet, job_id: str) -> None:
    """Make the database reject the events of this job, as it would reject an invalid value."""
    if fleet.database.is_sqlite:
        reject = "SELECT RAISE(ABORT, 'invalid')"
        statements = [f"CREATE TRIGGER t BEFORE INSERT ON events WHEN NEW.job_id = '{job_id}' BEGIN {reject}; END"]
    else:
        raising = "RAISE EXCEPTION 'invalid' USING ERRCODE = '22003'"
        statements = [
            f"CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {raising}; END $$",
            f"CREATE TRIGGER t BEFORE INSERT ON events FOR EACH ROW WHEN (NEW.job_id = '{job_id}') "
            "EXECUTE FUNCTION f()",
        ]

    async def create() -> None:
        async with fleet.database.write() as session:
            for statement in statements:
                await session.execute(text(statement))

    fleet.loop.run(create())


def test_a_locked_job_does_not_delay_the_others_of_its_group(
    postgres_fleet: SmallFleet, postgres_url: str, stepped: SteppedConsumer, client: "redis.Redis"
) -> None:
    jobs = running_jobs(stepped, client, 3)
    slow, *others = jobs
    send_ends(jobs)
    with psycopg.connect(postgres_url) as other:
        other.execute("SELECT 1 FROM jobs WHERE id = %s FOR UPDATE", (slow,))
        one_pass = threading.Thread(target=stepped.one_pass)
        one_pass.start()
        for job_id in others:
            postgres_fleet.wait_for_status(job_id, "succeeded", 20)
        assert postgres_fleet.job(slow).status == "running"
        other.rollback()
    one_pass.join(20)
    assert postgres_fleet.job(slow).status == "succeeded"
    assert client.xlen(SERVER_STREAM) == 0
    for job_id in jobs:
        postgres_fleet.check_events(job_id)


def test_a_commit_without_an_acknowledgement_stores_nothing_twice(
    postgres_fleet: SmallFleet, postgres_url: str, stepped: SteppedConsumer, client: "redis.Redis"
) -> None:
    fleet = postgres_fleet
    jobs = running_jobs(stepped, client, 3)
    send_ends(jobs)
    failures: list[Exception] = []

    def one_pass() -> None:
        try:
            stepped.one_pass()
        except RedisUnavailable as error:
            failures.append(error)

    with psycopg.connect(postgres_url) as other:
        other.execute("INSERT INTO job_ends (reason, count) VALUES ('completed', 5)")
        pass_thread = threading.Thread(target=one_pass)
        pass_thread.start()  # waits for this row just before its commit
        waiting = "SELECT 1 FROM pg_locks WHERE NOT granted"
        with psycopg.connect(postgres_url, autocommit=True) as watcher:
            wait_until(lambda: watcher.execute(waiting).fetchone(), 20, "the transaction to wait")
        client.execute_command("CLIENT PAUSE", 60_000, "WRITE")  # so the server can neither reply nor acknowledge
        other.commit()
        pass_thread.join(20)
    client.execute_command("CLIENT UNPAUSE")
    assert len(failures) == 1
    assert fleet.end_counts() == {"completed": 8}
    second = SteppedConsumer(fleet)  # another server gets the messages that the workers repeat
    send_ends(jobs)
    second.one_pass()
    stepped.one_pass()  # the first server reads its own messages again
    second.close()
    assert client.xlen(SERVER_STREAM) == 0
    assert fleet.end_counts() == {"completed": 8}
    for job_id, worker in jobs.items():
        acks = [message for message in worker.receive_all() if isinstance(message, JournalAck)]
        assert {ack.stored_line for ack in acks} == {3}
        fleet.check_events(job_id)


def test_a_reply_that_fails_does_not_affect_those_of_its_group(
    tmp_path: Path, redis_url: str, client: "redis.Redis"
) -> None:
    with small_fleet(tmp_path, redis_url) as fleet:
        stepped = SteppedConsumer(fleet)
        jobs = running_jobs(stepped, client, 3)
        client.set(worker_stream("worker-1"), "not a stream")
        send_ends(jobs)
        stepped.one_pass()
        for worker in jobs.values():
            assert len(worker.receive_all()) == 2
        stepped.close()
