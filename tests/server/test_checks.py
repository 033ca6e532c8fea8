"""The server asks a worker what it cannot know itself: once for the same question, and no longer than the limit."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.engine.engine import Engine
from tests.harness.fleet import SECRET, Bench, bench
from tests.harness.played_worker import PlayedWorker
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from zeta_core.contract.check import CheckAnswer
from zeta_core.contract.messages import CheckRequest, CheckResult

SPEC: dict[str, Any] = {"model": {"config": {"model_type": "llama"}}}


@pytest.fixture
def fleet(tmp_path: Path, redis_url: str) -> Iterator[Bench]:
    with bench(tmp_path, redis_url, check_seconds=3) as made:
        yield made


def ask(fleet: Bench, engine: Engine, resolved: dict[str, Any]) -> CheckAnswer | str:
    return fleet.loop.run(engine.checks.ask(SPEC, resolved, 1))


def test_a_check_is_asked_once_and_answered_from_what_is_kept(fleet: Bench, shared_valkey: ValkeyServer) -> None:
    engine = fleet.start_engine()
    assert "No connected worker can check" in str(ask(fleet, engine, {}))
    with shared_valkey.client() as client:
        worker = PlayedWorker(client, SECRET)

        def alive() -> bool:
            worker.beat()
            return engine.is_alive(worker.name)

        wait_until(alive, 15, "the worker to be known")
        asked: list[CheckRequest] = []

        def serve() -> None:
            wait_until(take, 15, "the request")
            (request,) = asked
            worker.say(
                CheckResult(check_id=request.check_id, worker=worker.name, answer=CheckAnswer(ok=True, tokens=7))
            )

        def take() -> bool:
            asked.extend(message for message in worker.heard() if isinstance(message, CheckRequest))
            return bool(asked)

        serving = threading.Thread(target=serve)
        serving.start()
        found = ask(fleet, engine, {})
        serving.join(15)
        assert isinstance(found, CheckAnswer)
        assert (found.tokens, asked[0].spec, asked[0].limit_seconds) == (7, SPEC, 12.0)
        assert ask(fleet, engine, {}) == found
        assert worker.heard() == []
        alive()
        assert "did not answer within 3 s" in str(ask(fleet, engine, {"seq_len": 8}))
