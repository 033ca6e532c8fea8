"""docs/reference/metrics.md: every Prometheus metric of a server, from the registry that /metrics prints."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from server.http.request_log import RequestMetrics
from server.metrics import JobMetrics
from tests.harness.reference_pages.markdown import cell, generated, table

HEAD = """\
# Metrics

`GET /metrics` returns the metrics of one server process in Prometheus's text format. It needs a key with the scope
`metrics`. No label contains a job id, so the number of series stays small. [Monitoring](../operations/monitoring.md)
shows the configuration of Prometheus and a dashboard for Grafana.
"""
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def server_registry() -> CollectorRegistry:
    """The metrics of a server, without values."""
    registry = CollectorRegistry()
    JobMetrics(registry)
    RequestMetrics(registry)
    return registry


def metrics() -> list[Metric]:
    return sorted(server_registry().collect(), key=lambda metric: metric.name)


def series_names() -> set[str]:
    """The names by which a query selects the metrics, such as ``zeta_http_requests_total``."""
    return {name for metric in metrics() for name in _series_of(metric)}


def metric_labels(series: str) -> tuple[str, ...]:
    """The label names of the metric to which a series such as ``zeta_http_requests_total`` belongs."""
    owners = [metric.name for metric in metrics() if series in _series_of(metric)]
    return _labels(server_registry())[owners[0]]


def metrics_page() -> str:
    return "\n".join([HEAD, generated("server/metrics.py"), table(("metric", "type", "labels", "meaning"), _rows())])


def _series_of(metric: Metric) -> list[str]:
    return [f"{metric.name}{suffix}" for suffix in SUFFIXES[metric.type]]


def _rows() -> Iterator[tuple[str, ...]]:
    labels = _labels(server_registry())
    for metric in metrics():
        name = metric.name + ("_total" if metric.type == "counter" else "")
        shown = ", ".join(f"`{label}`" for label in labels.get(metric.name, ()))
        yield f"`{name}`", metric.type, shown, cell(metric.documentation)


def _labels(registry: CollectorRegistry) -> dict[str, tuple[str, ...]]:
    """The label names by metric. The library has no public access to them before a metric has values."""
    collectors = vars(registry)["_collector_to_names"]
    return {
        metric.name: tuple(vars(collector).get("_labelnames", ()))
        for collector in collectors
        for metric in collector.collect()
    }
