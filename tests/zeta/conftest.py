"""Fixtures for the tests of the client and the command line: a running service, and small real jobs."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from tests.harness.service import Service, running_service
from zeta.client import Client
from zeta_core.contract.errors import Conflict
from zeta_core.contract.job.job import Job

TINY_JOB: dict[str, Any] = {
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 384,
            "max_position_embeddings": 128,
        }
    },
    "dataset": {"builtin": "python-docs"},
    "seq_len": 64,
    "batch_size": 4,
    "gradient_accumulate_every": 1,
    "max_steps": 8,
    "checkpointing_steps": 4,
    "seed": 7,
}
ENDLESS_JOB = {**TINY_JOB, "max_steps": 1_000_000, "checkpointing_steps": 1_000_000}


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture(scope="session")
def client(service: Service) -> Iterator[Client]:
    with Client(service.url, service.api_key) as opened:
        yield opened


@pytest.fixture(scope="session")
def finished_job(client: Client) -> Job:
    """A job that has succeeded and has checkpoints."""
    job = client.wait(client.submit({**TINY_JOB, "entity_name": "finished"}).id, timeout_seconds=240)
    assert job.status == "succeeded", job
    return job


@pytest.fixture
def endless_job(client: Client) -> Iterator[Job]:
    """A job that runs until it is stopped; it is cancelled at the end of the test."""
    job = client.submit(ENDLESS_JOB)
    yield job
    with contextlib.suppress(Conflict):  # the test cancelled it
        client.cancel(job.id)
    client.wait(job.id, timeout_seconds=60)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Real text that every CPython contains, as a file with unique content for this test."""
    file = tmp_path / f"reference-{tmp_path.name}.txt"
    file.write_text(f"{tmp_path.name}\n\n" + "\n\n".join(topics.values()))
    return file
