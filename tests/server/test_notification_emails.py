"""Notifications by e-mail, through a real SMTP server."""

from __future__ import annotations

from collections.abc import Iterator
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any

import httpx
import pytest
from aiosmtpd.controller import Controller

from tests.harness.ports import free_loopback_port
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from tests.server.rows import Rows
from tests.server.server_process import SPEC, ServerProcess, error_of, running_server, submit
from zeta_core.contract.job.status import JobStatus


class Mailbox:
    """Collects the e-mails that an SMTP server receives, and refuses some recipients."""

    def __init__(self) -> None:
        self.received: list[tuple[list[str], EmailMessage]] = []

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: list[str]) -> str:
        if address.startswith("unknown@"):
            return "550 no such user"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        message = message_from_bytes(envelope.content, policy=policy.default)
        assert isinstance(message, EmailMessage)
        self.received.append((envelope.rcpt_tos, message))
        return "250 OK"


@pytest.fixture(scope="module")
def mailbox() -> Mailbox:
    return Mailbox()


@pytest.fixture(scope="module")
def server(
    shared_valkey: ValkeyServer, mailbox: Mailbox, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    port = free_loopback_port()
    controller = Controller(mailbox, hostname="127.0.0.1", port=port)
    controller.start()
    settings = {"ZETA_SMTP_URL": f"smtp://127.0.0.1:{port}", "ZETA_SMTP_FROM": "zeta@example.org"}
    try:
        with running_server(tmp_path_factory.mktemp("server"), shared_valkey.second_url, **settings) as process:
            yield process
    finally:
        controller.stop()


def test_the_end_of_a_job_is_sent_by_email(http: httpx.Client, rows: Rows, mailbox: Mailbox) -> None:
    job_id = submit(http, entity_name="museum", notify=[{"to": "mailto:team@example.org"}])["id"]
    rows.attempt(job_id, to=JobStatus.SUCCEEDED)
    wait_until(lambda: mailbox.received, 10, "the e-mail")
    ((recipients, message),) = mailbox.received
    assert recipients == ["team@example.org"]
    assert message["From"] == "zeta@example.org"
    assert message["Subject"].startswith(f"Job museum ({job_id}) succeeded.")
    assert f'"id": "{job_id}"' in message.get_content()
    (delivery,) = http.get(f"/v1/jobs/{job_id}/deliveries").json()["data"]
    assert message["Message-ID"] == f"<{delivery['id']}@example.org>"


def test_a_refused_recipient_is_reported(http: httpx.Client, rows: Rows) -> None:
    created = http.post("/v1/webhooks", json={"url": "mailto:unknown@example.org"}).json()
    assert created["format"] == "email"
    http.post(f"/v1/webhooks/{created['id']}/test").raise_for_status()
    path = f"/v1/webhooks/{created['id']}/deliveries"
    wait_until(lambda: http.get(path).json()["data"][0]["status"] == "failed", 10, "the test")
    assert http.get(path).json()["data"][0]["error"] == "the SMTP server refused the recipient: 550 no such user"


def test_emails_go_only_to_allowed_domains(http: httpx.Client) -> None:
    response = http.post("/v1/jobs", json={**SPEC, "notify": [{"to": "mailto:someone@example.com"}]})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (422, "notify.0.to")
    assert "ZETA_SMTP_DOMAINS" in error["message"]
    response = http.post("/v1/webhooks", json={"url": "mailto:a@example.org", "format": "slack"})
    assert "e-mails have no format 'slack'" in error_of(response)["message"]
