"""Spec checks are delegated to a worker, cached, and limited in time."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.engine.engine import Engine
from tests.harness.fleet import SECRET, SmallFleet, small_fleet
from tests.harness.simulated_worker import SimulatedWorker
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from tests.server import server_process
from zeta_core.contract.access import HubAccess
from zeta_core.contract.job.check import CheckAnswer
from zeta_core.contract.spec.resolved_spec import ResolvedSpec
from zeta_core.contract.wire.messages import CheckRequest, CheckResult

SPEC: dict[str, Any] = {"model": {"config": {"model_type": "llama"}}}


@pytest.fixture
def fleet(tmp_path: Path, redis_url: str) -> Iterator[SmallFleet]:
    with small_fleet(tmp_path, redis_url, check_seconds=3) as fleet:
        yield fleet


def request_check(fleet: SmallFleet, engine: Engine, resolved: dict[str, Any]) -> CheckAnswer | str:
    return fleet.loop.run(
        engine.spec_checks.request("p", SPEC, ResolvedSpec.model_validate(resolved), 1, hub=HubAccess.PUBLIC)
    )


def test_a_repeated_check_is_answered_from_the_cache(fleet: SmallFleet, shared_valkey: ValkeyServer) -> None:
    engine = fleet.start_engine()
    assert "No connected worker can check" in str(request_check(fleet, engine, {}))
    with shared_valkey.client() as client:
        worker = SimulatedWorker(client, SECRET)

        def alive() -> bool:
            worker.send_heartbeat()
            return engine.is_alive(worker.name)

        wait_until(alive, 15, "the worker to be known")
        requests: list[CheckRequest] = []

        def serve() -> None:
            wait_until(take, 15, "the request")
            (request,) = requests
            worker.send(
                CheckResult(check_id=request.check_id, worker=worker.name, answer=CheckAnswer(ok=True, tokens=7))
            )

        def take() -> bool:
            requests.extend(message for message in worker.receive_all() if isinstance(message, CheckRequest))
            return bool(requests)

        serving = threading.Thread(target=serve)
        serving.start()
        found = request_check(fleet, engine, {})
        serving.join(15)
        assert isinstance(found, CheckAnswer)
        assert (found.tokens, requests[0].spec, requests[0].limit_seconds) == (7, SPEC, 12.0)
        assert request_check(fleet, engine, {}) == found
        assert worker.receive_all() == []
        alive()
        assert "did not answer within 3 s" in str(request_check(fleet, engine, {"seq_len": 8}))


@pytest.mark.parametrize(
    ("dataset", "num_checks"),
    [
        ({"hub": "owner/name"}, 2),
        ({"hub": "owner/name", "revision": "main"}, 2),
        ({"path": "data.jsonl"}, 2),
        ([{"builtin": "python-docs"}, {"hub": "owner/name"}], 2),
        ({"hub": "owner/name", "revision": "0123456789abcdef0123456789abcdef01234567"}, 1),
        ({"builtin": "python-docs"}, 1),
    ],
    ids=["hub", "branch", "path", "mixed", "commit", "builtin"],
)
def test_only_checks_of_immutable_data_are_cached(
    answered: httpx.Client, requests: list[CheckRequest], dataset: Any, num_checks: int
) -> None:
    requests.clear()
    spec = {**server_process.SPEC, "dataset": dataset}
    for _ in range(2):
        response = answered.post("/v1/jobs/validate", json=spec)
        assert response.status_code == 200, response.text
        assert response.json()["tokens"] == 7
    assert len(requests) == num_checks


@pytest.fixture(scope="module")
def requests() -> list[CheckRequest]:
    """The requests that the worker of `answered` has received."""
    return []


@pytest.fixture(scope="module")
def answered(
    shared_valkey: ValkeyServer, tmp_path_factory: pytest.TempPathFactory, requests: list[CheckRequest]
) -> Iterator[httpx.Client]:
    """A client of a server whose simulated worker answers every check."""
    stopped = threading.Event()
    with (
        server_process.running_server(
            tmp_path_factory.mktemp("answered"), shared_valkey.second_url, ZETA_HUB="on"
        ) as server,
        shared_valkey.client(shared_valkey.second_url) as client,
        server.http() as http,
    ):
        worker = SimulatedWorker(client, server_process.SECRET)

        def answer() -> None:
            while not stopped.wait(0.05):
                worker.send_heartbeat()
                for message in worker.receive_all():
                    if isinstance(message, CheckRequest):
                        requests.append(message)
                        found = CheckAnswer(ok=True, tokens=7)
                        worker.send(CheckResult(check_id=message.check_id, worker=worker.name, answer=found))

        playing = threading.Thread(target=answer)
        playing.start()
        try:
            wait_until(lambda: worker.name in http.get("/v1/workers").text, 15, "the worker to be known")
            yield http
        finally:
            stopped.set()
            playing.join(15)
