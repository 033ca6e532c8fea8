"""/v1/jobs/{id}/events, /logs and /metrics: a job's output, stored or live."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Annotated, Self

from fastapi import Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Receive, Scope, Send

from server.auth import Caller
from server.database.pagination import DEFAULT_LIMIT, MAX_LIMIT
from server.jobs import event_stream, logs, training_curves
from server.jobs.queries import require_job
from server.routes.routing import Router, TheCaller, TheService
from server.service import Service
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.job.events import Event, UntypedEvent
from zeta_core.contract.job.responses import Curves, Page

router = Router(prefix="/v1/jobs/{job_id}", tags=["job output"])

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
EVENT_STREAM = "text/event-stream"
LOG = "text/plain; charset=utf-8"


def open_stream(service: Service, caller: Caller) -> AbstractContextManager[None]:
    """Count a stream of the caller until the block ends. Admin keys are exempt from the limit of their project."""
    limit = None if caller.is_admin else caller.limits.max_streams
    return service.streams.open(caller.key_id, caller.project, limit)


class LiveResponse(StreamingResponse):
    """A streaming response that isn't cancelled when the client disconnects; for HEAD, it ends after the headers.

    Starlette would cancel the task of the response, possibly within a database statement, which loses the connection.
    Instead, the generator of the body checks after each wait whether the client has disconnected.
    """

    _resources: ExitStack | None = None

    def close_at_end(self, resources: ExitStack) -> Self:
        """This response, which closes ``resources`` at its end."""
        self._resources = resources
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._resources or nullcontext():
            if scope["method"] == "HEAD":
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": b""})
                return
            await self.stream_response(send)


class EventQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    after: int = Field(default=0, ge=0, lt=2**53, description="only events with a larger seq")
    limit: int = Field(
        default=DEFAULT_LIMIT, ge=1, le=MAX_LIMIT, description="maximum number of events; not for a stream"
    )


class LogQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    follow: bool = Field(default=False, description="continue until the job has ended")
    tail: int | None = Field(default=None, ge=0, le=10**9, description="only the last N lines")
    attempt: int | None = Field(default=None, ge=1, le=10**9, description="only this attempt")
    offset: int = Field(default=0, ge=0, lt=2**53, description="skip this many bytes, which the client already has")
    quiet_seconds: float | None = Field(
        default=None,
        ge=1,
        le=3600,
        allow_inf_nan=False,
        description="with `follow`: end the response after this time without output, and send no keep-alives; "
        "continue with `offset`",
    )


class CurveQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    max_points: int | None = Field(default=None, ge=1, le=10**6, description="reduce each curve to this many steps")


# No response model: it would add the fields that stored events omit.
@router.get("/events", response_model=None, responses={200: {"model": Page[Event], "content": {EVENT_STREAM: {}}}})
async def read_events(
    service: TheService,
    caller: TheCaller,
    request: Request,
    job_id: str,
    query: Annotated[EventQuery, Query()],
    accept: Annotated[str, Header(description="text/event-stream for a live stream")] = "",
    last_event_id: Annotated[str | None, Header(description="the id of the last received event")] = None,
) -> Page[UntypedEvent] | Response:
    """List events, oldest first. With `Accept: text/event-stream`, stream them live, resumable with `Last-Event-ID`."""
    if EVENT_STREAM not in accept:
        await require_job(service, caller, job_id)
        return await event_stream.read_events(service, job_id, query.after, query.limit)
    with ExitStack() as resources:
        resources.enter_context(open_stream(service, caller))
        await require_job(service, caller, job_id)
        seen = event_stream.last_event_id(last_event_id)
        if seen is not None and await event_stream.has_read_all(service, job_id, seen):
            return Response(status_code=204)
        after = query.after if seen is None else seen
        text = event_stream.stream_events(service, job_id, after, request.is_disconnected)
        return LiveResponse(text, media_type=EVENT_STREAM, headers=STREAM_HEADERS).close_at_end(resources.pop_all())


@router.get("/logs", response_class=LiveResponse, responses={200: {"content": {"text/plain": {}}}})
async def read_logs(
    service: TheService, caller: TheCaller, request: Request, job_id: str, query: Annotated[LogQuery, Query()]
) -> LiveResponse:
    """Return the output of the training processes, attempts in order; with `follow`, until the job has ended."""
    if query.tail is not None and query.offset:
        raise InvalidRequest(
            f"offset ({query.offset}) and tail ({query.tail}) can't be combined, because the last lines change while "
            "the log grows; remove one of them.",
            param="offset",
        )
    with ExitStack() as resources:
        if query.follow:
            resources.enter_context(open_stream(service, caller))
        await require_job(service, caller, job_id)
        await logs.require_readable(service, job_id, query.attempt)
        selection = logs.LogSelection(query.attempt, query.tail, query.offset, query.follow, query.quiet_seconds)
        text = logs.read(service, job_id, selection, request.is_disconnected)
        return LiveResponse(text, media_type=LOG, headers=STREAM_HEADERS).close_at_end(resources.pop_all())


@router.get(
    "/metrics", summary="Read Training Curves", response_model=Curves, responses={200: {"content": {"text/csv": {}}}}
)
async def read_metrics(
    service: TheService,
    caller: TheCaller,
    job_id: str,
    query: Annotated[CurveQuery, Query()],
    accept: Annotated[str, Header(description="text/csv for CSV")] = "",
) -> Curves | Response:
    """Return the training curves as arrays of equal length, or as CSV with `Accept: text/csv`."""
    await require_job(service, caller, job_id)
    curves = await training_curves.read_curves(service, job_id, query.max_points)
    return Response(training_curves.as_csv(curves), media_type="text/csv") if "text/csv" in accept else curves
