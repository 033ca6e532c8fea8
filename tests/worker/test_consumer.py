"""The Celery side in this process, against a real Valkey: what the log says of a queue that cannot be read."""

import logging
from pathlib import Path
from queue import SimpleQueue

import pytest

from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from worker.messaging import consumer as celery_side
from worker.messaging.consumer import Consumer
from worker.settings import WorkerSettings
from zeta_core.contract.messages import worker_queue


def test_a_queue_whose_key_is_of_a_wrong_type_is_told_once_without_a_traceback_and_again_when_it_is_mended(
    redis_url: str,
    shared_valkey: ValkeyServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(celery_side, "RESTART_SECONDS", 0.05)
    caplog.set_level(logging.INFO)
    settings = WorkerSettings(home=tmp_path, worker_name="w", worker_secret="s", redis_url=redis_url)
    consumer = Consumer(settings, SimpleQueue())
    with shared_valkey.client() as client:
        client.config_resetstat()
        client.set(worker_queue("w"), "wrong")

        def num_refused() -> int:
            return client.info("commandstats").get("cmdstat_llen", {}).get("failed_calls", 0)

        consumer.start()
        try:
            wait_until(lambda: num_refused() >= 3, 60, "three tries")
            client.delete(worker_queue("w"))
            wait_until(lambda: "it is back" in caplog.text, 60, "the queue to be read")
        finally:
            consumer.stop()
    (told,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "The queue zeta.worker.w cannot be read" in told.getMessage()
    assert "WRONGTYPE" in told.getMessage()
    assert told.exc_info is None
