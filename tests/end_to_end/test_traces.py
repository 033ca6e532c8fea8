"""OpenTelemetry traces from the submission of a job to its first step, sent to a real OTLP/HTTP receiver."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise

import httpx
import pytest

from server.tracing import open_tracing
from tests.end_to_end.specs import tiny_job
from tests.harness.otlp_receiver import Receiver, otlp_receiver
from tests.harness.service import Service, clean_environment, running_service, wait_for_end
from tests.harness.waiting import wait_until

TRACE_ID, CLIENT_SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACE_PARENT = f"00-{TRACE_ID}-{CLIENT_SPAN_ID}-01"
PARTS = ("queue wait", "dispatch", "preparation", "model load", "first step")
NO_SDK = """
import sys
sys.modules["opentelemetry.sdk"] = None
from server.tracing import open_tracing
open_tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"})
"""


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with otlp_receiver() as running:
        yield running


@pytest.fixture(scope="module")
def traced(receiver: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    with running_service(tmp_path_factory.mktemp("traced"), settings=settings) as service:
        yield service


@pytest.mark.extended
@pytest.mark.timeout(300)
def test_a_trace_leads_from_the_request_to_the_first_step(traced: Service, receiver: Receiver) -> None:
    with traced.http() as http:
        response = http.post("/v1/jobs", json=tiny_job(), headers={"traceparent": TRACE_PARENT}).raise_for_status()
        job_id = response.json()["id"]
        assert wait_for_end(http, job_id)["status"] == "succeeded"
        first = http.get(f"/v1/jobs/{job_id}/events").json()["data"][0]
    spans = wait_until(lambda: receiver.named("POST /v1/jobs", "validation", *PARTS), 30, "all spans to arrive") or {}
    request = spans["POST /v1/jobs"]
    assert {span.trace_id for span in spans.values()} == {TRACE_ID}
    assert request.parent_id == CLIENT_SPAN_ID
    assert request.attributes["http.response.status_code"] == "201"
    assert {spans[name].parent_id for name in ("validation", *PARTS)} == {request.span_id}
    assert first["trace_parent"] == f"00-{TRACE_ID}-{request.span_id}-01"
    assert spans["first step"].attributes["zeta.job_id"] == job_id
    assert request.service == "zeta-server"
    assert request.start <= spans["validation"].start <= spans["validation"].end <= request.end
    for earlier, later in pairwise(PARTS):
        assert spans[earlier].end == spans[later].start
    assert all(span.start <= span.end and not span.is_error for span in spans.values())
    assert len([span for span in receiver.spans if span.name == "first step"]) == 1


@pytest.mark.extended
@pytest.mark.timeout(300)
def test_a_job_that_fails_before_its_first_step_has_a_failed_span(traced: Service, receiver: Receiver) -> None:
    parent = f"00-{TRACE_ID[::-1]}-{CLIENT_SPAN_ID}-01"
    with traced.http() as http:
        rows = b'{"text": "a"}\n{"messages": []}\n'  # the second row is invalid
        upload = http.post("/v1/files", data={"purpose": "dataset"}, files={"file": ("rows.jsonl", rows)})
        spec = tiny_job(dataset={"file": upload.raise_for_status().json()["id"]})
        job_id = http.post("/v1/jobs", json=spec, headers={"traceparent": parent}).raise_for_status().json()["id"]
        assert wait_for_end(http, job_id)["status"] == "failed"
    ended = wait_until(lambda: [span for span in receiver.spans if span.is_error], 30, "the failed span to arrive")
    assert ended is not None
    assert ended[-1].trace_id == TRACE_ID[::-1]
    assert ended[-1].attributes["zeta.job_id"] == job_id


def test_routes_that_are_polled_are_not_traced(traced: Service, receiver: Receiver) -> None:
    assert httpx.get(f"{traced.url}/healthz").status_code == 200
    with traced.http() as http:
        http.get("/v1/workers").raise_for_status()
    wait_until(lambda: receiver.named("GET /v1/workers"), 30, "the span of the later request to arrive")
    assert receiver.named("GET /healthz") is None


def test_without_an_endpoint_nothing_is_traced() -> None:
    assert open_tracing({}) is None
    disabled = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_SDK_DISABLED": "true"}
    assert open_tracing(disabled) is None


def test_an_endpoint_without_the_sdk_is_an_error_with_the_fix() -> None:
    done = subprocess.run([sys.executable, "-c", NO_SDK], env=clean_environment(), capture_output=True, text=True)
    assert "install zeta-train[otel], or unset OTEL_EXPORTER_OTLP_ENDPOINT" in done.stderr


@pytest.mark.extended
def test_a_server_without_an_endpoint_does_not_import_the_exporter() -> None:
    program = "import sys, server.__main__; assert 'opentelemetry.exporter' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], env=clean_environment(), check=True, timeout=100)
