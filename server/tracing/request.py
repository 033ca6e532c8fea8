"""The trace of the current request. Without an exporter, these functions do nothing and cost nothing."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

from server.tracing.tracing import RequestSpan

_CURRENT: ContextVar[RequestSpan | None] = ContextVar("request_span", default=None)


@contextmanager
def request_part(name: str) -> Generator[None]:
    """Record the time of the block as a part of the current request."""
    span = _CURRENT.get()
    if span is None:
        yield
        return
    with span.part(name):
        yield


def current_trace_parent() -> str | None:
    """The W3C trace context of the current request; ``None`` if it is not traced."""
    span = _CURRENT.get()
    return None if span is None else span.trace_parent


@contextmanager
def current_request(span: RequestSpan) -> Generator[None]:
    """Let ``span`` be that of the current request in this task, until the block ends."""
    token = _CURRENT.set(span)
    try:
        yield
    finally:
        _CURRENT.reset(token)
