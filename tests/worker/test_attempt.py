"""The state machine of one attempt, stepped by the test: what happens when it is stopped before it has begun."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tests.harness.waiting import wait_until
from worker.artifacts.store import ArtifactStore
from worker.attempt import preparation
from worker.attempt.run import Place, Run
from worker.machine.devices import Slot
from worker.settings import WorkerSettings
from zeta_core.contract.wire.messages import Claim, ClaimAnswer, HandOver, JournalAck, JournalBatch
from zeta_core.contract.wire.run_directory import LOG_FILE, MANIFEST_NAME, RunFile, log_key, run_directory

GRANTED = ClaimAnswer(job_id="job_1", attempt=1, incarnation="i", granted=True)


@pytest.fixture
def gate() -> threading.Event:
    """Until it is set, the one thread that prepares runs is busy."""
    return threading.Event()


@pytest.fixture
def run(tmp_path: Path, gate: threading.Event) -> Iterator[Run]:
    settings = WorkerSettings(home=tmp_path, worker_name="w", worker_secret="s")
    with ThreadPoolExecutor(1) as executor:
        executor.submit(gate.wait, 30)
        place = Place(
            settings, "i", ArtifactStore(settings.artifacts), executor, (str(tmp_path / "none"),), num_slots=1
        )
        message = HandOver(job_id="job_1", attempt=1, worker="w", slots=[0], spec={})
        yield Run.handed_over(place, message, [Slot(0, "cpu", "cores", 1)])
        gate.set()


def lines_of(messages: list[BaseModel]) -> list[dict[str, Any]]:
    return [line for message in messages if isinstance(message, JournalBatch) for line in message.lines]


def test_a_run_stopped_while_it_is_prepared_starts_nothing_and_is_handed_back(run: Run, gate: threading.Event) -> None:
    (claim,) = run.step()
    assert isinstance(claim, Claim)
    run.answered(GRANTED)
    run.stop("hand_back")
    assert run.step() == []
    gate.set()
    (line,) = wait_until(lambda: lines_of(run.step()), 60, "the last line")
    assert (line["type"], line["status"], line["reason"]) == ("status", "queued", "handed_back")
    assert not (run.directory / "train.log").exists()
    run.acknowledged(JournalAck(job_id="job_1", attempt=1, stored_line=1))
    assert run.step() == []
    assert (run.is_over, (run.directory / "published").exists()) == (True, True)


def test_a_run_stopped_before_it_was_granted_is_simply_left(run: Run) -> None:
    run.step()
    run.stop("hand_back")
    assert run.is_over
    run.answered(GRANTED)
    assert (run.is_over, run.step(), run.directory.exists()) == (True, [], False)


def test_a_program_that_cannot_be_started_is_a_failed_launch(run: Run, gate: threading.Event) -> None:
    run.step()
    run.answered(GRANTED)
    gate.set()
    lines = wait_until(lambda: lines_of(run.step()), 60, "the last line")
    assert RunFile.model_validate_json((run.directory / "run.json").read_bytes()).is_opened
    assert (lines[-1]["status"], lines[-1]["reason"]) == ("failed", "launch_failed")


@pytest.mark.parametrize("order", ["cancel", "fence"])
def test_what_is_fetched_from_a_store_that_hangs_is_given_up_when_the_attempt_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    monkeypatch.setattr(preparation, "LEAVE_SECONDS", 0.1)
    settings = WorkerSettings(home=tmp_path, worker_name="w", worker_secret="s")
    store = ArtifactStore(settings.artifacts)
    checkpoint = store.checkpoint("job_2", "step-5")
    checkpoint.mkdir(parents=True)
    manifest = checkpoint / MANIFEST_NAME
    os.mkfifo(manifest)  # who reads it waits, as for a file server that is away
    executor = ThreadPoolExecutor(1)
    try:
        place = Place(settings, "i", store, executor, (str(tmp_path / "none"),), num_slots=1)
        message = HandOver(job_id="job_2", attempt=2, worker="w", slots=[0], spec={}, resume_from="job_2/step-5")
        run = Run.handed_over(place, message, [Slot(0, "cpu", "cores", 1)])
        run.answered(GRANTED)
        output = settings.root / "runs/job_2/output"
        wait_until(output.is_dir, 60, "the preparation to come to the store")
        if order == "cancel":
            run.stop("cancel")
            (line,) = wait_until(lambda: lines_of(run.step()), 60, "the last line")
            assert (line["status"], line["reason"]) == ("cancelled", "cancelled_by_user")
            run.acknowledged(JournalAck(job_id="job_2", attempt=2, stored_line=1))
        else:
            run.fence()
        wait_until(lambda: run.step() == [] and run.is_over, 60, "the end of the attempt")
    finally:
        writer = os.open(manifest, os.O_RDWR)
        manifest.unlink()
        os.close(writer)  # the file server is back
        executor.shutdown()
    assert not (run.directory / "run.json").exists(), "it went on with what nobody wanted any more"
    assert not output.exists()


@pytest.mark.parametrize("is_opened", [False, True])
def test_an_attempt_of_an_older_worker_gets_its_folder_in_the_store_and_one_whose_job_was_deleted_does_not(
    tmp_path: Path, is_opened: bool
) -> None:
    settings = WorkerSettings(home=tmp_path, worker_name="w", worker_secret="s")
    store = ArtifactStore(settings.artifacts)
    store.open_job("job_of_others")
    order = RunFile(
        job_id="job_3", attempt=1, spec={}, output_dir=str(tmp_path / "output"), artifacts_root=str(store.root)
    )
    told = order.model_dump(exclude={"is_opened"}) | ({"is_opened": True} if is_opened else {})
    directory = settings.root / run_directory("job_3", 1)
    directory.mkdir(parents=True)
    (directory / LOG_FILE).write_text("one\n")
    with ThreadPoolExecutor(1) as executor:
        place = Place(settings, "i", store, executor, (), num_slots=1)
        run = Run.found(place, RunFile.model_validate(told), [Slot(0, "cpu", "cores", 1)])
        (line,) = wait_until(lambda: lines_of(run.step()), 60, "the last line")
    assert line["status"] == "failed"
    assert (store.root / log_key("job_3", 1)).exists() is not is_opened
    assert store.is_deleted("job_3") is is_opened
