"""The state machine of one attempt, stepped by the test: stopping it before its run has started."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tests.harness.waiting import wait_until
from worker.attempt import preparation
from worker.attempt.attempt import LocalAttempt
from worker.attempt.resources import WorkerResources
from worker.machine.devices import Slot
from worker.settings import WorkerSettings
from zeta_core.contract.wire.messages import Claim, ClaimAnswer, Dispatch, JournalAck, JournalBatch
from zeta_core.contract.wire.run_directory import (
    LOG_FILE,
    MANIFEST_NAME,
    RunFile,
    checkpoint_key,
    log_key,
    run_directory,
)
from zeta_core.system.artifact_store.folder import FolderStore

GRANTED = ClaimAnswer(job_id="job_1", attempt=1, incarnation="i", granted=True)


@pytest.fixture
def gate() -> threading.Event:
    """Until it is set, the one thread that prepares runs is busy."""
    return threading.Event()


@pytest.fixture
def attempt(tmp_path: Path, gate: threading.Event) -> Iterator[LocalAttempt]:
    settings = WorkerSettings(home=tmp_path, worker_name="w", worker_secret="s")
    with ThreadPoolExecutor(1) as executor:
        executor.submit(gate.wait, 30)
        resources = WorkerResources(
            settings, "i", FolderStore(settings.artifacts), executor, (str(tmp_path / "none"),), num_slots=1
        )
        message = Dispatch(job_id="job_1", attempt=1, worker="w", slots=[0], spec={})
        yield LocalAttempt.from_dispatch(resources, message, [Slot(0, "cpu", "cores", 1)])
        gate.set()


def lines_of(messages: list[BaseModel]) -> list[dict[str, Any]]:
    return [line for message in messages if isinstance(message, JournalBatch) for line in message.lines]


def test_an_attempt_stopped_during_preparation_is_handed_back(attempt: LocalAttempt, gate: threading.Event) -> None:
    (claim,) = attempt.step()
    assert isinstance(claim, Claim)
    attempt.handle_answer(GRANTED)
    attempt.stop("hand_back")
    assert attempt.step() == []
    gate.set()
    (line,) = wait_until(lambda: lines_of(attempt.step()), 60, "the last line")
    assert (line["type"], line["status"], line["reason"]) == ("status", "queued", "handed_back")
    assert not (attempt.directory / "train.log").exists()
    attempt.acknowledge(JournalAck(job_id="job_1", attempt=1, stored_line=1))
    assert attempt.step() == []
    assert (attempt.is_over, (attempt.directory / "published").exists()) == (True, True)


def test_an_attempt_stopped_before_its_grant_ends_silently(attempt: LocalAttempt) -> None:
    attempt.step()
    attempt.stop("hand_back")
    assert attempt.is_over
    attempt.handle_answer(GRANTED)
    assert (attempt.is_over, attempt.step(), attempt.directory.exists()) == (True, [], False)


def test_a_program_that_cannot_be_started_is_a_failed_launch(attempt: LocalAttempt, gate: threading.Event) -> None:
    attempt.step()
    attempt.handle_answer(GRANTED)
    gate.set()
    lines = wait_until(lambda: lines_of(attempt.step()), 60, "the last line")
    assert RunFile.model_validate_json((attempt.directory / "run.json").read_bytes()).is_opened
    assert (lines[-1]["status"], lines[-1]["reason"]) == ("failed", "launch_failed")


@pytest.mark.parametrize("stopped_by", ["cancel", "fence"])
def test_stopping_an_attempt_cancels_a_fetch_from_a_hanging_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_by: str
) -> None:
    monkeypatch.setattr(preparation, "LEAVE_SECONDS", 0.1)
    settings = WorkerSettings(home=tmp_path, worker_name="w", worker_secret="s")
    store = FolderStore(settings.artifacts)
    checkpoint = store.local(checkpoint_key("job_2", "step-5"))
    checkpoint.mkdir(parents=True)
    manifest = checkpoint / MANIFEST_NAME
    os.mkfifo(manifest)  # reading it blocks, as on a file server that is down
    executor = ThreadPoolExecutor(1)
    try:
        resources = WorkerResources(settings, "i", store, executor, (str(tmp_path / "none"),), num_slots=1)
        message = Dispatch(job_id="job_2", attempt=2, worker="w", slots=[0], spec={}, resume_from="job_2/step-5")
        attempt = LocalAttempt.from_dispatch(resources, message, [Slot(0, "cpu", "cores", 1)])
        attempt.handle_answer(GRANTED)
        output = settings.root / "runs/job_2/output"
        wait_until(output.is_dir, 60, "the preparation to come to the store")
        if stopped_by == "cancel":
            attempt.stop("cancel")
            (line,) = wait_until(lambda: lines_of(attempt.step()), 60, "the last line")
            assert (line["status"], line["reason"]) == ("cancelled", "cancelled_by_user")
            attempt.acknowledge(JournalAck(job_id="job_2", attempt=2, stored_line=1))
        else:
            attempt.fence()
        wait_until(lambda: attempt.step() == [] and attempt.is_over, 60, "the end of the attempt")
    finally:
        writer = os.open(manifest, os.O_RDWR)
        manifest.unlink()
        os.close(writer)  # the file server responds again
        executor.shutdown()
    assert not (attempt.directory / "run.json").exists(), "the cancelled preparation continued"
    assert not output.exists()


@pytest.mark.parametrize("is_opened", [False, True])
def test_an_adopted_attempt_opens_its_store_folder_unless_the_job_was_deleted(tmp_path: Path, is_opened: bool) -> None:
    settings = WorkerSettings(home=tmp_path, worker_name="w", worker_secret="s")
    store = FolderStore(settings.artifacts)
    store.open_job("job_of_others")
    run_file = RunFile(
        job_id="job_3", attempt=1, spec={}, output_dir=str(tmp_path / "output"), artifacts_root=str(store.root)
    )
    stored = run_file.model_dump(exclude={"is_opened"}) | ({"is_opened": True} if is_opened else {})
    directory = settings.root / run_directory("job_3", 1)
    directory.mkdir(parents=True)
    (directory / LOG_FILE).write_text("one\n")
    with ThreadPoolExecutor(1) as executor:
        resources = WorkerResources(settings, "i", store, executor, (), num_slots=1)
        attempt = LocalAttempt.adopt(resources, RunFile.model_validate(stored), [Slot(0, "cpu", "cores", 1)])
        (line,) = wait_until(lambda: lines_of(attempt.step()), 60, "the last line")
    assert line["status"] == "failed"
    assert (store.root / log_key("job_3", 1)).exists() is not is_opened
    assert store.is_deleted("job_3") is is_opened
