"""The exporter: OpenTelemetry's SDK, which sends batches of spans over OTLP/HTTP in a thread of its own.

Importing this module imports the SDK, so only `open_tracing` does it.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.tracing.tracing import FinishedSpan
from zeta_core.system.distribution import version

FLUSH_MILLISECONDS = 3000
SERVICE_NAME = "zeta-server"
_PROPAGATOR = TraceContextTextMapPropagator()


class OpenTelemetry:
    """An exporter that follows the ``OTEL_*`` variables of this process."""

    def __init__(self) -> None:
        resource = Resource.create({"service.version": version()})
        if str(resource.attributes["service.name"]).startswith("unknown_service"):  # OTEL_SERVICE_NAME is not set
            resource = resource.merge(Resource({"service.name": SERVICE_NAME}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("zeta", version())

    def start_request(self, method: str, path: str, trace_parent: str | None) -> _RequestSpan:
        span = self._tracer.start_span(
            method,
            context=_context_of(trace_parent),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "url.path": path},
        )
        return _RequestSpan(self._tracer, span, method)

    def record_job(self, trace_parent: str, spans: Sequence[FinishedSpan], attributes: Mapping[str, str | int]) -> None:
        context = _context_of(trace_parent)
        for finished in spans:
            span = self._tracer.start_span(
                finished.name, context=context, start_time=_nanoseconds(finished.start), attributes=attributes
            )
            if finished.error is not None:
                span.set_status(Status(StatusCode.ERROR, finished.error))
            span.end(_nanoseconds(finished.end))

    def close(self) -> None:
        self._provider.force_flush(FLUSH_MILLISECONDS)


class _RequestSpan:
    def __init__(self, tracer: Tracer, span: Span, method: str) -> None:
        self._tracer, self._span, self._method = tracer, span, method
        self._context = set_span_in_context(span, Context())
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, self._context)
        self.trace_parent = carrier["traceparent"]

    @contextmanager
    def part(self, name: str) -> Generator[None]:
        with self._tracer.start_as_current_span(name, context=self._context):
            yield

    def end(self, route: str, status: int) -> None:
        self._span.update_name(f"{self._method} {route}")
        self._span.set_attributes({"http.route": route, "http.response.status_code": status})
        if status >= 500:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


def _context_of(trace_parent: str | None) -> Context:
    """The context whose parent is the span of this W3C ``traceparent``; an invalid one starts a new trace."""
    return _PROPAGATOR.extract({"traceparent": trace_parent} if trace_parent else {}, Context())


def _nanoseconds(time: datetime) -> int:
    return int(time.timestamp() * 1_000_000) * 1000
