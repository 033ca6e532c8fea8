"""What the jobs of a project may read from the Hugging Face Hub: nothing, public repositories, or with the token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.database.access_tables import ProjectRow
from tests.harness.fleet import SmallFleet, small_fleet
from tests.harness.simulated_worker import SimulatedWorker
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from tests.server.server_process import SECRET, SPEC, ServerProcess, error_of, running_server
from tests.server.stepped_scheduler import SteppedScheduler, change
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.wire.messages import CheckRequest

OF_THE_HUB: dict[str, Any] = {"dataset": {"hub": "owner/name"}, "model": "owner/model", "tokenizer": "owner/tokens"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, shared_valkey: ValkeyServer) -> Iterator[ServerProcess]:
    home = tmp_path_factory.mktemp("server")
    with running_server(home, shared_valkey.second_url, ZETA_HUB="on", ZETA_CHECK_SECONDS="1") as process:
        yield process


@pytest.fixture
def fleet(tmp_path: Path, redis_url: str) -> Iterator[SmallFleet]:
    with small_fleet(tmp_path, redis_url) as fleet:
        yield fleet


def new_project(server: ServerProcess, http: httpx.Client, name: str) -> httpx.Client:
    """A client with a key of a new project."""
    created = http.post("/v1/keys", json={"name": "n", "project": name, "scopes": ["submit"]}).raise_for_status()
    return server.http(created.json()["key"])


def allow(http: httpx.Client, project: str, hub: str | None) -> dict[str, Any]:
    response = http.patch(f"/v1/projects/{project}", json={"limits": {"hub": hub}})
    return response.raise_for_status().json()


def test_only_the_project_of_the_operator_has_the_token_at_first(server: ServerProcess, http: httpx.Client) -> None:
    new_project(server, http, "young").close()
    assert http.get("/v1/projects/default").json()["effective_limits"]["hub"] == "operator-token"
    assert http.get("/v1/projects/young").json()["effective_limits"]["hub"] == "public"
    assert allow(http, "young", "operator-token")["effective_limits"]["hub"] == "operator-token"
    assert allow(http, "young", None)["effective_limits"]["hub"] == "public"


def test_only_an_administrator_can_allow_the_token(server: ServerProcess, http: httpx.Client) -> None:
    with new_project(server, http, "curious") as member:
        refused = member.patch("/v1/projects/curious", json={"limits": {"hub": "operator-token"}})
        assert (refused.status_code, error_of(refused)["code"]) == (403, "insufficient_scope")
    invalid = http.patch("/v1/projects/curious", json={"limits": {"hub": "private"}})
    assert (invalid.status_code, error_of(invalid)["param"]) == (422, "limits.hub")


def test_a_project_without_the_hub_may_name_nothing_on_it(server: ServerProcess, http: httpx.Client) -> None:
    with new_project(server, http, "offline") as member:
        assert member.post("/v1/jobs", json={**SPEC, **OF_THE_HUB}).status_code == 201
        allow(http, "offline", "off")
        for path in ("/v1/jobs", "/v1/jobs/validate"):
            refused = member.post(path, json={**SPEC, **OF_THE_HUB})
            assert refused.status_code == 422
            details = {detail["param"]: detail["message"] for detail in error_of(refused)["details"]}
            assert details.keys() == {"dataset.hub", "model", "tokenizer"}
            assert "this project may not read the Hugging Face Hub" in details["model"]
        assert member.post("/v1/jobs", json=SPEC).status_code == 201


def test_a_check_has_the_access_of_its_project(
    server: ServerProcess, http: httpx.Client, shared_valkey: ValkeyServer
) -> None:
    with new_project(server, http, "checked") as member, shared_valkey.client(shared_valkey.second_url) as client:
        worker = SimulatedWorker(client, SECRET)

        def is_known() -> bool:
            worker.send_heartbeat()
            return worker.name in http.get("/v1/workers").text

        wait_until(is_known, 15, "the worker to be known")
        for hub in ("public", "operator-token"):
            allow(http, "checked", hub)
            worker.send_heartbeat()
            assert member.post("/v1/jobs/validate", json={**SPEC, **OF_THE_HUB}).status_code == 200
            requests = [message for message in worker.receive_all() if isinstance(message, CheckRequest)]
            assert [(request.project, request.hub) for request in requests] == [("checked", hub)]


def test_a_job_has_the_access_of_its_project_at_its_dispatch(fleet: SmallFleet) -> None:
    scheduler = SteppedScheduler(fleet)
    scheduler.update_workers(w=2)
    own, foreign = fleet.submit(), fleet.submit()
    add_project(fleet, "trusted", hub="operator-token")
    change(fleet, own, project="trusted")
    change(fleet, foreign, project="another")
    scheduler.step()
    assert {message.job_id: message.hub for message in scheduler.sent} == {own: "operator-token", foreign: "public"}


def add_project(fleet: SmallFleet, name: str, **limits: str) -> None:
    async def write() -> None:
        async with fleet.database.write() as session:
            session.add(ProjectRow(name=name, created_by="key_test", created_at=utc_now(), limits=limits))

    fleet.loop.run(write())
