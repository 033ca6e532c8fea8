"""`zeta workers` and `zeta worker`: the usage of a worker, and draining it."""

import json

import pytest

from tests.harness.service import Service
from tests.harness.waiting import wait_until
from tests.zeta.conftest import TINY_JOB
from zeta.client import Client

pytestmark = pytest.mark.timeout(300)


def test_the_usage_of_a_worker_is_read_and_shown(service: Service, client: Client) -> None:
    (worker,) = client.workers()
    wait_until(lambda: client.worker_usage(worker.name).at, 60, "the first interval to be stored")
    usage = client.worker_usage(worker.name)
    assert (usage.worker, usage.interval_seconds) == (worker.name, 15)
    assert usage.memory_bytes[-1] > 0
    shown = service.command("workers", "usage", worker.name).stdout
    assert all(word in shown for word in ("RESOURCE", "OVER TIME", "cores", "memory"))
    printed = json.loads(service.command("workers", "usage", worker.name, "--hours", "24", "--json").stdout)
    assert (printed["object"], printed["interval_seconds"]) == ("worker_usage", 300)
    assert "worker_not_found" in service.command("workers", "usage", "none", "--json").stderr
    refused = service.command("workers", "usage", worker.name, "--hours", "169")
    assert (refused.returncode, "it must be at most 168" in refused.stderr) == (2, True)


@pytest.mark.extended
def test_a_drained_worker_gets_no_job_until_it_is_undrained(service: Service, client: Client) -> None:
    wait_until(lambda: client.workers()[0].status == "ready", 20, "the worker to be ready")
    (worker,) = client.workers()
    drained = json.loads(service.command("worker", "drain", worker.name, "--json").stdout)
    assert (drained["status"], drained["draining"]) == ("draining", True)
    assert "draining" in service.command("workers").stdout
    waiting = client.submit(TINY_JOB)
    wait_until(lambda: "drained" in str(client.job(waiting.id).waiting_reason), 20, "the reason to wait")
    client.cancel(waiting.id)
    assert "ready" in service.command("worker", "undrain", worker.name).stdout
    assert service.command("worker", "drain", "nobody").returncode == 1
