"""Webhook endpoints of the official client: OpenAI's events, in OpenAI's format, which the client itself verifies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import InvalidWebhookSignatureError, OpenAI

from tests.harness.openai_client import openai_client, strictly
from tests.harness.receiver import Receiver, running_receiver
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from tests.server.rows import Rows
from tests.server.server_process import API_KEY, ServerProcess, running_server, submit
from zeta_core.contract.job.status import JobStatus, StatusReason

SETTINGS = {"ZETA_WEBHOOK_NETWORKS": "127.0.0.0/8", "ZETA_WEBHOOK_SECONDS": "1"}


@pytest.fixture(scope="module")
def server(shared_valkey: ValkeyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_server(tmp_path_factory.mktemp("server"), shared_valkey.second_url, **SETTINGS) as process:
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with openai_client(server.url, API_KEY) as client:
        yield client


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with running_receiver() as running:
        yield running


def create(client: OpenAI, url: str, *events: Any) -> Any:
    return client.webhooks.create(name="ours", url=url, event_types=list(events))


def test_an_endpoint_is_created_changed_listed_and_deleted(client: OpenAI, http: httpx.Client) -> None:
    url = "https://example.org/hook"
    created = strictly(create(client, url, "batch.failed", "fine_tuning.job.succeeded"))
    assert created.event_types == ["batch.failed", "fine_tuning.job.succeeded"]
    assert created.signing_secret.startswith("whsec_")
    assert created.signing_secret_hint == f"...{created.signing_secret[-4:]}"
    shown = strictly(client.webhooks.retrieve(created.id))
    assert (shown.name, shown.url, shown.object) == ("ours", url, "webhook_endpoint")
    assert created.signing_secret not in shown.to_json()

    second = create(client, url, "batch.completed")
    page = client.webhooks.list(limit=1)
    assert ([strictly(each).id for each in page.data], page.has_more) == ([second.id], True)
    assert [each.id for each in client.webhooks.list(limit=1)] == [second.id, created.id]
    native = http.get(f"/v1/webhooks/{created.id}").json()
    assert (native["format"], native["events"]) == ("openai", created.event_types)
    refused = http.patch(f"/v1/webhooks/{created.id}", json={"events": ["job.failed"]})
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "openai_webhook")
    moved = http.patch(f"/v1/webhooks/{created.id}", json={"url": url}).raise_for_status().json()
    assert (moved["format"], moved["events"]) == ("openai", created.event_types), "a new URL changes neither"

    changed = strictly(client.webhooks.update(created.id, name="theirs", event_types=["batch.cancelled"]))
    assert (changed.name, changed.url, changed.event_types) == ("theirs", url, ["batch.cancelled"])
    rotated = strictly(client.webhooks.rotate_secret(created.id, keep_old_secret_active_for_24_hours=True))
    assert rotated.signing_secret != created.signing_secret
    assert strictly(client.webhooks.delete(created.id)).deleted
    with pytest.raises(openai.NotFoundError):
        client.webhooks.retrieve(created.id)
    client.webhooks.delete(second.id)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"event_types": ["response.completed"]}, "event_types.0"),
        ({"event_types": []}, "event_types"),
        ({"url": "example.org"}, "url"),
        ({"url": "http://169.254.169.254/"}, "url"),
        ({"name": ""}, "name"),
    ],
)
def test_an_invalid_endpoint_names_its_parameter(client: OpenAI, fields: dict[str, Any], param: str) -> None:
    valid: dict[str, Any] = {"name": "n", "url": "https://example.org/", "event_types": ["batch.failed"]}
    with pytest.raises(openai.BadRequestError) as caught:
        client.webhooks.create(**{**valid, **fields})
    assert caught.value.param == param
    assert not list(client.webhooks.list())


def test_the_client_verifies_the_events_of_jobs(
    client: OpenAI, http: httpx.Client, rows: Rows, receiver: Receiver
) -> None:
    endpoint = create(client, f"{receiver.url}/hook", "fine_tuning.job.succeeded", "fine_tuning.job.failed")
    jobs = [submit(http)["id"] for _ in range(3)]
    rows.attempt(jobs[0], to=JobStatus.CANCELLED, reason=StatusReason.CANCELLED_BY_USER)
    rows.attempt(jobs[1], to=JobStatus.FAILED, reason=StatusReason.TRAIN_ERROR)
    rows.attempt(jobs[2], to=JobStatus.SUCCEEDED)
    wait_until(lambda: len(receiver.of("/hook")) >= 2, 20, "two messages")
    events = [
        strictly(client.webhooks.unwrap(sent.body, dict(sent.headers), secret=endpoint.signing_secret))
        for sent in receiver.of("/hook")
    ]
    assert {(event.type, event.data.id) for event in events} == {  # pyright: ignore[reportAttributeAccessIssue]
        ("fine_tuning.job.failed", jobs[1]),
        ("fine_tuning.job.succeeded", jobs[2]),
    }
    first = receiver.of("/hook")[0]
    with pytest.raises(InvalidWebhookSignatureError):
        client.webhooks.unwrap(first.body + b" ", dict(first.headers), secret=endpoint.signing_secret)
    client.webhooks.delete(endpoint.id)


@pytest.mark.extended
def test_a_test_returns_the_status_code_of_the_receiver(client: OpenAI, receiver: Receiver) -> None:
    endpoint = create(client, f"{receiver.url}/test", "batch.completed")
    receiver.status = 418
    result = strictly(client.webhooks.test(endpoint.id, event_type="batch.completed"))
    assert (result.status_code, result.event_type, result.webhook_endpoint_id) == (418, "batch.completed", endpoint.id)
    [sent] = receiver.of("/test")
    assert json.loads(sent.body)["type"] == "batch.completed"
    client.webhooks.update(endpoint.id, url="http://127.0.0.1:1024/nobody-listens")
    with pytest.raises(openai.BadRequestError, match="could not be delivered"):
        client.webhooks.test(endpoint.id, event_type="batch.completed")
    client.webhooks.delete(endpoint.id)
