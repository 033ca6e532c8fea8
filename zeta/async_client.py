"""The client of the service for asyncio. It has the methods of `Client`, which do their work in threads.

    async with AsyncClient() as client:
        job = await client.submit(spec)
        async for event in job.events():
            print(event.type)

Failures are the same `ZetaError` classes. A cancelled task stops waiting at once; a request that was sent completes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from zeta.client import Client
from zeta.client_job import AsyncJob
from zeta.errors import InvalidResponse
from zeta.service_client import PATIENCE_SECONDS
from zeta_core.contract.job.commands import FROM_START
from zeta_core.contract.job.job import Job
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.job.responses import Curves, DeletedObject, FilePurpose, StoredFile, Worker
from zeta_core.contract.job.status import ENDED, JobStatus

if TYPE_CHECKING:
    from zeta.async_webhooks import AsyncWebhooks
    from zeta.download import Download
    from zeta_core.contract.job.checkpoint import Manifest
    from zeta_core.contract.job.comparison import Comparison
    from zeta_core.contract.job.estimate import Estimate
    from zeta_core.contract.job.events import Event
    from zeta_core.contract.job.order import JobSort
    from zeta_core.contract.spec.job_spec import JobSpec

ItemT = TypeVar("ItemT")


class AsyncClient:
    """A client for one service with one API key, found as `Client` finds it."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        project: str | None = None,
        patience_seconds: float = PATIENCE_SECONDS,
        use_proxy: bool = True,
        certificate: str | None = None,
    ) -> None:
        """The parameters and exceptions are those of `Client`."""
        self._client = Client(
            base_url,
            api_key,
            project=project,
            patience_seconds=patience_seconds,
            use_proxy=use_proxy,
            certificate=certificate,
        )
        self.base_url = self._client.base_url

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    @property
    def webhooks(self) -> AsyncWebhooks:
        """Managing the webhooks of the project."""
        from zeta.async_webhooks import AsyncWebhooks

        return AsyncWebhooks(self._client.webhooks)

    async def submit(self, spec: JobSpec | Mapping[str, Any], *, idempotency_key: str | None = None) -> AsyncJob:
        """Create a job. A mapping may name local files and folders, which are uploaded first."""
        return self._own(await asyncio.to_thread(self._client.submit, spec, idempotency_key=idempotency_key))

    async def validate(self, spec: JobSpec | Mapping[str, Any]) -> Estimate:
        """Check a spec as `submit` does, and estimate its cost, without creating a job."""
        return await asyncio.to_thread(self._client.validate, spec)

    async def jobs(
        self,
        *,
        status: JobStatus | str | None = None,
        entity_name: str | None = None,
        kind: JobKind | str | None = None,
        metadata: Mapping[str, str] | None = None,
        sort: JobSort | None = None,
        limit: int | None = 20,
    ) -> list[AsyncJob]:
        """List jobs, newest first or in the order of ``sort``; see `Client.jobs`."""
        listed = await asyncio.to_thread(
            self._client.jobs,
            status=status,
            entity_name=entity_name,
            kind=kind,
            metadata=metadata,
            sort=sort,
            limit=limit,
        )
        return [self._own(job) for job in listed]

    async def job(self, job_id: str) -> AsyncJob:
        return self._own(await asyncio.to_thread(self._client.job, job_id))

    async def cancel(self, job_id: str) -> AsyncJob:
        return self._own(await asyncio.to_thread(self._client.cancel, job_id))

    async def pause(self, job_id: str) -> AsyncJob:
        return self._own(await asyncio.to_thread(self._client.pause, job_id))

    async def resume(self, job_id: str) -> AsyncJob:
        return self._own(await asyncio.to_thread(self._client.resume, job_id))

    async def save_checkpoint(self, job_id: str) -> AsyncJob:
        return self._own(await asyncio.to_thread(self._client.save_checkpoint, job_id))

    async def rerun(
        self,
        job_id: str,
        patch: Mapping[str, Any] | None = None,
        *,
        from_checkpoint: str = FROM_START,
        idempotency_key: str | None = None,
    ) -> AsyncJob:
        """Create a job from this job's spec and a JSON merge patch; see `Client.rerun`."""
        created = await asyncio.to_thread(
            self._client.rerun, job_id, patch, from_checkpoint=from_checkpoint, idempotency_key=idempotency_key
        )
        return self._own(created)

    async def evaluate(
        self,
        job_id: str,
        file: str | Path,
        *,
        checkpoint: str = "final",
        base: bool = False,
        entity_name: str | None = None,
        idempotency_key: str | None = None,
    ) -> AsyncJob:
        """Create a job that evaluates a checkpoint on a data file; see `Client.evaluate`."""
        created = await asyncio.to_thread(
            self._client.evaluate,
            job_id,
            file,
            checkpoint=checkpoint,
            base=base,
            entity_name=entity_name,
            idempotency_key=idempotency_key,
        )
        return self._own(created)

    async def export(
        self,
        job_id: str,
        to: str,
        *,
        type: str | None = None,
        checkpoint: str = "final",
        idempotency_key: str | None = None,
        **fields: Any,
    ) -> AsyncJob:
        """Create a job that exports a checkpoint; see `Client.export`."""
        created = await asyncio.to_thread(
            self._client.export,
            job_id,
            to,
            type=type,
            checkpoint=checkpoint,
            idempotency_key=idempotency_key,
            **fields,
        )
        return self._own(created)

    async def exports(self, job_id: str, *, limit: int | None = 20) -> list[AsyncJob]:
        """List the exports of a job, newest first."""
        return [self._own(job) for job in await asyncio.to_thread(self._client.exports, job_id, limit=limit)]

    async def delete(self, job_id: str) -> DeletedObject:
        return await asyncio.to_thread(self._client.delete, job_id)

    async def wait(self, job_id: str, *, timeout_seconds: float | None = None) -> AsyncJob:
        """Wait until the job has ended, even if the server restarts, and return it.

        Raises `WaitTimeout` after ``timeout_seconds``.
        """
        async for _ in self.events(job_id, timeout_seconds=timeout_seconds):
            pass
        job = await self.job(job_id)
        if job.status not in ENDED:
            raise InvalidResponse(f"The server ended the event stream of {job_id}, but the job is {job.status}.")
        return job

    def events(self, job_id: str, *, after: int = 0, timeout_seconds: float | None = None) -> AsyncIterator[Event]:
        """Stream events with ``seq`` greater than ``after``, each once and in order, until the job has ended.

        After a lost connection, the stream reconnects and continues where it stopped.
        """
        return _in_thread(lambda: self._client.events(job_id, after=after, timeout_seconds=timeout_seconds))

    def logs(
        self, job_id: str, *, follow: bool = False, tail: int | None = None, attempt: int | None = None
    ) -> AsyncIterator[str]:
        """The output of the training processes, in pieces as they arrive; with ``follow``, until the job has ended."""
        return _in_thread(lambda: self._client.logs(job_id, follow=follow, tail=tail, attempt=attempt))

    async def metrics(self, job_id: str, *, max_points: int | None = None) -> Curves:
        """The job's training curves."""
        return await asyncio.to_thread(self._client.metrics, job_id, max_points=max_points)

    async def compare(self, job_a: str, job_b: str) -> Comparison:
        """Compare two succeeded jobs by their losses on the same held-out documents; see `Client.compare`."""
        return await asyncio.to_thread(self._client.compare, job_a, job_b)

    async def checkpoints(self, job_id: str) -> list[Manifest]:
        return await asyncio.to_thread(self._client.checkpoints, job_id)

    async def checkpoint(self, job_id: str, name: str = "final") -> Manifest:
        return await asyncio.to_thread(self._client.checkpoint, job_id, name)

    async def download(
        self,
        job_id: str,
        checkpoint: str | None = None,
        directory: str | Path | None = None,
        *,
        include: Iterable[str] = (),
        state: bool = False,
        merged: bool = False,
        overwrite: bool = False,
    ) -> Download:
        """Download a checkpoint and verify the SHA-256 of every file; see `Client.download`."""
        return await asyncio.to_thread(
            self._client.download,
            job_id,
            checkpoint,
            directory,
            include=include,
            state=state,
            merged=merged,
            overwrite=overwrite,
        )

    async def upload(self, path: str | Path, purpose: FilePurpose = "dataset") -> StoredFile:
        """Upload a file, streamed from disk. A file that the service already has is not sent again."""
        return await asyncio.to_thread(self._client.upload, path, purpose)

    async def files(self, *, sha256: str | None = None, limit: int | None = 20) -> list[StoredFile]:
        return await asyncio.to_thread(self._client.files, sha256=sha256, limit=limit)

    async def workers(self) -> list[Worker]:
        return await asyncio.to_thread(self._client.workers)

    def _own(self, job: Job) -> AsyncJob:
        return AsyncJob.of(job, self)


async def _in_thread(open_stream: Callable[[], Iterator[ItemT]]) -> AsyncIterator[ItemT]:
    """The items of a blocking iterator, which a thread reads one at a time, as they are requested.

    The thread is a daemon: if the caller stops early, it ends with the next item and never delays the program's end.
    """
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[tuple[ItemT | None, BaseException | None]] = asyncio.Queue(maxsize=1)
    stopped = threading.Event()

    def send(item: ItemT | None, error: BaseException | None) -> None:
        asyncio.run_coroutine_threadsafe(items.put((item, error)), loop).result()

    def read() -> None:
        try:
            for item in open_stream():
                if stopped.is_set():
                    return
                send(item, None)
            send(None, StopAsyncIteration())
        except RuntimeError:  # the loop was closed
            return
        except Exception as error:  # noqa: BLE001 - the caller gets it
            if not stopped.is_set():
                send(None, error)

    threading.Thread(target=read, name="zeta-stream", daemon=True).start()
    try:
        while True:
            item, error = await items.get()
            if isinstance(error, StopAsyncIteration):
                return
            if error is not None:
                raise error
            assert item is not None
            yield item
    finally:
        stopped.set()
        if not items.empty():
            items.get_nowait()  # the thread may be waiting for space
