"""A fleet of 1,000 workers with 10,000 queued jobs on PostgreSQL, compared with an empty system.

Server, PostgreSQL (flushing to disk) and Valkey are real, and each worker speaks the real protocol; only its trainings
are scripted (`benchmarks.scripted_fleet`). First all workers are busy and the queue is full. Submissions to this
service and to an empty one are measured in turn. Then the trainings end after a second each, and the queue drains for a
limited time. At the end, the database and the records of the workers must agree: nothing was lost or done twice.
"""

from __future__ import annotations

import json
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import psycopg

from benchmarks.http_load import run_load
from benchmarks.result import ZETA, BenchmarkResult, ratio_of_rounds
from benchmarks.scripted_fleet import HOLD_KEY, Record
from benchmarks.services import databases, submission, zeta_server
from benchmarks.workload import Size
from tests.harness.children import start_child, stop_child
from tests.harness.service import clean_environment
from tests.harness.valkey import client_without_retries
from tests.harness.waiting import wait_until
from tests.server.server_process import REPOSITORY, SECRET, ServerProcess

WORKERS, QUEUED_JOBS = 1_000, 10_000
ROUNDS, REQUESTS, CLIENTS = 6, 100, 4  # of the submissions that are compared
IDLE_SECONDS, DRAIN_SECONDS = 10.0, 60.0
REPORT_SECONDS = 60.0  # for the first heartbeat of every worker
FILL_SECONDS = 600.0  # for the first job of every worker


@dataclass(frozen=True)
class Usage:
    """The processor time of the server and the traffic of Redis until now."""

    at: float  # monotonic
    cpu_seconds: float
    redis_bytes: int
    redis_commands: int

    @classmethod
    def read(cls, server: ServerProcess, redis: Any) -> Usage:
        times, stats = psutil.Process(server.pid).cpu_times(), redis.info("stats")
        traffic = int(stats["total_net_input_bytes"]) + int(stats["total_net_output_bytes"])
        return cls(time.monotonic(), times.user + times.system, traffic, int(stats["total_commands_processed"]))

    def until(self, later: Usage) -> dict[str, float]:
        """The usage per second between two readings."""
        seconds = later.at - self.at
        return {
            "server_cpu_cores": (later.cpu_seconds - self.cpu_seconds) / seconds,
            "redis_bytes_per_second": (later.redis_bytes - self.redis_bytes) / seconds,
            "redis_commands_per_second": (later.redis_commands - self.redis_commands) / seconds,
        }


@contextmanager
def scripted_fleet(folder: Path, redis_url: str, num_workers: int) -> Generator[subprocess.Popen[bytes]]:
    """The process of the workers, whose records are in ``fleet.json`` after its end."""
    command = [sys.executable, "-m", "benchmarks.scripted_fleet", redis_url, SECRET, str(num_workers)]
    command.append(str(folder / "fleet.json"))
    environment = {**clean_environment(), "PYTHONPATH": str(REPOSITORY)}
    process = start_child(command, log_file=folder / "fleet.log", environment=environment)
    try:
        yield process
    finally:
        stop_child(process, stop_signal=signal.SIGTERM)


def measure(size: Size) -> BenchmarkResult:
    workers, queued = size.of(WORKERS, 10), size.of(QUEUED_JOBS, 30)
    rounds, requests = size.of(ROUNDS, 2), size.of(REQUESTS, 10)
    body, details = submission(), dict[str, object]()
    p99: dict[str, list[float]] = {ZETA: [], "empty system": []}
    with databases("postgresql") as made:
        (made.folder / "empty").mkdir()
        url = made.new_url()
        assert url is not None, "it is PostgreSQL"
        with (
            zeta_server(made.folder, url) as server,
            zeta_server(made.folder / "empty", made.new_url()) as empty,
            client_without_retries(server.settings.redis_url) as redis,
            psycopg.connect(url, autocommit=True) as database,
        ):
            before = Usage.read(server, redis)
            _pause(size.of(int(IDLE_SECONDS), 1))
            details["server_alone"] = before.until(Usage.read(server, redis))
            redis.set(HOLD_KEY, "1")
            with scripted_fleet(made.folder, server.settings.redis_url, workers) as fleet:
                wait_until(lambda: _num_workers(server) == workers, REPORT_SECONDS, "a heartbeat of every worker")
                before = Usage.read(server, redis)
                _pause(size.of(int(IDLE_SECONDS), 1))
                details["idle_workers"] = before.until(Usage.read(server, redis))
                filling = run_load(server.port, lambda _: body, clients=32, total=workers + queued, expected_status=201)
                details["submissions_per_second"] = filling.per_second
                wait_until(lambda: _counts(database)["running"] >= workers, FILL_SECONDS, "every worker to be busy")
                before = Usage.read(server, redis)
                _pause(size.of(int(IDLE_SECONDS), 1))
                details["busy_workers"] = before.until(Usage.read(server, redis))
                for number in range(rounds + 1):
                    for name, each in ((ZETA, server), ("empty system", empty))[:: 1 if number % 2 else -1]:
                        load = run_load(each.port, lambda _: body, clients=CLIENTS, total=requests, expected_status=201)
                        if number:
                            p99[name].append(1000 * load.percentile(0.99))
                details["drain"] = _drain(server, redis, database, size.of(int(DRAIN_SECONDS), 20))
                fleet.send_signal(signal.SIGTERM)
                assert fleet.wait(60) == 0, (made.folder / "fleet.log").read_text()
                records = [Record(**found) for found in json.loads((made.folder / "fleet.json").read_text())]
            accepted = workers + queued + (rounds + 1) * requests
            details["placement"] = _placement(records)
            details["checked_jobs"] = _check(database, records, accepted)
    return BenchmarkResult(
        title=f"p99 of submissions with {workers:,} workers and {queued:,} queued jobs, relative to an empty system",
        unit="ms",
        figures=p99,
        ratio=ratio_of_rounds(*p99.values()),
        target=2.0,
        target_is="maximum",
        notes=f"PostgreSQL; {CLIENTS} clients; then the queue drains for at most {DRAIN_SECONDS:.0f} s.",
        details=details,
    )


