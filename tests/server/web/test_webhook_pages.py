"""The pages of webhooks in a real browser, with a real receiver of their messages."""

from collections.abc import Callable, Iterator

import httpx
import pytest
from playwright.sync_api import expect

from tests.harness.browser import Visitor
from tests.harness.receiver import Receiver, running_receiver
from tests.harness.valkey import ValkeyServer
from tests.server.server_process import ServerProcess, running_server

Visit = Callable[..., Visitor]


@pytest.fixture(scope="module")
def server(shared_valkey: ValkeyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that may send messages to this machine."""
    settings = {"ZETA_WEBHOOK_NETWORKS": "127.0.0.0/8"}
    with running_server(tmp_path_factory.mktemp("server"), shared_valkey.second_url, **settings) as process:
        yield process


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with running_receiver() as receiver:
        yield receiver


@pytest.mark.extended
def test_a_webhook_is_created_tested_and_deleted(visit: Visit, http: httpx.Client, receiver: Receiver) -> None:
    page = visit().page
    page.get_by_role("link", name="Webhooks").click()
    expect(page.get_by_text("No webhooks yet.")).to_be_visible()
    page.get_by_label("URL").fill(f"{receiver.url}/hook")
    page.get_by_label("Name").fill("CI")
    page.get_by_label("a job waits for a long time").check()
    page.get_by_role("button", name="Create").click()
    assert page.locator("pre").inner_text().startswith("whsec_")
    page.get_by_role("link", name="CI").click()
    (webhook,) = http.get("/v1/webhooks").json()["data"]
    assert webhook["events"] == ["job.cancelled", "job.failed", "job.succeeded", "job.waiting"]

    page.get_by_role("button", name="Send a test").click()
    row = page.locator("#deliveries tbody tr")
    expect(row.locator(".status")).to_have_text("delivered", timeout=20_000)
    expect(row).to_contain_text("204")
    assert len(receiver.of("/hook")) == 1
    receiver.status = 500
    page.get_by_role("button", name="Send a test").click()
    expect(row.first).to_contain_text("500", timeout=20_000)
    row.first.get_by_text("Body").click()
    expect(row.first.locator("pre")).to_contain_text('"type": "webhook.test"')

    page.get_by_role("button", name="Disable").click()
    expect(page.locator("h1 .status")).to_have_text("disabled")
    page.get_by_role("button", name="New secret").click()
    assert page.locator("pre").first.inner_text().startswith("whsec_")
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_text("No webhooks yet.")).to_be_visible()


def test_an_invalid_webhook_keeps_what_was_entered(visit: Visit) -> None:
    visitor = visit()
    visitor.open("/webhooks")
    visitor.page.get_by_label("URL").fill("ftp://example.org/hook")
    visitor.page.get_by_role("button", name="Create").click()
    expect(visitor.page.locator(".alert.bad")).to_contain_text("url is 'ftp://example.org/hook'")
    expect(visitor.page.get_by_label("URL")).to_have_value("ftp://example.org/hook")
    visitor.faults = [fault for fault in visitor.faults if "422" not in fault]
