"""The Celery consumer with a real Valkey: no queue entry stops it or is processed twice."""

import asyncio
import base64
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, SimpleQueue

import pytest
import redis

from server.engine.dispatcher import Dispatcher
from server.engine.redis_client import connect
from server.engine.worker_secrets import WorkerSecrets
from tests.harness.tcp_relay import TcpRelay
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from worker.messaging.consumer import Consumer
from worker.settings import WorkerSettings
from zeta_core.contract.wire.messages import Dispatch, queue_keys, worker_queue
from zeta_core.system.redis_access import RedisUnavailable

QUEUE = worker_queue("w")
TASK = {"task": "zeta.start", "id": "1", "root_id": "1", "parent_id": None}


class DispatchQueue:
    """The queue of a worker with its consumer; the test sends dispatches like a server."""

    def __init__(self, redis_url: str, home: Path) -> None:
        self.inbox: SimpleQueue[Dispatch] = SimpleQueue()
        self._url = redis_url
        settings = WorkerSettings(home=home, worker_name="w", worker_secret="s", redis_url=redis_url)
        self.consumer = Consumer(settings, self.inbox)

    def send(self, job_id: str) -> bool:
        """Send a dispatch; returns whether Redis accepted it."""

        async def send() -> None:
            client = connect(self._url)
            dispatcher = Dispatcher(self._url, client, WorkerSecrets("s"))
            try:
                await dispatcher.send(Dispatch(job_id=job_id, attempt=1, worker="w", slots=[0], spec={}))
            finally:
                dispatcher.close()
                await client.aclose()

        try:
            asyncio.run(send())
        except RedisUnavailable:
            return False
        return True

    def wait_for(self, job_id: str) -> None:
        def received() -> bool:
            try:
                return self.inbox.get_nowait().job_id == job_id
            except Empty:
                return False

        wait_until(received, 60, f"the dispatch of {job_id}")


@pytest.fixture
def queue(redis_url: str, tmp_path: Path) -> Iterator[DispatchQueue]:
    queue = DispatchQueue(redis_url, tmp_path)
    queue.consumer.start()
    yield queue
    queue.consumer.stop()


def message(body: object, headers: object, **fields: object) -> str:
    """A message as kombu stores it, with these parts."""
    properties = {
        "delivery_tag": "t",
        "delivery_info": {"exchange": "", "routing_key": QUEUE},
        "body_encoding": "base64",
    }
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    encoded = {"body": base64.b64encode(text).decode(), "content-type": "application/json", "content-encoding": "utf-8"}
    return json.dumps({**encoded, "headers": headers, "properties": properties, **fields})


INVALID: dict[str, str | bytes] = {
    "not UTF-8": b"\xfe\xff",
    "not JSON": "]",
    "nested too deeply": b"[" * 50_000,
    "a number": "7",
    "empty": "{}",
    "arguments that are numbers": message([1, 2, 3], TASK),
    "fields that are a list": message([[["body"]], {}, {}], TASK),
    "signed by somebody else": message([[{"body": "{}", "signature": "s\u00fc\u00df"}], {}, {}], TASK),
    "a body that is not UTF-8": message(b"\xfe", TASK),
    "another content type": message([[{}], {}, {}], TASK, **{"content-type": "application/x-python-serialize"}),
    "another task": message([[{}], {}, {}], {**TASK, "task": "elsewhere"}),
    "no headers": message([[{}], {}, {}], None),
    "an invalid time": message([[{}], {}, {}], {**TASK, "eta": "soon", "expires": []}),
    "no properties": message([[{}], {}, {}], TASK, properties={}),
}


def test_entries_that_are_not_dispatchs_are_removed_without_delay(
    queue: DispatchQueue, client: "redis.Redis", caplog: pytest.LogCaptureFixture
) -> None:
    for number, entry in enumerate(INVALID.values()):
        client.lpush(QUEUE, entry)
        queue.send(f"job_{number}")
        queue.wait_for(f"job_{number}")
    assert client.llen(QUEUE) == 0
    assert [key for key in client.scan_iter() if "unacked" in str(key)] == []
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "Removed an invalid entry from the queue zeta.worker.w" in warning.getMessage()
    assert warning.exc_info is None


@pytest.mark.parametrize("key", queue_keys("w"))
def test_a_queue_key_of_another_type_is_removed(queue: DispatchQueue, client: "redis.Redis", key: str) -> None:
    queue.send("job_1")
    queue.wait_for("job_1")
    client.delete(key)
    client.set(key, "not a queue")
    wait_until(lambda: queue.send("job_2"), 60, "Redis to accept a dispatch")
    queue.wait_for("job_2")


@pytest.mark.extended
@pytest.mark.parametrize("is_connected", [True, False], ids=["a connected consumer", "a starting consumer"])
def test_a_redis_server_that_never_responds_is_an_outage(
    is_connected: bool, shared_valkey: ValkeyServer, tmp_path: Path
) -> None:
    relay = TcpRelay(shared_valkey.port)
    queue = DispatchQueue(f"redis://127.0.0.1:{relay.port}/0", tmp_path)
    outage = queue.consumer.thread.outage
    try:
        if not is_connected:
            relay.cut()
        queue.consumer.start()
        if is_connected:
            queue.send("job_1")
            queue.wait_for("job_1")
            assert outage.trouble is None
            relay.cut()
        wait_until(lambda: outage.trouble, 60, "the outage to be reported")
        relay.restore()
        wait_until(lambda: queue.send("job_2"), 60, "Redis to accept a dispatch")
        queue.wait_for("job_2")
        wait_until(lambda: outage.trouble is None, 60, "the end of the outage")
    finally:
        relay.restore()
        queue.consumer.stop()
        relay.close()


def test_a_missing_permission_is_logged_once_and_the_queue_is_read_once_granted(
    redis_url: str, shared_valkey: ValkeyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with shared_valkey.client() as client:
        client.execute_command("ACL", "SETUSER", "limited", "reset", "on", ">p/w @#", "~*", "&*", "+@all", "-brpop")
        queue = DispatchQueue(redis_url.replace("redis://", "redis://limited:p%2Fw%20%40%23@"), tmp_path)
        client.config_resetstat()

        def num_refused() -> int:
            return client.info("commandstats").get("cmdstat_brpop", {}).get("rejected_calls", 0)

        try:
            queue.consumer.start()
            wait_until(lambda: num_refused() >= 3, 60, "three tries")
            client.execute_command("ACL", "SETUSER", "limited", "+brpop")
            wait_until(lambda: queue.send("job_1"), 60, "Redis to accept a dispatch")
            queue.wait_for("job_1")
        finally:
            queue.consumer.stop()
            client.execute_command("ACL", "DELUSER", "limited")
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.exc_info for record in warnings] == [None]
    assert "The queue zeta.worker.w cannot be read" in warnings[0].getMessage()
