"""`zeta webhooks` with a real service and a real receiver."""

import json
from collections.abc import Iterator

import pytest

from tests.harness.receiver import Receiver, running_receiver
from tests.harness.valkey import ValkeyServer
from tests.server.server_process import ServerProcess, running_server
from tests.zeta.test_cli_access import zeta


@pytest.fixture(scope="module")
def server(shared_valkey: ValkeyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    networks = {"ZETA_WEBHOOK_NETWORKS": "127.0.0.1"}
    with running_server(tmp_path_factory.mktemp("server"), shared_valkey.second_url, **networks) as process:
        yield process


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with running_receiver() as running:
        yield running


@pytest.mark.extended
def test_a_webhook_is_created_tested_changed_and_deleted(server: ServerProcess, receiver: Receiver) -> None:
    url = f"{receiver.url}/hook"
    created = zeta(server, "webhooks", "create", url, "--name", "CI", "--event", "job.failed,job.waiting")
    assert created.returncode == 0, created.stderr
    secret = created.stdout.strip()
    assert secret.startswith("whsec_")
    assert "it can't be shown again" in created.stderr
    listed = zeta(server, "webhooks").stdout
    assert ("CI" in listed, secret in listed) == (True, False)
    tested = zeta(server, "webhooks", "test", "CI")
    assert (tested.returncode, tested.stdout) == (0, f"The test message was delivered to {url} (status 204).\n")
    receiver.status = 404
    failed = zeta(server, "webhooks", "test", "CI")
    assert (failed.returncode, "the receiver responded with status 404" in failed.stdout) == (1, True)
    sent = json.loads(zeta(server, "webhooks", "deliveries", "CI", "--json").stdout)["data"]
    assert [delivery["status"] for delivery in sent] == ["failed", "delivered"]
    changed = json.loads(zeta(server, "webhooks", "set", "CI", "--event", "none", "--disable", "--json").stdout)
    assert (changed["events"], changed["enabled"]) == ([], False)
    rotated = zeta(server, "webhooks", "rotate", "CI", "--grace", "1h").stdout.strip()
    assert rotated.startswith("whsec_")
    assert rotated != secret
    assert zeta(server, "webhooks", "delete", "CI").returncode == 0
    assert zeta(server, "webhooks", "show", "CI").returncode == 1
    assert zeta(server, "webhooks").stdout.startswith("No webhooks")
