"""A server's engine and real worker processes, for tests of their interaction.

The engine runs in this process, in the event loop of a separate thread, so tests need no coroutines. It can be stopped
and started again, like a server that restarts.
"""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Coroutine, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil
from sqlalchemy import inspect, select

from migrations.versions import r0007_indexes, r0008_projects
from server.database.connections import Database
from server.database.service_identity import identify_service
from server.database.tables import AttemptRow, CheckpointRow, DrainRow, EventRow, JobEndRow, JobRow, Table
from server.engine.engine import Engine
from server.settings import ServerSettings
from tests.harness.children import start_child
from tests.harness.service import clean_environment
from tests.harness.waiting import wait_until
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.job.status import ENDED

SECRET = "the-secret-of-the-test"
SMALL_WORKER = Path(__file__).parents[1] / "worker" / "small_worker.py"
REPOSITORY = Path(__file__).parents[2]
Answer = TypeVar("Answer")


class EventLoopThread:
    """An event loop that runs in its own thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Answer], timeout_seconds: float = 90) -> Answer:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout_seconds)

    def call(self, function: Any) -> None:
        self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


class SmallFleet:
    """A database, an engine of the server, and worker processes that run `tests.worker.small_training`."""

    def __init__(self, folder: Path, redis_url: str, database_url: str | None = None, **settings: Any) -> None:
        self.folder = folder
        self.settings = ServerSettings(
            home=folder / "home",
            redis_url=redis_url,
            database_url=database_url,
            worker_secret=SECRET,
            **settings,
        )
        self.settings.home.mkdir(parents=True, exist_ok=True)
        if database_url is None:
            (self.settings.home / "zeta.db").touch()  # `Database` never creates a file
        self.loop = EventLoopThread()
        self.database = self.loop.run(_open(self.settings.database))
        self.loop.run(_create_tables(self.database))
        self.workers: list[subprocess.Popen[bytes]] = []
        self.engine: Engine | None = None

    def start_engine(self) -> Engine:
        async def start() -> Engine:
            engine = Engine(self.database, self.settings, await identify_service(self.database))
            await engine.claim()
            engine.start()
            return engine

        self.engine = self.loop.run(start())
        return self.engine

    def stop_engine(self) -> None:
        if self.engine is not None:
            self.loop.run(self.engine.stop())
            self.engine = None

    def wake(self) -> None:
        if self.engine is not None:
            self.loop.call(self.engine.wake)

    def start_worker(
        self,
        name: str = "w1",
        *,
        small: bool = True,
        program: Path = SMALL_WORKER,
        hang_seconds: float | None = None,
        **variables: str,
    ) -> subprocess.Popen[bytes]:
        """Start a worker process: a real one, or ``program``. A second start with the same name is a restart."""
        environment = {
            **clean_environment(),
            "PYTHONPATH": str(REPOSITORY),
            "ZETA_HOME": str(self.settings.home),
            "ZETA_REDIS_URL": self.settings.redis_url,
            "ZETA_WORKER_SECRET": SECRET,
            "ZETA_WORKER_NAME": name,
            "ZETA_STOP_GRACE_SECONDS": "2",
            **variables,
        }
        command: list[str | Path] = [sys.executable, program] if small else [sys.executable, "-m", "worker"]
        if hang_seconds is not None:
            command.append(str(hang_seconds))
        worker = start_child(command, log_file=self.folder / f"{name}.log", environment=environment)
        self.workers.append(worker)
        return worker

    def submit(
        self,
        *,
        kind: JobKind = JobKind.TRAINING,
        spec: dict[str, Any] | None = None,
        max_retries: int = 3,
        **metadata: str,
    ) -> str:
        """Store a queued job, as the API does. ``metadata`` controls the small run."""
        job_id = new_id("job")
        spec = spec or {"model": "m", "dataset": {"builtin": "python-docs"}, "metadata": metadata}
        self.loop.run(_insert(self.database, job_id, kind, spec, max_retries))
        self.wake()
        return job_id

    def request(self, job_id: str, action: str) -> None:
        self.loop.run(_request(self.database, job_id, action))
        self.wake()

    def request_save(self, job_id: str) -> None:
        self.loop.run(_request_save(self.database, job_id))
        self.wake()

    def drain(self, worker: str) -> None:
        self.loop.run(_drain(self.database, worker))
        self.wake()

    def job(self, job_id: str) -> JobRow:
        return self.loop.run(_get(self.database, job_id))

    def attempts(self, job_id: str) -> list[AttemptRow]:
        query = select(AttemptRow).where(AttemptRow.job_id == job_id).order_by(AttemptRow.attempt)
        return self.loop.run(_all(self.database, query))

    def events(self, job_id: str) -> list[EventRow]:
        query = select(EventRow).where(EventRow.job_id == job_id).order_by(EventRow.seq)
        return self.loop.run(_all(self.database, query))

    def end_counts(self) -> dict[str, int]:
        """The number of ended jobs by reason, according to the metrics."""
        return {row.reason: row.count for row in self.loop.run(_all(self.database, select(JobEndRow)))}

    def checkpoints(self, job_id: str) -> list[str]:
        query = select(CheckpointRow.name).where(CheckpointRow.job_id == job_id).order_by(CheckpointRow.name)
        return self.loop.run(_all(self.database, query))

    def wait_for_status(self, job_id: str, status: str, timeout_seconds: float = 90) -> JobRow:
        def reached() -> JobRow | None:
            job = self.job(job_id)
            wrong_end = job.status in ENDED and job.status != status
            assert not wrong_end, f"{job_id} is {job.status} ({job.status_reason}): {job.error}\n{self.logs()}"
            return job if job.status == status else None

        try:
            found = wait_until(reached, timeout_seconds, f"{job_id} to be {status}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None
        assert found is not None
        return found

    def wait_for_step(self, job_id: str, step: int, timeout_seconds: float = 90) -> None:
        try:
            wait_until(
                lambda: ((self.job(job_id).progress or {}).get("step") or 0) >= step,
                timeout_seconds,
                f"{job_id} to reach step {step}",
            )
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def check_events(self, job_id: str) -> None:
        """Check that every event and every journal line is stored once and in order, without a gap."""
        events = self.events(job_id)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        for attempt in self.attempts(job_id):
            lines = [event.line for event in events if event.attempt == attempt.attempt and event.line is not None]
            assert lines == list(range(1, len(lines) + 1))
            assert attempt.stored_line == len(lines)

    def logs(self) -> str:
        return "\n".join(f"--- {file.name}\n{file.read_text()[-5000:]}" for file in sorted(self.folder.glob("*.log")))

    def close(self) -> None:
        self.stop_engine()
        for worker in self.workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
        for process in psutil.process_iter():
            try:  # a failed test leaves no run behind
                if str(self.settings.home) in " ".join(process.cmdline()):
                    process.kill()
            except psutil.Error:
                continue
        self.loop.run(self.database.close())
        self.loop.close()


@contextmanager
def small_fleet(
    folder: Path, redis_url: str, database_url: str | None = None, **settings: Any
) -> Generator[SmallFleet]:
    fleet = SmallFleet(folder, redis_url, database_url, **settings)
    try:
        yield fleet
    finally:
        fleet.close()


async def _open(url: str) -> Database:
    return Database(url)


async def _create_tables(database: Database) -> None:
    async with database.write() as session:
        connection = await session.connection()
        if await connection.run_sync(lambda existing: inspect(existing).has_table(JobRow.__tablename__)):
            return  # another fleet uses this database
        await connection.run_sync(Table.metadata.create_all)
        name = connection.dialect.name
        for statement in (*r0007_indexes.TRIGGERS[name], *r0008_projects.TRIGGERS[name]):
            await connection.exec_driver_sql(statement)


async def _insert(database: Database, job_id: str, kind: JobKind, spec: dict[str, Any], max_retries: int) -> None:
    async with database.write() as session:
        session.add(
            JobRow(
                id=job_id,
                kind=kind,
                project="default",
                created_by="key_test",
                status="queued",
                spec=spec,
                resolved_spec_json=spec,
                priority=0,
                max_retries=max_retries,
                created_at=utc_now(),
                warnings=[],
                job_metadata={},
            )
        )


async def _request(database: Database, job_id: str, action: str) -> None:
    async with database.write() as session:
        job = await session.get_one(JobRow, job_id)
        job.requested_action = action


async def _request_save(database: Database, job_id: str) -> None:
    async with database.write() as session:
        job = await session.get_one(JobRow, job_id)
        job.num_save_requests += 1


async def _drain(database: Database, worker: str) -> None:
    async with database.write() as session:
        session.add(DrainRow(worker=worker, created_by="key_test", created_at=utc_now()))


async def _get(database: Database, job_id: str) -> JobRow:
    async with database.read() as session:
        return await session.get_one(JobRow, job_id)


async def _all(database: Database, query: Any) -> list[Any]:
    async with database.read() as session:
        return list((await session.scalars(query)).all())
