"""The client of the service for asyncio. It has the methods of `Client`, as coroutines and asynchronous iterators.

    async with AsyncClient() as client:
        job = await client.submit(spec)
        async for event in job.events():
            print(event.type)

The methods do their work in threads (`zeta.async_calls`), and raise the same `ZetaError` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self

from zeta.async_calls import AsyncPart, awaitable, client_threads, converted, streamed
from zeta.async_parts import AsyncAdministration, AsyncNamedModels, AsyncReceipts, AsyncSweeps, AsyncWebhooks
from zeta.client import Client
from zeta.client_job import AsyncJob, ClientJob, require_ended
from zeta.service_client import PATIENCE_SECONDS

if TYPE_CHECKING:
    from zeta_core.contract.errors import ZetaError
    from zeta_core.contract.job.events import Event

P = ParamSpec("P")


def _job(
    method: Callable[Concatenate[Any, P], ClientJob],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, AsyncJob]]:
    return converted(method, lambda client, job: AsyncJob.of(job, client))


def _jobs(
    method: Callable[Concatenate[Any, P], list[ClientJob]],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, list[AsyncJob]]]:
    return converted(method, lambda client, jobs: [AsyncJob.of(job, client) for job in jobs])


class AsyncClient(AsyncPart):
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
        super().__init__(self._client, client_threads())
        self.base_url = self._client.base_url

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; an `async with` statement does so at its end."""
        self._client.close()

    # --- Parts --------------------------------------------------------------------------------------------------------

    @property
    def sweeps(self) -> AsyncSweeps:
        return AsyncSweeps(self._client.sweeps, self._threads)

    @property
    def models(self) -> AsyncNamedModels:
        return AsyncNamedModels(self._client.models, self._threads)

    @property
    def admin(self) -> AsyncAdministration:
        return AsyncAdministration(self._client.admin, self._threads)

    @property
    def webhooks(self) -> AsyncWebhooks:
        return AsyncWebhooks(self._client.webhooks, self._threads)

    @property
    def receipts(self) -> AsyncReceipts:
        return AsyncReceipts(self._client.receipts, self._threads)

    # --- Jobs ---------------------------------------------------------------------------------------------------------

    submit = _job(Client.submit)
    validate = awaitable(Client.validate)
    import_openai_job = converted(
        Client.import_openai_job, lambda client, imported: (AsyncJob.of(imported[0], client), imported[1])
    )
    jobs = _jobs(Client.jobs)
    job = _job(Client.job)
    cancel = _job(Client.cancel)
    pause = _job(Client.pause)
    resume = _job(Client.resume)
    save_checkpoint = _job(Client.save_checkpoint)
    rerun = _job(Client.rerun)
    export = _job(Client.export)
    exports = _jobs(Client.exports)
    evaluate = _job(Client.evaluate)
    delete = awaitable(Client.delete)

    async def wait(
        self,
        job_id: str,
        *,
        timeout_seconds: float | None = None,
        on_event: Callable[[Event], None] | None = None,
        on_interruption: Callable[[ZetaError], None] | None = None,
    ) -> AsyncJob:
        """Wait until the job has ended, even if the server restarts, and return it.

        Raises `WaitTimeout` after ``timeout_seconds``.
        """
        async for event in self.events(job_id, timeout_seconds=timeout_seconds, on_interruption=on_interruption):
            if on_event is not None:
                on_event(event)
        return require_ended(await self.job(job_id))

    # --- Outputs of jobs ----------------------------------------------------------------------------------------------

    events = streamed(Client.events)
    stored_events = awaitable(Client.stored_events)
    logs = streamed(Client.logs)
    metrics = awaitable(Client.metrics)
    checkpoints = awaitable(Client.checkpoints)
    checkpoint = awaitable(Client.checkpoint)
    compare = awaitable(Client.compare)
    download = awaitable(Client.download)
    ask = awaitable(Client.ask)
    files_of_job = awaitable(Client.files_of_job)

    # --- Files and workers --------------------------------------------------------------------------------------------

    upload = awaitable(Client.upload)
    files = awaitable(Client.files)
    jobs_of_file = awaitable(Client.jobs_of_file)
    workers = awaitable(Client.workers)
    worker_usage = awaitable(Client.worker_usage)
    drain = awaitable(Client.drain)
    login_link = awaitable(Client.login_link)
    is_ready = awaitable(Client.is_ready)
