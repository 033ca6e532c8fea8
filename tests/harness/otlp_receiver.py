"""A collector of OpenTelemetry traces: an OTLP/HTTP receiver on a loopback port that keeps every span."""

from __future__ import annotations

import gzip
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

ERROR = 2  # opentelemetry.proto.trace.v1.Status.STATUS_CODE_ERROR


@dataclass(frozen=True)
class ReceivedSpan:
    """A span; ids are hexadecimal, times are nanoseconds since 1970."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start: int
    end: int
    attributes: dict[str, str]
    is_error: bool
    service: str


class Receiver:
    def __init__(self, port: int, spans: list[ReceivedSpan]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.spans = spans

    def named(self, *names: str) -> dict[str, ReceivedSpan] | None:
        """The spans with these names; ``None`` until all of them have arrived."""
        found = {span.name: span for span in list(self.spans) if span.name in names}
        return found if len(found) == len(names) else None


@contextmanager
def otlp_receiver() -> Generator[Receiver]:
    spans: list[ReceivedSpan] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            assert self.path == "/v1/traces"
            spans.extend(_parse(body))
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Receiver(server.server_address[1], spans)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _parse(body: bytes) -> Generator[ReceivedSpan]:
    request = ExportTraceServiceRequest.FromString(body)
    for resource in request.resource_spans:
        names = {item.key: item.value.string_value for item in resource.resource.attributes}
        for span in [span for scope in resource.scope_spans for span in scope.spans]:
            yield ReceivedSpan(
                name=span.name,
                trace_id=span.trace_id.hex(),
                span_id=span.span_id.hex(),
                parent_id=span.parent_span_id.hex(),
                start=span.start_time_unix_nano,
                end=span.end_time_unix_nano,
                attributes={item.key: item.value.string_value or str(item.value.int_value) for item in span.attributes},
                is_error=span.status.code == ERROR,
                service=names["service.name"],
            )
