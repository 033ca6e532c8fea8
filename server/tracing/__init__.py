"""OpenTelemetry traces of requests, and of jobs from their submission to their first step.

| module     | purpose                                                                            |
|------------|------------------------------------------------------------------------------------|
| `tracing`  | the interface of an exporter                                                       |
| `opening`  | opening the exporter that the settings of OpenTelemetry configure                  |
| `request`  | the trace of the current request; without an exporter, its functions do nothing    |
| `job`      | the spans of a job's first attempt, from the times that the database has stored    |
| `exporter` | the OpenTelemetry SDK, which is imported only if an exporter is configured         |
"""

from server.tracing.opening import open_tracing
from server.tracing.request import current_trace_parent, request_part
from server.tracing.tracing import Tracing

__all__ = ["Tracing", "current_trace_parent", "open_tracing", "request_part"]
