"""One node of an attempt on several workers, stepped by the test: it reserves a port and waits for the others."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tests.harness.ports import free_loopback_port
from tests.harness.waiting import wait_until
from worker.attempt.attempt import LocalAttempt, Phase
from worker.attempt.resources import WorkerResources
from worker.attempt.run_file_signature import read_signed
from worker.machine.devices import Slot
from worker.machine.network import reserve_port, route_address
from worker.settings import WorkerSettings
from zeta_core.contract.wire.messages import ClaimAnswer, Dispatch, JournalAck, JournalBatch, Prepared
from zeta_core.contract.wire.node_group import NodeGroup
from zeta_core.contract.wire.run_directory import RunFile
from zeta_core.system.artifact_store.folder import FolderStore

GRANTED = ClaimAnswer(job_id="job_1", attempt=1, incarnation="i", granted=True)
ADDRESS = "127.0.0.3"


@pytest.fixture
def port() -> int:
    return free_loopback_port()


@pytest.fixture
def attempt(tmp_path: Path, port: int) -> Iterator[LocalAttempt]:
    """Node 1 of 2, after its claim was granted. Its program does not exist."""
    settings = WorkerSettings(
        home=tmp_path, worker_name="w", worker_secret="s", worker_address=ADDRESS, ports=f"{port}-{port}"
    )
    with ThreadPoolExecutor(1) as executor:
        store, command = FolderStore(settings.artifacts), (str(tmp_path / "none"),)
        resources = WorkerResources(settings, "i", store, executor, command, num_slots=1)
        message = Dispatch(job_id="job_1", attempt=1, worker="w", slots=[0], spec={}, num_nodes=2, node_rank=1)
        attempt = LocalAttempt.from_dispatch(resources, message, [Slot(0, "cpu", "cores", 1)])
        attempt.step()
        attempt.handle_answer(GRANTED)
        yield attempt


def prepared(attempt: LocalAttempt) -> Prepared:
    (message,) = wait_until(attempt.step, 60, "a message")
    assert isinstance(message, Prepared)
    return message


def last_line(attempt: LocalAttempt) -> dict[str, Any]:
    def lines() -> list[dict[str, Any]]:
        found: list[BaseModel] = attempt.step()
        return [line for message in found if isinstance(message, JournalBatch) for line in message.lines]

    return wait_until(lines, 60, "the last line")[-1]


def can_bind(port: int) -> bool:
    try:
        socket.create_server((ADDRESS, port)).close()
    except OSError:
        return False
    return True


def test_a_node_reports_its_port_until_the_others_are_prepared(attempt: LocalAttempt, port: int) -> None:
    message = prepared(attempt)
    assert (message.node_rank, message.address, message.port, message.incarnation) == (1, ADDRESS, port, "i")
    assert not can_bind(port)
    assert prepared(attempt) == message  # no answer yet
    group = NodeGroup(node_rank=1, addresses=["127.0.0.2", ADDRESS], port=port)
    attempt.start_node(group, "an earlier process")
    assert attempt.phase == Phase.PREPARED
    attempt.start_node(group, "i")
    assert can_bind(port)
    run_file = RunFile.model_validate_json(read_signed(attempt.directory))  # so that a restarted worker adopts the run
    assert (run_file.node_group, run_file.node_rank, run_file.is_opened) == (group, 1, True)
    assert last_line(attempt)["reason"] == "launch_failed"


def test_a_node_that_is_stopped_while_it_waits_hands_the_job_back(attempt: LocalAttempt, port: int) -> None:
    prepared(attempt)
    attempt.stop("hand_back")
    line = last_line(attempt)
    assert (line["status"], line["reason"], can_bind(port)) == ("queued", "handed_back", True)


def test_a_node_whose_attempt_is_over_publishes_nothing(attempt: LocalAttempt, port: int) -> None:
    prepared(attempt)
    attempt.acknowledge(JournalAck(job_id="job_1", attempt=1, stored_line=0, fenced=True))
    wait_until(lambda: attempt.step() == [] and attempt.is_over, 60, "its end")
    assert can_bind(port)


def test_a_node_without_a_free_port_names_the_setting(attempt: LocalAttempt, port: int) -> None:
    with socket.create_server((ADDRESS, port)):
        line = last_line(attempt)
    assert line["reason"] == "launch_failed"
    assert f"a free port of ZETA_PORTS ({port}-{port}) on {ADDRESS}" in line["message"]


def test_a_port_is_reserved_once_and_right_after_a_run_has_used_it(tmp_path: Path, port: int) -> None:
    settings = WorkerSettings(
        home=tmp_path, worker_name="w", worker_secret="s", worker_address=ADDRESS, ports=str(port)
    )
    with socket.create_server((ADDRESS, port)) as server, socket.create_connection((ADDRESS, port)) as client:
        server.accept()[0].close()
        client.recv(1)  # so that the port stays in TIME_WAIT for a minute
    reserved = reserve_port(settings)
    with pytest.raises(OSError, match="cannot bind a free port of ZETA_PORTS"):
        reserve_port(settings)
    reserved.release()
    reserve_port(settings).release()


def test_the_next_port_of_the_range_is_reserved_if_another_program_uses_the_first(tmp_path: Path, port: int) -> None:
    settings = WorkerSettings(
        home=tmp_path, worker_name="w", worker_secret="s", worker_address=ADDRESS, ports=f"{port}-{port + 1}"
    )
    with socket.create_server((ADDRESS, port)):
        reserved = reserve_port(settings)
    assert reserved.port == port + 1
    reserved.release()


def test_the_address_is_that_of_the_route_to_redis() -> None:
    assert route_address("redis://127.0.0.1:6379/0") == "127.0.0.1"
    assert route_address("unix:///run/redis.sock") == "127.0.0.1"
    assert route_address("rediss://[::1]:6379") == "::1"
