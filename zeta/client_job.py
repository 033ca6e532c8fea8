"""The jobs that clients return: the API's job object with methods, and a display for notebooks.

A job object is a snapshot: it does not change. Methods ask the server and return new objects.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pydantic import PrivateAttr

from zeta.errors import InvalidResponse
from zeta_core.contract.job.job import Job
from zeta_core.contract.job.status import ENDED

if TYPE_CHECKING:
    from pandas import DataFrame

    from zeta.async_client import AsyncClient
    from zeta.client import Client
    from zeta_core.contract.job.events import Event
    from zeta_core.contract.job.responses import Curves

JobT = TypeVar("JobT", bound=Job)


class _Displayed(Job):
    def _repr_html_(self) -> str:
        """A table for notebooks."""
        progress = self.progress or {}
        step, total = progress.get("step"), progress.get("total_steps")
        eval_loss = self.result.eval_loss if self.result is not None else progress.get("eval_loss")
        rows = {
            "job": self.id,
            "name": self.entity_name,
            "status": f"{self.status} ({self.status_reason})" if self.status_reason else self.status,
            "waiting for": None if self.waiting_reason is None else self.waiting_reason.message,
            "estimated start": None if self.waiting_reason is None else self.waiting_reason.estimated_start_at,
            "step": step if total is None else f"{step}/{total}",
            "loss (last 50 steps)": _rounded(progress.get("recent_loss")),
            "held-out loss": _rounded(eval_loss),
            "error": None if self.error is None else self.error.message,
        }
        cells = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
            for name, value in rows.items()
            if value is not None
        )
        return f"<table>{cells}</table>"


class ClientJob(_Displayed):
    """A job of `zeta.Client`."""

    _client: Client | None = PrivateAttr(default=None)

    def of(self, client: Client) -> Self:
        """This job, whose methods use the client."""
        self._client = client
        return self

    @property
    def client(self) -> Client:
        assert self._client is not None, "a client returned this job"
        return self._client

    def refresh(self) -> ClientJob:
        """The job as it is now."""
        return self.client.job(self.id)

    def wait(
        self, *, timeout_seconds: float | None = None, on_event: Callable[[Event], None] | None = None
    ) -> ClientJob:
        """Wait until the job has ended, even if the server restarts, and return it. See `Client.wait`."""
        return self.client.wait(self.id, timeout_seconds=timeout_seconds, on_event=on_event)

    def events(self, *, after: int = 0, timeout_seconds: float | None = None) -> Iterator[Event]:
        """Stream the job's events, each once and in order, until it has ended. See `Client.events`."""
        return self.client.events(self.id, after=after, timeout_seconds=timeout_seconds)

    def metrics(self, *, max_points: int | None = None) -> DataFrame | Curves:
        """The training curves, with one row per step: a pandas DataFrame if pandas is installed, otherwise `Curves`."""
        return as_frame(self.client.metrics(self.id, max_points=max_points))

    def cancel(self) -> ClientJob:
        """Request cancellation of the job. See `Client.cancel`."""
        return self.client.cancel(self.id)

    def pause(self) -> ClientJob:
        """Ask the job to save a checkpoint and free its device. See `Client.pause`."""
        return self.client.pause(self.id)

    def resume(self) -> ClientJob:
        """Queue the paused job again. See `Client.resume`."""
        return self.client.resume(self.id)

    def save_checkpoint(self) -> ClientJob:
        """Ask the running job to save a checkpoint. See `Client.save_checkpoint`."""
        return self.client.save_checkpoint(self.id)

    def rerun(self, patch: Mapping[str, Any] | None = None, **options: Any) -> ClientJob:
        """A new job with a patched spec. The options are those of `Client.rerun`."""
        return self.client.rerun(self.id, patch, **options)


class AsyncJob(_Displayed):
    """A job of `zeta.AsyncClient`."""

    _client: AsyncClient | None = PrivateAttr(default=None)

    @classmethod
    def of(cls, job: Job, client: AsyncClient) -> Self:
        """The job, whose methods use the client."""
        values = {name: getattr(job, name) for name in type(job).model_fields}
        made = cls.model_construct(_fields_set=job.model_fields_set, **values)
        made._client = client
        return made

    @property
    def client(self) -> AsyncClient:
        assert self._client is not None, "a client returned this job"
        return self._client

    async def refresh(self) -> AsyncJob:
        """The job as it is now."""
        return await self.client.job(self.id)

    async def wait(
        self, *, timeout_seconds: float | None = None, on_event: Callable[[Event], None] | None = None
    ) -> AsyncJob:
        """Wait until the job has ended, even if the server restarts, and return it. See `Client.wait`."""
        return await self.client.wait(self.id, timeout_seconds=timeout_seconds, on_event=on_event)

    def events(self, *, after: int = 0, timeout_seconds: float | None = None) -> AsyncIterator[Event]:
        """Stream the job's events, each once and in order, until it has ended."""
        return self.client.events(self.id, after=after, timeout_seconds=timeout_seconds)

    async def metrics(self, *, max_points: int | None = None) -> DataFrame | Curves:
        """The training curves: a pandas DataFrame if pandas is installed, otherwise `Curves`."""
        return as_frame(await self.client.metrics(self.id, max_points=max_points))

    async def cancel(self) -> AsyncJob:
        return await self.client.cancel(self.id)

    async def pause(self) -> AsyncJob:
        return await self.client.pause(self.id)

    async def resume(self) -> AsyncJob:
        return await self.client.resume(self.id)

    async def save_checkpoint(self) -> AsyncJob:
        return await self.client.save_checkpoint(self.id)

    async def rerun(self, patch: Mapping[str, Any] | None = None, **options: Any) -> AsyncJob:
        """A new job with a patched spec. The options are those of `Client.rerun`."""
        return await self.client.rerun(self.id, patch, **options)


def require_ended(job: JobT) -> JobT:
    """The job, whose event stream the server has ended. Raises `InvalidResponse` if the job has not ended."""
    if job.status not in ENDED:
        raise InvalidResponse(f"The server ended the event stream of {job.id}, but the job is {job.status}.")
    return job


def as_frame(curves: Curves) -> DataFrame | Curves:
    """The curves as a DataFrame with the step as its index, without empty columns, if pandas is installed."""
    if find_spec("pandas") is None:
        return curves
    from pandas import DataFrame

    columns = {name: values for name, values in curves.model_dump(exclude={"object"}).items() if values}
    return DataFrame(columns).set_index("step").dropna(axis="columns", how="all")


def _rounded(value: object) -> str | None:
    return f"{value:.4f}" if isinstance(value, int | float) and not isinstance(value, bool) else None
