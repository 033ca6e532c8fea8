"""Time of every list and of /metrics with many jobs and events, relative to 100 jobs, on one server with two databases.

The rows are inserted directly into SQLite. A request is measured with each database in turn.
"""

from __future__ import annotations

import sqlite3
import statistics
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

from benchmarks.http_load import request_bytes, run_load
from benchmarks.result import BenchmarkResult
from benchmarks.services import HEADERS, databases, submission, zeta_server
from benchmarks.workload import Size
from tests.server.server_process import ServerProcess
from zeta_core.contract.identifiers import new_id

FEW_JOBS, MANY_JOBS, EVENTS_PER_JOB = 100, 100_000, 100
REQUESTS = 40  # of each kind in a round
START = datetime(2026, 1, 1, tzinfo=UTC)
# Both databases fill a page of 20 jobs for each filter with matches.
STATUSES = ("succeeded", "succeeded", "failed", "cancelled", "paused", "queued")
PATHS = (
    "/v1/jobs",
    "/v1/jobs?status=failed",
    "/v1/jobs?status=running&status=paused",
    "/v1/jobs?entity_name=name-1",
    "/v1/jobs?entity_name=missing",
    "/v1/jobs?metadata%5Bteam%5D=t1",
    "/v1/jobs?metadata%5Bteam%5D=missing",
    "/v1/jobs?after={middle}",
    "/v1/jobs/{middle}",
    "/v1/jobs/{middle}/events",
    "/v1/files",
    "/v1/workers",
    "/metrics",
)


def fill(server: ServerProcess, num_jobs: int, events_per_job: int) -> str:
    """Copy a submitted job and its event many times. Returns the id of a job in the middle."""
    run_load(server.port, lambda _: submission(), clients=1, total=1, expected_status=201)
    with closing(sqlite3.connect(server.home / "zeta.db", timeout=60)) as database:
        columns = [row[1] for row in database.execute("PRAGMA table_info(jobs)")]
        own = ("id", "status", "entity_name", "metadata", "created_at", "last_seq")
        copied = ", ".join(column for column in columns if column not in own)
        ids = [new_id("job") for _ in range(num_jobs)]
        rows = (
            (
                job_id,
                STATUSES[number % len(STATUSES)],
                f"name-{number % 5}",
                f'{{"team": "t{number % 5}"}}',
                f"{START + timedelta(seconds=number):%Y-%m-%d %H:%M:%S.%f}",
                events_per_job,
            )
            for number, job_id in enumerate(ids)
        )
        database.executemany(
            f"INSERT INTO jobs ({', '.join(own)}, {copied}) "
            f"SELECT ?, ?, ?, ?, ?, ?, {copied} FROM jobs WHERE entity_name = 'benchmark' LIMIT 1",
            rows,
        )
        database.execute(
            "WITH RECURSIVE number(seq) AS (SELECT 1 UNION ALL SELECT seq + 1 FROM number WHERE seq < ?) "
            "INSERT INTO events (job_id, seq, attempt, line, type, created_at, fields) "
            "SELECT jobs.id, number.seq, 1, number.seq, 'log', jobs.created_at, '{\"message\": \"x\"}' "
            "FROM jobs, number WHERE jobs.entity_name <> 'benchmark'",
            (events_per_job,),
        )
        database.commit()
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return ids[num_jobs // 2]


def measure(size: Size) -> BenchmarkResult:
    many = size.of(MANY_JOBS, 400)
    sizes = {f"{FEW_JOBS} jobs": FEW_JOBS, f"{many:,} jobs": many}
    times: dict[str, dict[str, list[float]]] = {name: {path: [] for path in PATHS} for name in sizes}
    with databases("sqlite") as made, ExitStack() as stack:
        servers: dict[str, tuple[ServerProcess, str]] = {}
        for number, (name, num_jobs) in enumerate(sizes.items()):
            folder = Path(made.folder / str(number))
            folder.mkdir()
            server = stack.enter_context(zeta_server(folder, None))
            servers[name] = server, fill(server, num_jobs, EVENTS_PER_JOB if num_jobs == many else 10)
        for turn in range(size.rounds + 1):
            for path in PATHS:
                for name, (server, middle) in servers.items():
                    request = request_bytes("GET", path.format(middle=middle), HEADERS)
                    load = run_load(server.port, lambda _, sent=request: sent, clients=1, total=size.of(REQUESTS, 3))
                    if turn:
                        times[name][path].append(1000 * statistics.median(load.latencies))
    few, large = times.values()
    medians = {path: (statistics.median(few[path]), statistics.median(large[path])) for path in PATHS}
    ratios = {path: after / before for path, (before, after) in medians.items()}
    worst = max(ratios, key=ratios.__getitem__)
    return BenchmarkResult(
        title=f"Slowest list or /metrics, {many:,} jobs and {many * EVENTS_PER_JOB:,} events, relative to 100 jobs",
        unit="ms",
        figures={f"{name}, {worst}": times[name][worst] for name in times},
        ratio=ratios[worst],
        target=1.5,
        target_is="maximum",
        notes=f"SQLite; the median of {REQUESTS} requests in each round; the list with the largest ratio of medians.",
        details={"ratios": ratios, "milliseconds": medians},
    )