def _pause(seconds: float) -> None:
    threading.Event().wait(seconds)


def _num_workers(server: ServerProcess) -> int:
    """The workers whose heartbeats the server has read."""
    with server.http() as http:
        metrics = http.get("/metrics").raise_for_status().text
    [value] = re.findall(r"^zeta_workers (\S+)$", metrics, re.MULTILINE)
    return int(float(value))


def _counts(database: psycopg.Connection[Any]) -> Counter[str]:
    return Counter(dict(database.execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall()))


def _drain(
    server: ServerProcess, redis: Any, database: psycopg.Connection[Any], limit_seconds: float
) -> dict[str, float]:
    """Let the trainings end until the queue is empty, or the time is over."""
    claims = "SELECT count(*) FROM attempts"
    [(first,)], before = database.execute(claims).fetchall(), Usage.read(server, redis)
    redis.delete(HOLD_KEY)
    while time.monotonic() - before.at < limit_seconds:
        _pause(0.5)
        counts = _counts(database)
        if not counts["queued"] + counts["running"]:
            break
    [(last,)], after = database.execute(claims).fetchall(), Usage.read(server, redis)
    num, seconds = last - first, after.at - before.at
    cpu_seconds = after.cpu_seconds - before.cpu_seconds
    return {
        "hand_overs": num,
        "hand_overs_per_second": num / seconds,
        "server_cpu_cores": cpu_seconds / seconds,
        "server_cpu_milliseconds_per_hand_over": 1000 * cpu_seconds / max(1, num),
    }


def _placement(records: Sequence[Record]) -> dict[str, float]:
    """Milliseconds between two dispatches, and from a free slot in a heartbeat to the next dispatch to that worker."""
    times = sorted(record.dispatched_at for record in records)
    gaps = [after - before for before, after in pairwise(times)]
    idle = [record.dispatched_at - record.free_since for record in records if record.free_since]
    claims = [record.granted_at - record.dispatched_at for record in records if record.granted_at is not None]
    named = {"between_dispatches": gaps, "free_slot_to_dispatch": idle, "dispatch_to_grant": claims}
    return {
        f"{name}_{label}": 1000 * sorted(values)[int(share * (len(values) - 1))]
        for name, values in named.items()
        for label, share in (("p50", 0.5), ("p99", 0.99))
        if values
    } | {"mean_between_dispatches": 1000 * statistics.fmean(gaps)}


def _check(database: psycopg.Connection[Any], records: Sequence[Record], accepted: int) -> int:
    """The number of jobs; an error if one is lost, started twice, or lacks an event."""
    assert _counts(database).total() == accepted, "every accepted job is there, once"
    holders = Counter((record.job_id, record.attempt) for record in records if record.num_grants)
    assert set(holders.values()) <= {1}, "no attempt was granted to two workers"
    ended = {record.job_id for record in records if record.ended_at is not None}
    rows = database.execute(
        "SELECT jobs.id, jobs.attempt, jobs.last_seq, count(events.seq), max(events.seq) FROM jobs "
        "JOIN events ON events.job_id = jobs.id WHERE jobs.status = 'succeeded' GROUP BY jobs.id"
    ).fetchall()
    assert ended <= {row[0] for row in rows}, "every acknowledged end is stored"
    for job_id, attempt, last_seq, num_events, max_seq in rows:
        assert attempt == 1, f"{job_id} was started {attempt} times"
        assert last_seq == num_events == max_seq, f"{job_id} lacks an event, or has one twice"
    return accepted
