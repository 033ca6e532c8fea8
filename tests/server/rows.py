"""Jobs with a history, stored in a database and an artifact store like the engine and a worker would."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from sqlalchemy import inspect, select

from server.artifacts import Artifacts
from server.database import events
from server.database.access_tables import KeyRow, LoginLinkRow, SessionRow
from server.database.connections import Database
from server.database.receipt_tables import ReceiptRow
from server.database.tables import AttemptRow, CheckpointRow, IdempotencyRow, JobRow
from server.database.transitions import StatusChange, change_status, create_jobs, lock_job
from server.database.usage_table import UsageRow
from server.database.webhook_tables import WebhookRow
from server.settings import ServerSettings
from tests.server.server_process import SPEC
from zeta_core.contract.identifiers import new_id, new_id_at
from zeta_core.contract.job.checkpoint import FileRole, Manifest, ManifestFile
from zeta_core.contract.job.events import EventType, utc_now
from zeta_core.contract.job.status import JobStatus, StatusReason
from zeta_core.contract.spec.defaults import resolve
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.resolved_spec import ResolvedSpec
from zeta_core.contract.spec.validation import parse
from zeta_core.contract.wire.run_directory import checkpoint_key, log_key
from zeta_core.system.artifact_store.folder import FolderStore

Answer = TypeVar("Answer")
CREATED_AT = datetime(2026, 11, 22, 10, 0, tzinfo=UTC)


class Rows:
    """Writes to the database of ``settings`` with the server's own functions; each call runs an event loop."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.artifacts = Artifacts(FolderStore(settings.artifacts))
        self.artifacts.prepare()

    def job(
        self, *, project: str = "default", spec: Mapping[str, Any] | None = None, reported: ResolvedSpec | None = None
    ) -> str:
        """Create a queued job; ``spec`` are additional fields of `SPEC`, ``reported`` those of the resolved spec."""
        sent = {**SPEC, **(spec or {})}
        row = JobRow(
            id=new_id("job"),
            project=project,
            created_by="key_test",
            spec=sent,
            resolved_spec=resolve(parse(JobSpec, sent)).updated(reported or ResolvedSpec(files={})),
            priority=0,
            max_retries=3,
            created_at=utc_now(),
            job_metadata={},
        )
        _run(self._add(row))
        return row.id

    def attempt(
        self,
        job_id: str,
        *,
        progress: Sequence[Mapping[str, Any]] = (),
        log: str = "",
        to: JobStatus | None = None,
        reason: StatusReason | None = None,
    ) -> None:
        """Start the next attempt, store ``progress`` and ``log``, and end it with status ``to``, if given."""
        if reason is None:
            reason = StatusReason.COMPLETED if to == JobStatus.SUCCEEDED else StatusReason.RETRYING
        number = _run(self._attempt(job_id, progress, to, reason))
        path = self.settings.artifacts / log_key(job_id, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(log)

    def progress(self, job_id: str, progress: Sequence[Mapping[str, Any]]) -> None:
        """Store further progress of the running attempt."""
        _run(self._append(job_id, "progress", progress))

    def samples(self, job_id: str, samples: Sequence[Mapping[str, Any]]) -> None:
        """Store sample texts of the running attempt: ``step``, ``prompt`` and ``text``."""
        _run(self._append(job_id, "sample", samples))

    def requeue(self, job_id: str, reason: StatusReason) -> None:
        """End the running attempt; the job continues with another one."""
        _run(self._end(job_id, JobStatus.QUEUED, reason))

    def many_jobs(self, count: int) -> None:
        """Create ended jobs, each with its number in its name."""
        _run(self._many_jobs(count))

    def change(self, job_id: str, **values: Any) -> None:
        """Set columns of the job's row."""
        _run(self._change(job_id, values))

    def copy_job(self, job_id: str, new_id: str) -> None:
        """Insert a copy of the job with another id."""
        _run(self._copy_job(job_id, new_id))

    def has_job(self, job_id: str) -> bool:
        """Whether the job has a row, even if it is hidden from users."""
        return _run(self._has_job(job_id))

    def end(self, job_id: str, to: JobStatus) -> None:
        """End the running attempt and the job."""
        _run(self._end(job_id, to))

    def age_submissions(self, *, hours: float) -> None:
        """Make every stored submission older."""
        _run(self._age_submissions(timedelta(hours=hours)))

    def key(
        self,
        secret: str,
        *,
        project: str = "default",
        scopes: Sequence[str] = ("submit",),
        expires_at: datetime | None = None,
        revoked_at: datetime | None = None,
    ) -> None:
        """Create an API key that isn't the admin key."""
        row = KeyRow(
            id=new_id("key"),
            project=project,
            created_by="test",
            name="another",
            scopes=list(scopes),
            secret_sha256=hashlib.sha256(secret.encode()).hexdigest(),
            created_at=CREATED_AT,
            expires_at=expires_at,
            revoked_at=revoked_at,
        )
        _run(self._add(row))

    def expire_sessions(self) -> None:
        """Let every browser session expire now."""
        _run(self._expire(SessionRow))

    def expire_login_links(self) -> None:
        """Let every login link expire now."""
        _run(self._expire(LoginLinkRow))

    def has_receipt(self, job_id: str) -> bool:
        """Whether the job's receipt is signed."""
        return _run(self._has_receipt(job_id))

    def age_webhook(self, webhook_id: str, by: timedelta) -> None:
        """Let the webhook's first failure be older."""
        _run(self._age_webhook(webhook_id, by))

    def usage(self, *rows: UsageRow) -> None:
        """Store the usage of machines in intervals."""
        _run(self._add(*rows))

    def log_events(self, job_id: str, *messages: str) -> None:
        """Store a ``log`` event for each message."""
        _run(self._append(job_id, "log", [{"level": "info", "message": message} for message in messages]))

    def checkpoint(
        self,
        job_id: str,
        name: str,
        step: int,
        files: Mapping[str, tuple[FileRole, bytes]],
        *,
        num_bytes: int = 0,
        metrics: dict[str, float] | None = None,
    ) -> dict[str, bytes]:
        """Store a checkpoint; returns the bytes of its files and its manifest, by path."""
        directory = self.settings.artifacts / checkpoint_key(job_id, name)
        entries: list[ManifestFile] = []
        for path, (role, content) in files.items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            entries.append(ManifestFile(path=path, size=len(content), sha256=digest, role=role))
        manifest = Manifest(
            run_id="run", name=name, format="huggingface", step=step, tokens=step, created_at=CREATED_AT, files=entries
        )
        (directory / "manifest.json").write_text(manifest.model_dump_json())
        common: dict[str, Any] = {"job_id": job_id, "name": name, "step": step, "attempt": 1, "metrics": metrics or {}}
        row = CheckpointRow(**common, bytes=num_bytes, created_at=CREATED_AT)
        _run(self._add(row))
        return {
            **{path: content for path, (_, content) in files.items()},
            "manifest.json": manifest.model_dump_json().encode(),
        }

    def forget_checkpoint(self, job_id: str, name: str) -> None:
        """Remove a checkpoint from the database, then from the store, as when newer ones replace it."""
        _run(self._forget_checkpoint(job_id, name))
        self.artifacts.store.remove_checkpoint(job_id, name)

    async def _forget_checkpoint(self, job_id: str, name: str) -> None:
        database = Database(self.settings.database)
        async with database.write() as session:
            await session.delete(await session.get_one(CheckpointRow, (job_id, name)))
        await database.close()

    async def _add(self, *rows: Any) -> None:
        database = Database(self.settings.database)
        async with database.write() as session:
            for row in rows:
                if isinstance(row, JobRow):
                    await create_jobs(session, [row])
                else:
                    session.add(row)
        await database.close()

    async def _attempt(
        self, job_id: str, progress: Sequence[Mapping[str, Any]], to: JobStatus | None, reason: StatusReason
    ) -> int:
        database = Database(self.settings.database)
        async with database.write() as session:
            job = await lock_job(session, job_id)
            assert job is not None
            before, number = job.attempt, job.attempt + 1
            session.add(
                AttemptRow(
                    job_id=job_id,
                    attempt=number,
                    worker="w1",
                    device_kind=f"cpu:of attempt {number}",
                    incarnation="i",
                    started_at=CREATED_AT,
                    stored_line=0,
                )
            )
            await session.flush()
            started = StatusChange(JobStatus.RUNNING)
            assert await change_status(session, job, started, expect={JobStatus.QUEUED}, attempt=before)
            job.attempt = number
            for line, fields in enumerate(progress, start=1):
                events.append(
                    session, job, attempt=number, line=line, type="progress", created_at=utc_now(), fields=dict(fields)
                )
            if to is not None:
                ended = StatusChange(to, reason)
                assert await change_status(session, job, ended, expect={JobStatus.RUNNING}, attempt=number)
        await database.close()
        return number

    async def _age_submissions(self, by: timedelta) -> None:
        database = Database(self.settings.database)
        async with database.write() as session:
            for row in await session.scalars(select(IdempotencyRow)):
                row.created_at -= by
        await database.close()

    async def _has_receipt(self, job_id: str) -> bool:
        database = Database(self.settings.database)
        async with database.read() as session:
            row = await session.get(ReceiptRow, job_id)
        await database.close()
        return row is not None and row.envelope is not None

    async def _age_webhook(self, webhook_id: str, by: timedelta) -> None:
        database = Database(self.settings.database)
        async with database.write() as session:
            row = await session.get_one(WebhookRow, webhook_id)
            assert row.failing_since is not None
            row.failing_since -= by
        await database.close()

    async def _expire(self, table: type[SessionRow] | type[LoginLinkRow]) -> None:
        database = Database(self.settings.database)
        async with database.write() as session:
            for row in await session.scalars(select(table)):
                row.expires_at = utc_now()
        await database.close()

    async def _change(self, job_id: str, values: Mapping[str, Any]) -> None:
        database = Database(self.settings.database)
        async with database.write() as session:
            row = await session.get_one(JobRow, job_id)
            for name, value in values.items():
                setattr(row, name, value)
        await database.close()

    async def _copy_job(self, job_id: str, new_id: str) -> None:
        database = Database(self.settings.database)
        async with database.write() as session:
            row = await session.get_one(JobRow, job_id)
            values = {attribute.key: getattr(row, attribute.key) for attribute in inspect(JobRow).column_attrs}
            session.add(JobRow(**{**values, "id": new_id}))
        await database.close()

    async def _has_job(self, job_id: str) -> bool:
        database = Database(self.settings.database)
        async with database.read() as session:
            found = await session.get(JobRow, job_id)
        await database.close()
        return found is not None

    async def _append(self, job_id: str, type: EventType, events_fields: Sequence[Mapping[str, Any]]) -> None:
        database = Database(self.settings.database)
        async with database.write() as session:
            job = await lock_job(session, job_id)
            assert job is not None
            for fields in events_fields:
                events.append(
                    session,
                    job,
                    attempt=job.attempt,
                    line=None,
                    type=type,
                    created_at=utc_now(),
                    fields=dict(fields),
                )
        await database.close()

    async def _many_jobs(self, count: int) -> None:
        database = Database(self.settings.database)
        resolved = resolve(parse(JobSpec, SPEC)).updated(ResolvedSpec(files={}))
        async with database.write() as session:
            for number in range(count):
                job_id, created_at = new_id_at("job")
                session.add(
                    JobRow(
                        id=job_id,
                        project="default",
                        created_by="key_test",
                        status="succeeded",
                        entity_name=f"entity-{number}",
                        spec=SPEC,
                        resolved_spec=resolved,
                        priority=0,
                        max_retries=3,
                        created_at=created_at,
                        job_metadata={},
                    )
                )
        await database.close()

    async def _end(self, job_id: str, to: JobStatus, reason: StatusReason = StatusReason.CANCELLED_BY_USER) -> None:
        database = Database(self.settings.database)
        async with database.write() as session:
            job = await lock_job(session, job_id)
            assert job is not None
            ended = StatusChange(to, reason)
            assert await change_status(session, job, ended, expect={JobStatus.RUNNING}, attempt=job.attempt)
        await database.close()


def _run(coroutine: Coroutine[Any, Any, Answer]) -> Answer:
    """Run a coroutine in another thread, because Playwright's event loop occupies the thread of the tests."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def some_bytes(num_bytes: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(num_bytes)
