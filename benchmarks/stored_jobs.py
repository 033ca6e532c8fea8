"""Filling the database of a server with many jobs and events, by copying a submitted job within the database."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta

import psycopg
from psycopg import sql

from benchmarks.http_load import run_load
from benchmarks.services import submission
from tests.server.server_process import ServerProcess
from zeta_core.contract.identifiers import new_id

START = datetime(2026, 1, 1, tzinfo=UTC)
# Every filter with matches fills a page of 20 jobs, also with only 100 jobs.
STATUSES = ("succeeded", "succeeded", "failed", "cancelled", "paused", "queued")
OWN_COLUMNS = ("id", "status", "entity_name", "metadata", "created_at", "last_seq")
EVENT_COLUMNS = "job_id, seq, attempt, line, type, created_at, fields"

JobValues = tuple[str, str, str, str, datetime, int]  # of `OWN_COLUMNS`


def fill(server: ServerProcess, num_jobs: int, events_per_job: int, postgresql_url: str | None) -> str:
    """Store this many jobs with their events. Returns the id of a job in the middle."""
    run_load(server.port, lambda _: submission(), clients=1, total=1, expected_status=201)
    jobs: list[JobValues] = [
        (
            new_id("job"),
            STATUSES[number % len(STATUSES)],
            f"name-{number % 5}",
            f'{{"team": "t{number % 5}"}}',
            START + timedelta(seconds=number),
            events_per_job,
        )
        for number in range(num_jobs)
    ]
    if postgresql_url is None:
        _fill_sqlite(server, jobs, events_per_job)
    else:
        _fill_postgresql(postgresql_url, jobs, events_per_job)
    return jobs[num_jobs // 2][0]


def _fill_sqlite(server: ServerProcess, jobs: Sequence[JobValues], events_per_job: int) -> None:
    with closing(sqlite3.connect(server.home / "zeta.db", timeout=60)) as database:
        columns = [row[1] for row in database.execute("PRAGMA table_info(jobs)")]
        copied = ", ".join(column for column in columns if column not in OWN_COLUMNS)
        database.executemany(
            f"INSERT INTO jobs ({', '.join(OWN_COLUMNS)}, {copied}) "
            f"SELECT ?, ?, ?, ?, ?, ?, {copied} FROM jobs WHERE entity_name = 'benchmark' LIMIT 1",
            [(*job[:4], f"{job[4]:%Y-%m-%d %H:%M:%S.%f}", job[5]) for job in jobs],
        )
        database.execute(
            "WITH RECURSIVE number(seq) AS (SELECT 1 UNION ALL SELECT seq + 1 FROM number WHERE seq < ?) "
            f"INSERT INTO events ({EVENT_COLUMNS}) "
            "SELECT jobs.id, number.seq, 1, number.seq, 'log', jobs.created_at, '{\"message\": \"x\"}' "
            "FROM jobs, number WHERE jobs.entity_name <> 'benchmark'",
            (events_per_job,),
        )
        database.commit()
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _fill_postgresql(url: str, jobs: Sequence[JobValues], events_per_job: int) -> None:
    with psycopg.connect(url, autocommit=True) as database:
        found = database.execute("SELECT column_name FROM information_schema.columns WHERE table_name = 'jobs'")
        columns = [str(row[0]) for row in found.fetchall()]
        copied = sql.SQL(", ").join(sql.Identifier(column) for column in columns if column not in OWN_COLUMNS)
        database.execute(
            sql.SQL(
                "INSERT INTO jobs (id, status, entity_name, metadata, created_at, last_seq, {copied}) "
                "SELECT new.*, {copied} FROM (SELECT {copied} FROM jobs LIMIT 1) AS submitted, "
                "unnest(%s::text[], %s::text[], %s::text[], %s::jsonb[], %s::timestamptz[], %s::bigint[]) AS new"
            ).format(copied=copied),
            [list(values) for values in zip(*jobs, strict=True)],
        )
        database.execute(
            sql.SQL(
                "INSERT INTO events (job_id, seq, attempt, line, type, created_at, fields) "
                "SELECT jobs.id, number, 1, number, 'log', jobs.created_at, '{{\"message\": \"x\"}}' "
                "FROM jobs, generate_series(1, {number}) AS number WHERE jobs.entity_name <> 'benchmark'"
            ).format(number=events_per_job)
        )
        database.execute("VACUUM ANALYZE")  # as autovacuum does after such an insert
