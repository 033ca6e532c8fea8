"""The two databases of the service and their faults: a lock of another program, and an outage."""

import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
from sqlalchemy import and_, create_engine, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from server.database.placements import UNRELEASED, PlacementRow
from server.database.tables import AttemptRow, CheckpointRow, EventRow, JobRow
from tests.harness.postgres import PostgresServer

UNAVAILABLE = (OperationalError,)  # raised by reads while the database is locked or down


@dataclass(frozen=True)
class JobState:
    """The state of a job; ``last_step`` is the last stored step of its current attempt.

    ``nodes`` are the workers that hold a node of an attempt on several workers.
    """

    status: str
    attempt: int
    worker: str | None
    last_step: int | None
    nodes: frozenset[str] = frozenset()

    @property
    def workers(self) -> frozenset[str]:
        """The workers that run the job, or to which it was dispatched."""
        return self.nodes | ({self.worker} if self.worker is not None else frozenset[str]())


class FaultyDatabase(ABC):
    """A database whose ``url`` the servers use, and whose rows the suite reads directly."""

    name: str
    takes_several_servers: bool

    def __init__(self, url: str, own_url: str, **connect: object) -> None:
        self.url = url
        self._engine = create_engine(own_url, connect_args=connect, pool_pre_ping=True)

    @abstractmethod
    @contextmanager
    def locked(self) -> Generator[None]:
        """Lock the database, so that no one else can write until the block ends."""
        yield

    def job_states(self) -> dict[str, JobState]:
        """The state of every job, by id. Like the methods below, raises `UNAVAILABLE`."""
        query = select(JobRow.id, JobRow.status, JobRow.attempt, JobRow.worker, AttemptRow.last_step).outerjoin(
            AttemptRow, and_(AttemptRow.job_id == JobRow.id, AttemptRow.attempt == JobRow.attempt)
        )
        with Session(self._engine) as session:
            nodes: dict[str, set[str]] = {}
            for placement in session.scalars(select(PlacementRow).where(UNRELEASED)):
                nodes.setdefault(placement.job_id, set()).add(placement.worker)
            return {row[0]: JobState(*row[1:], frozenset(nodes.get(row[0], ()))) for row in session.execute(query)}

    def jobs(self) -> dict[str, JobRow]:
        with Session(self._engine) as session:
            return {job.id: job for job in session.scalars(select(JobRow))}

    def attempts(self, job_id: str) -> list[AttemptRow]:
        with Session(self._engine) as session:
            query = select(AttemptRow).where(AttemptRow.job_id == job_id).order_by(AttemptRow.attempt)
            return list(session.scalars(query))

    def events(self, job_id: str) -> list[EventRow]:
        with Session(self._engine) as session:
            return list(session.scalars(select(EventRow).where(EventRow.job_id == job_id).order_by(EventRow.seq)))

    def checkpoints(self, job_id: str) -> list[CheckpointRow]:
        with Session(self._engine) as session:
            query = select(CheckpointRow).where(CheckpointRow.job_id == job_id).order_by(CheckpointRow.name)
            return list(session.scalars(query))

    def close(self) -> None:
        self._engine.dispose()


class SqliteDatabase(FaultyDatabase):
    """An SQLite file for one server. It has no outages, but another program may lock it."""

    name = "SQLite"
    takes_several_servers = False

    def __init__(self, file: Path) -> None:
        super().__init__(f"sqlite:///{file}", f"sqlite:///{file}", timeout=1)
        self._file = file

    @contextmanager
    def locked(self) -> Generator[None]:
        holder = sqlite3.connect(self._file, timeout=30, isolation_level=None)
        try:
            holder.execute("BEGIN EXCLUSIVE")
            yield
            holder.execute("ROLLBACK")
        finally:
            holder.close()


class PostgresDatabase(FaultyDatabase):
    """A real PostgreSQL server, used by two API servers."""

    name = "PostgreSQL"
    takes_several_servers = True

    def __init__(self, server: PostgresServer, url: str) -> None:
        own = url.replace("postgresql://", "postgresql+psycopg://")
        super().__init__(url, own, connect_timeout=2, options="-c lock_timeout=1000")
        self._server = server

    @contextmanager
    def locked(self) -> Generator[None]:
        with psycopg.connect(self.url) as holder:
            holder.execute("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
            yield

    def crash(self) -> None:
        """Stop the server immediately, without a clean shutdown, until `start_again`."""
        self._server.crash()

    def start_again(self) -> None:
        self._server.start_again()
