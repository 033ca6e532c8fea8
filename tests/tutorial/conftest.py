"""One service with one worker for the whole tutorial, a client for it, and one finished job."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.end_to_end.specs import TINY_LLAMA
from tests.harness.service import running_service
from zeta import Client
from zeta_core.contract.job.job import Job

# A job of a few seconds: a small Llama, trained from scratch on the Python language reference.
SPEC: dict[str, Any] = {
    "model": {"config": TINY_LLAMA},
    "dataset": {"builtin": "python-docs"},
    "seq_len": 64,
    "batch_size": 4,
    "max_steps": 4,
    "learning_rate": 0.003,
}

SETTINGS = {"ZETA_CHECK_SECONDS": "120"}  # the first check starts a process, which takes long on a busy machine


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a service that `zeta up` has started, as in a user's shell."""
    with (
        running_service(tmp_path_factory.mktemp("service"), settings=SETTINGS) as service,
        Client(service.url, service.api_key) as connected,
    ):
        yield connected


@pytest.fixture(scope="session")
def finished_job(client: Client) -> Job:
    """A job that has succeeded."""
    return client.wait(client.submit(SPEC).id, timeout_seconds=240)
