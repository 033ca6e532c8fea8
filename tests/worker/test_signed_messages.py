"""A worker accepts only messages that the server signed for it, in time and once, and needs little access to Redis."""

from __future__ import annotations

import json
import time
from base64 import b64encode
from queue import Empty, SimpleQueue
from typing import Any

import pytest
import redis

from tests.harness.fleet import SECRET, SmallFleet
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from worker.messaging.link import RedisLink
from zeta_core.contract.wire.messages import (
    Dispatch,
    JournalAck,
    StopRequest,
    queue_keys,
    worker_queue,
    worker_stream,
)
from zeta_core.contract.wire.signatures import CLOCK_WINDOW_SECONDS, derive_key, sign, sign_body

STOP = StopRequest(job_id="job_1", attempt=1, action="cancel")
ACK = JournalAck(job_id="job_1", attempt=1, stored_line=7)
STREAM = worker_stream("w")


class Receiver:
    """A worker's link, without the rest of the worker."""

    def __init__(self, url: str, client: redis.Redis) -> None:
        self.key = derive_key("secret", "w")
        self.client = client
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self.link = RedisLink(url, self.key, self._inbox)
        self.link.start()

    def send(self, fields: dict[str, str]) -> None:
        self.client.xadd(STREAM, {**fields})

    def received(self) -> list[Any]:
        wait_until(lambda: self.client.xlen(STREAM) == 0, 20, "the worker to read its stream")
        self.link.stop()
        found: list[Any] = []
        try:
            while True:
                found.append(self._inbox.get_nowait())
        except Empty:
            return found


@pytest.fixture
def receiver(redis_url: str, client: redis.Redis) -> Receiver:
    return Receiver(redis_url, client)


def test_replayed_and_late_commands_are_dropped_and_counted(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    intercepted = sign(STOP, receiver.key, channel=STREAM)
    for _ in range(3):
        receiver.send(intercepted)
    for ahead in (-CLOCK_WINDOW_SECONDS - 5, CLOCK_WINDOW_SECONDS + 5):
        receiver.send(sign(STOP, receiver.key, channel=STREAM, sent_at=time.time() + ahead))
    assert receiver.received() == [STOP]
    assert receiver.link.invalid.count == 4
    assert "was received before" in caplog.text


def test_acknowledgements_are_accepted_at_any_age(receiver: Receiver) -> None:
    receiver.send(sign(ACK, receiver.key, channel=STREAM, sent_at=time.time() - 10 * 3600))
    assert receiver.received() == [ACK]


def test_messages_that_are_signed_for_another_worker_are_dropped(receiver: Receiver) -> None:
    other = derive_key("secret", "v")
    receiver.send(sign(STOP, other, channel=STREAM))
    receiver.send({**sign(STOP, other, channel=STREAM), "worker": "w"})
    receiver.send({"body": STOP.model_dump_json(), "signature": "0" * 64})
    for body in ("[" * 100_000, '{"kind":"stop_order","attempt":"x"}', "", "5"):
        receiver.send(sign_body(body, receiver.key, channel=STREAM))
    receiver.send(sign(ACK, receiver.key, channel=STREAM))
    assert receiver.received() == [ACK]
    assert receiver.link.invalid.count == 7


@pytest.mark.extended
def test_a_replayed_dispatch_starts_nothing(fleet: SmallFleet, client: redis.Redis) -> None:
    fleet.start_worker()
    assert fleet.wait_for_status(fleet.submit(steps="2"), "succeeded").attempt == 1
    key = derive_key(SECRET, "w1")
    queue = worker_queue("w1")
    dispatch = Dispatch(job_id="job_2", attempt=1, worker="w1", slots=[0], spec={})
    intercepted = sign(dispatch, key, channel=queue, sent_at=time.time() - 2 * CLOCK_WINDOW_SECONDS)
    for _ in range(3):
        body = b64encode(json.dumps([[intercepted], {}, {}]).encode()).decode()
        client.lpush(queue, json.dumps({"body": body, "headers": {}, "properties": {}}))
    wait_until(lambda: client.llen(queue) == 0, 20, "the worker to read its queue")
    engine = fleet.engine
    assert engine is not None
    wait_until(lambda: engine.workers()[0].num_dropped == 3, 20, "the worker to count the dispatches")
    assert fleet.wait_for_status(fleet.submit(steps="2"), "succeeded").attempt == 1


def test_a_worker_runs_jobs_with_a_redis_user_that_reaches_only_its_keys(
    fleet: SmallFleet, shared_valkey: ValkeyServer, client: redis.Redis
) -> None:
    keys = ["zeta:server", "zeta:workers", "zeta:worker:w1", "zeta:answers:*", "zeta.worker.w1*"]
    rules = [*(f"~{key}" for key in [*keys, "_kombu.binding*.zeta.worker.w1"]), "&*"]
    commands = ["+@all", "-@admin", "-@dangerous", "-@scripting", "+info"]
    client.execute_command("ACL", "SETUSER", "w1", "on", ">a-password", "resetkeys", *rules, *commands)
    try:
        address = fleet.settings.redis_url.removeprefix("redis://")
        fleet.start_worker(ZETA_REDIS_URL=f"redis://w1:a-password@{address}")
        assert fleet.wait_for_status(fleet.submit(steps="3"), "succeeded").attempt == 1
        assert all(key.startswith(("zeta.worker.w1", "_kombu.binding.zeta.worker.w1")) for key in queue_keys("w1"))
        assert "NOPERM" not in fleet.logs()
    finally:
        client.execute_command("ACL", "DELUSER", "w1")
