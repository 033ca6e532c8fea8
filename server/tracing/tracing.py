"""The interface of a trace exporter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

Attributes = Mapping[str, str | int]


@dataclass(frozen=True)
class FinishedSpan:
    """A part of a job's start, with its times on the clocks of the server and of the worker."""

    name: str
    start: datetime
    end: datetime
    error: str | None = None  # why the job ended in this part


class RequestSpan(Protocol):
    """The span of one HTTP request."""

    trace_parent: str  # the W3C trace context, with this span as the parent

    def part(self, name: str) -> AbstractContextManager[None]:
        """Record the time of the block as a span below this one."""
        ...

    def end(self, route: str, status: int) -> None: ...


class Tracing(Protocol):
    """Exports spans in the background, and never blocks or fails a request or a job."""

    def start_request(self, method: str, path: str, trace_parent: str | None) -> RequestSpan:
        """Start the span of a request, in the trace of the client if it sent a valid ``traceparent``."""
        ...

    def record_job(self, trace_parent: str, spans: Sequence[FinishedSpan], attributes: Attributes) -> None:
        """Export finished spans of a job below the request that submitted it."""
        ...

    def close(self) -> None:
        """Export what is waiting, for a few seconds at most."""
        ...
