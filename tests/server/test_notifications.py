"""Messages about jobs reach real receivers: signed, repeated after failures, and without slowing anything else."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.harness.receiver import Receiver, running_receiver
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from tests.server.rows import Rows
from tests.server.server_process import ServerProcess, running_server, submit
from zeta_core.contract.job.status import JobStatus, StatusReason

SETTINGS = {
    "ZETA_WEBHOOK_NETWORKS": "127.0.0.0/8",
    "ZETA_WEBHOOK_SECONDS": "1",
    "ZETA_WEBHOOK_WAIT_SECONDS": "2",
}


@pytest.fixture(scope="module")
def server(
    module_database_url: str | None, shared_valkey: ValkeyServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    home = tmp_path_factory.mktemp("server")
    with running_server(home, shared_valkey.second_url, module_database_url, **SETTINGS) as process:
        yield process


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with running_receiver() as running:
        yield running


def create(http: httpx.Client, url: str, **fields: Any) -> dict[str, Any]:
    response = http.post("/v1/webhooks", json={"url": url, **fields})
    assert response.status_code == 201, response.text
    return response.json()


def end_job(http: httpx.Client, rows: Rows, to: JobStatus = JobStatus.SUCCEEDED, **fields: Any) -> str:
    """Submit a job and end it with this status."""
    job_id: str = submit(http, **fields)["id"]
    reason = {JobStatus.FAILED: StatusReason.TRAIN_ERROR}.get(to)
    rows.attempt(job_id, to=to, reason=reason)
    return job_id


def deliveries(http: httpx.Client, webhook_id: str) -> list[dict[str, Any]]:
    return http.get(f"/v1/webhooks/{webhook_id}/deliveries").json()["data"]


def wait_for(receiver: Receiver, path: str, count: int = 1, seconds: float = 10) -> list[Any]:
    wait_until(lambda: len(receiver.of(path)) >= count, seconds, f"{count} requests to {path}")
    return receiver.of(path)


def wait_for_end(http: httpx.Client, webhook_id: str) -> dict[str, Any]:
    """The newest delivery, once it has ended."""
    wait_until(lambda: deliveries(http, webhook_id)[0]["status"] != "pending", 10, "the delivery to end")
    return deliveries(http, webhook_id)[0]


def test_the_end_of_a_job_is_sent_with_a_signature_that_a_library_verifies(
    http: httpx.Client, rows: Rows, receiver: Receiver
) -> None:
    webhook = create(http, f"{receiver.url}/signed?a=b")
    job_id = end_job(http, rows, entity_name="museum", metadata={"team": "vision"})
    (request,) = wait_for(receiver, "/signed?a=b")
    OpenAI(api_key="none").webhooks.verify_signature(request.body, dict(request.headers), secret=webhook["secret"])
    with pytest.raises(ValueError, match="signature"):
        OpenAI(api_key="none").webhooks.verify_signature(
            request.body + b" ", dict(request.headers), secret=webhook["secret"]
        )
    body = json.loads(request.body)
    assert body["type"] == "job.succeeded"
    data = body["data"]
    assert (data["id"], data["name"], data["status"], data["status_reason"]) == (
        job_id,
        "museum",
        "succeeded",
        "completed",
    )
    assert data["metadata"] == {"team": "vision"}
    assert request.headers["content-type"] == "application/json"
    delivery = wait_for_end(http, webhook["id"])
    assert (delivery["id"], delivery["job"]) == (request.headers["webhook-id"], job_id)
    assert (delivery["status"], delivery["status_code"], delivery["attempts"]) == ("delivered", 204, 1)
    http.delete(f"/v1/webhooks/{webhook['id']}").raise_for_status()


def test_a_webhook_receives_only_its_events(http: httpx.Client, rows: Rows, receiver: Receiver) -> None:
    webhook = create(http, f"{receiver.url}/failures", events=["job.failed", "job.worker_lost"])
    end_job(http, rows)
    lost = submit(http)["id"]
    rows.attempt(lost, to=JobStatus.QUEUED, reason=StatusReason.WORKER_LOST)
    failed = end_job(http, rows, JobStatus.FAILED)
    requests = wait_for(receiver, "/failures", 2)
    received = [(body["type"], body["data"]["id"]) for body in (json.loads(request.body) for request in requests)]
    assert received == [("job.worker_lost", lost), ("job.failed", failed)]
    http.delete(f"/v1/webhooks/{webhook['id']}").raise_for_status()


def test_a_job_notifies_the_targets_in_its_spec(http: httpx.Client, rows: Rows, receiver: Receiver) -> None:
    webhook = create(http, f"{receiver.url}/named", events=[])
    notify = [
        {"to": webhook["id"], "events": ["job.cancelled"]},
        {"to": f"{receiver.url}/plain"},
        {"to": f"{receiver.url}/slack", "format": "slack"},
    ]
    job_id = end_job(http, rows, notify=notify, entity_name="a <!channel> & b")
    (plain,) = wait_for(receiver, "/plain")
    assert "webhook-signature" not in plain.headers
    (slack,) = wait_for(receiver, "/slack")
    assert json.loads(slack.body) == {
        "text": f"Job a &lt;!channel&gt; &amp; b ({job_id}) succeeded. "
        "The run completed its last step, and its final checkpoint is stored."
    }
    queued = submit(http, notify=notify)["id"]
    http.post(f"/v1/jobs/{queued}/cancel").raise_for_status()
    (named,) = wait_for(receiver, "/named")
    assert json.loads(named.body)["type"] == "job.cancelled"
    listed = http.get(f"/v1/jobs/{job_id}/deliveries").json()["data"]
    assert {entry["url"] for entry in listed} == {f"{receiver.url}/plain", f"{receiver.url}/slack"}
    job = http.get(f"/v1/jobs/{job_id}").json()
    assert job["spec"]["notify"] == notify
    assert "notify" not in job["resolved_spec"]


@pytest.mark.extended
def test_a_job_that_waits_long_is_announced_once_each_time_it_is_queued(
    http: httpx.Client, rows: Rows, receiver: Receiver
) -> None:
    job_id = submit(http, notify=[{"to": f"{receiver.url}/waits", "events": ["job.waiting"]}])["id"]
    (request,) = wait_for(receiver, "/waits", seconds=15)
    body = json.loads(request.body)
    assert (body["type"], body["data"]["id"], body["data"]["status"]) == ("job.waiting", job_id, "queued")
    assert "No worker is connected" in body["data"]["message"]
    rows.attempt(job_id, to=JobStatus.QUEUED, reason=StatusReason.HANDED_BACK)
    assert len(wait_for(receiver, "/waits", 2, seconds=15)) == 2
    http.post(f"/v1/jobs/{job_id}/cancel").raise_for_status()


@pytest.mark.extended
def test_a_failed_message_is_repeated_with_the_same_id_after_the_server_was_killed(
    server: ServerProcess, http: httpx.Client, rows: Rows, receiver: Receiver
) -> None:
    receiver.status = 503
    webhook = create(http, f"{receiver.url}/repeated")
    end_job(http, rows)
    (first,) = wait_for(receiver, "/repeated")
    logged = wait_until(lambda: deliveries(http, webhook["id"])[0]["error"], 5, "the outcome")
    assert logged == "the receiver responded with status 503"
    server.end(signal.SIGKILL)
    receiver.status = 200
    server.start()
    _, second, *_ = wait_for(receiver, "/repeated", 2, seconds=20)
    assert second.headers["webhook-id"] == first.headers["webhook-id"]
    assert second.body == first.body
    OpenAI(api_key="none").webhooks.verify_signature(second.body, dict(second.headers), secret=webhook["secret"])
    wait_until(lambda: deliveries(http, webhook["id"])[0]["status"] == "delivered", 5, "the delivery")
    http.delete(f"/v1/webhooks/{webhook['id']}").raise_for_status()


@pytest.mark.slow
def test_a_message_whose_server_was_killed_while_sending_is_sent_again(
    server: ServerProcess, http: httpx.Client, rows: Rows, receiver: Receiver
) -> None:
    receiver.is_slow.set()
    job_id = end_job(http, rows, notify=[{"to": f"{receiver.url}/cut"}])
    wait_for(receiver, "/cut")
    server.end(signal.SIGKILL)
    receiver.is_slow.clear()
    server.start()
    first, second, *_ = wait_for(receiver, "/cut", 2, seconds=40)
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    path = f"/v1/jobs/{job_id}/deliveries"
    wait_until(lambda: http.get(path).json()["data"][0]["status"] == "delivered", 5, "the delivery")


def test_a_silent_receiver_delays_no_other_receiver(http: httpx.Client, rows: Rows, receiver: Receiver) -> None:
    with running_receiver() as silent:
        silent.is_slow.set()
        slow = create(http, f"{silent.url}/silent")
        fast = create(http, f"{receiver.url}/fast")
        started = time.monotonic()
        for _ in range(5):
            end_job(http, rows)
        wait_for(receiver, "/fast", 5, seconds=5)
        num_sent = len(silent.of("/silent"))  # one at a time, and each waits for the limit of one second
        assert 1 <= num_sent <= 1 + int(time.monotonic() - started)
        wait_until(lambda: deliveries(http, slow["id"])[-1]["error"], 10, "the time limit")
        assert deliveries(http, slow["id"])[-1]["error"] == "no response within 1 s (ZETA_WEBHOOK_SECONDS)"
        for webhook in (slow, fast):
            http.delete(f"/v1/webhooks/{webhook['id']}").raise_for_status()


def test_redirects_are_not_followed(http: httpx.Client, receiver: Receiver) -> None:
    receiver.status, receiver.response_headers = 307, {"Location": f"{receiver.url}/elsewhere"}
    webhook = create(http, f"{receiver.url}/redirecting")
    http.post(f"/v1/webhooks/{webhook['id']}/test").raise_for_status()
    delivery = wait_for_end(http, webhook["id"])
    assert (delivery["status_code"], delivery["status"], delivery["attempts"]) == (307, "failed", 1)
    assert "redirects to another URL" in delivery["error"]
    assert receiver.of("/elsewhere") == []


def test_cookies_of_a_receiver_are_not_sent_to_other_receivers(http: httpx.Client, receiver: Receiver) -> None:
    """Receivers of several projects may have the same address, for example that of a content delivery network."""
    receiver.response_headers = {"Set-Cookie": "session=of-the-first; Path=/"}
    for path in ("/first", "/second"):
        webhook = create(http, f"{receiver.url}{path}")
        http.post(f"/v1/webhooks/{webhook['id']}/test").raise_for_status()
        assert wait_for_end(http, webhook["id"])["status"] == "delivered"
    assert [request.headers.get("cookie") for request in receiver.of("/second")] == [None]


def test_an_address_that_only_the_resolver_accepts_ends_the_delivery(http: httpx.Client, receiver: Receiver) -> None:
    """The resolver reads 0177 as an octal number, and the HTTP library rejects it."""
    webhook = create(http, f"http://0177.0.0.1:{receiver.port}/octal")
    http.post(f"/v1/webhooks/{webhook['id']}/test").raise_for_status()
    delivery = wait_for_end(http, webhook["id"])
    assert delivery["status"] == "failed"
    assert "Invalid IPv4 address" in delivery["error"]


def test_a_test_message_is_signed_with_both_secrets_during_a_rotation(http: httpx.Client, receiver: Receiver) -> None:
    webhook = create(http, f"{receiver.url}/rotated")
    rotated = http.post(f"/v1/webhooks/{webhook['id']}/rotate", json={"grace_seconds": 3600}).json()
    assert rotated["secret"] != webhook["secret"]
    response = http.post(f"/v1/webhooks/{webhook['id']}/test")
    assert (response.status_code, response.json()["event"]) == (202, "webhook.test")
    (request,) = wait_for(receiver, "/rotated")
    for secret in (webhook["secret"], rotated["secret"]):
        OpenAI(api_key="none").webhooks.verify_signature(request.body, dict(request.headers), secret=secret)


@pytest.mark.extended
def test_a_webhook_that_only_fails_for_days_is_disabled_and_others_are_notified(
    http: httpx.Client, rows: Rows, receiver: Receiver
) -> None:
    other = create(http, f"{receiver.url}/others", events=["webhook.disabled"])
    with running_receiver() as broken:
        broken.status = 500
        webhook = create(http, f"{broken.url}/broken")
        end_job(http, rows)
        wait_until(lambda: http.get(f"/v1/webhooks/{webhook['id']}").json()["failing_since"], 10, "a failure")
        rows.age_webhook(webhook["id"], timedelta(days=6))
        disabled = wait_until(lambda: not http.get(f"/v1/webhooks/{webhook['id']}").json()["enabled"], 20, "the end")
    assert disabled
    shown = http.get(f"/v1/webhooks/{webhook['id']}").json()
    assert shown["disabled_reason"] == (
        "Every attempt failed for 5 days; the last one: the receiver responded with status 500."
    )
    (request,) = wait_for(receiver, "/others")
    assert json.loads(request.body)["data"]["webhook"] == webhook["id"]
    end_job(http, rows)
    assert {entry["status"] for entry in deliveries(http, webhook["id"])} == {"failed"}
    assert len(deliveries(http, webhook["id"])) == 1, "a disabled webhook receives no events"
    enabled = http.patch(f"/v1/webhooks/{webhook['id']}", json={"enabled": True}).json()
    assert (enabled["enabled"], enabled["disabled_reason"], enabled["failing_since"]) == (True, None, None)
    for one in (other, webhook):
        http.delete(f"/v1/webhooks/{one['id']}").raise_for_status()


def test_a_receiver_that_is_gone_is_disabled_at_once(http: httpx.Client, rows: Rows, receiver: Receiver) -> None:
    receiver.status = 410
    webhook = create(http, f"{receiver.url}/gone")
    end_job(http, rows)
    wait_until(lambda: not http.get(f"/v1/webhooks/{webhook['id']}").json()["enabled"], 10, "the webhook to end")
    http.delete(f"/v1/webhooks/{webhook['id']}").raise_for_status()
