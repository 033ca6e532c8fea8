"""The client against the real service."""

import asyncio
import hashlib
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest

from tests.harness.service import Service
from tests.zeta.conftest import TINY_JOB
from zeta.async_client import AsyncClient
from zeta.client import Client
from zeta.download import DownloadProgress
from zeta.errors import Unreachable
from zeta.event_stream import WaitTimeout
from zeta.up.home import Home
from zeta_core.contract.errors import AuthenticationFailed, Conflict, InvalidRequest, InvalidSpec, NotFound
from zeta_core.contract.job.events import Event, ProgressEvent, StatusEvent, UntypedEvent
from zeta_core.contract.job.job import Job
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.validation import parse

pytestmark = pytest.mark.timeout(300)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def kill_child(service: Service, name: str) -> None:
    """Send SIGKILL to one process of `zeta up`."""
    state = Home(service.home).read_state()
    assert state is not None
    os.kill(state.children[name], signal.SIGKILL)


# --- Jobs -------------------------------------------------------------------------------------------------------------


def test_a_submission_repeated_with_its_key_creates_one_job(client: Client) -> None:
    key = str(uuid4())
    spec = {**TINY_JOB, "max_steps": 1, "metadata": {"test": key}}
    first, second = client.submit(spec, idempotency_key=key), client.submit(spec, idempotency_key=key)
    assert first.id == second.id
    assert [job.id for job in client.jobs(metadata={"test": key})] == [first.id]
    with pytest.raises(InvalidRequest) as caught:
        client.submit({**spec, "seed": 8}, idempotency_key=key)
    assert caught.value.code == "idempotency_key_reused"
    assert client.submit(spec).id != first.id
    for job in client.jobs(metadata={"test": key}):
        client.cancel(job.id)


def test_a_job_spec_is_sent_without_defaults(client: Client) -> None:
    given = {**TINY_JOB, "max_steps": 1, "learning_rate": 1e-3}
    job = client.submit(parse(JobSpec, given))
    assert job.spec == given
    client.cancel(job.id)


def test_every_invalid_field_of_a_spec_is_reported(client: Client) -> None:
    with pytest.raises(InvalidSpec) as caught:
        client.submit({**TINY_JOB, "batch_size": -1, "num_train_epochs": 3})
    details = {detail.param: detail for detail in caught.value.details}
    assert set(details) == {"batch_size", "num_train_epochs"}
    assert details["num_train_epochs"].suggestion == "epochs"
    assert "-1" in details["batch_size"].message


def test_values_that_json_cannot_represent_are_rejected_before_sending(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="JSON"):
        client.submit({**TINY_JOB, "learning_rate": float("nan")})
    with pytest.raises(InvalidRequest, match="JSON"):
        client.submit({**TINY_JOB, "metadata": {"path": Path("x")}})


def test_error_responses_raise_errors_of_the_contract(service: Service, client: Client) -> None:
    with pytest.raises(NotFound):
        client.job("job_00000000000000000000aaaa")
    with pytest.raises(InvalidRequest):
        client.job("../files")
    with Client(service.url, "wrong-key") as unauthorized, pytest.raises(AuthenticationFailed):
        unauthorized.jobs()


def test_a_missing_server_is_reported_after_the_requested_patience() -> None:
    with (
        Client("http://127.0.0.1:1", "key", patience_seconds=0.2) as client,
        pytest.raises(Unreachable, match="zeta up"),
    ):
        client.jobs()


def test_lists_are_read_over_several_pages(client: Client, finished_job: Job) -> None:
    for _ in range(2):
        client.cancel(client.submit({**TINY_JOB, "entity_name": "pages"}).id)
    every = client.jobs(limit=None)
    assert [job.id for job in every] == sorted((job.id for job in every), reverse=True)
    assert finished_job.id in [job.id for job in every]
    assert [job.id for job in client.jobs(limit=2)] == [job.id for job in every[:2]]
    assert {job.entity_name for job in client.jobs(entity_name="pages", limit=None)} == {"pages"}
    assert all(job.status == "succeeded" for job in client.jobs(status="succeeded", limit=None))


def test_live_and_stored_events_are_equal_from_any_position(client: Client, finished_job: Job) -> None:
    live = list(client.events(finished_job.id))
    assert [event.seq for event in live] == list(range(1, len(live) + 1))
    assert live == client.stored_events(finished_job.id)
    assert list(client.events(finished_job.id, after=3)) == live[3:]
    assert client.stored_events(finished_job.id, after=2, limit=2) == live[2:4]
    assert list(client.events(finished_job.id, after=len(live))) == []


def test_every_event_of_this_version_is_typed(client: Client, finished_job: Job) -> None:
    events = client.stored_events(finished_job.id)
    assert [event for event in events if isinstance(event, UntypedEvent)] == []
    assert any(isinstance(event, ProgressEvent) and event.loss for event in events)
    assert isinstance(events[-1], StatusEvent)
    assert (events[-1].status, events[-1].reason) == ("succeeded", "completed")


def test_logs_contain_the_output_of_the_processes(client: Client, finished_job: Job) -> None:
    whole = "".join(client.logs(finished_job.id))
    assert whole
    assert "".join(client.logs(finished_job.id, follow=True)) == whole
    mark, *lines = whole.splitlines()
    assert len(lines) > 1
    assert "".join(client.logs(finished_job.id, tail=1)).splitlines() == [mark, lines[-1]]


async def seqs_of_events(service: Service, job_id: str, first_arrived: threading.Event) -> list[int]:
    seqs: list[int] = []
    async with AsyncClient(service.url, service.api_key) as client:
        job = await client.job(job_id)
        async for event in job.events(timeout_seconds=200):
            seqs.append(event.seq)
            first_arrived.set()
    return seqs


@pytest.mark.extended
def test_a_job_is_followed_while_the_server_is_killed_and_restarted(
    service: Service, client: Client, endless_job: Job
) -> None:
    with pytest.raises(WaitTimeout):
        client.wait(endless_job.id, timeout_seconds=0.5)
    seen: list[Event] = []
    interruptions: list[str] = []
    killed = False
    task_follows = threading.Event()
    followed_by_task = ThreadPoolExecutor(1).submit(asyncio.run, seqs_of_events(service, endless_job.id, task_follows))
    assert task_follows.wait(100)
    for event in client.events(
        endless_job.id, timeout_seconds=200, on_interruption=lambda error: interruptions.append(error.message)
    ):
        seen.append(event)
        if isinstance(event, ProgressEvent) and event.step and not killed:
            kill_child(service, "server")
            killed = True
            # Submitted while the server is down: the request is retried, and creates only one job.
            mark = str(uuid4())
            with Client(service.url, service.api_key, patience_seconds=60) as patient:
                patient.cancel(patient.submit({**TINY_JOB, "metadata": {"mark": mark}}).id)
                assert len(patient.jobs(metadata={"mark": mark})) == 1
            client.cancel(endless_job.id)
    assert killed
    assert interruptions
    assert [event.seq for event in seen] == list(range(1, len(seen) + 1))
    assert seen == client.stored_events(endless_job.id)
    assert followed_by_task.result(timeout=100) == [event.seq for event in seen], "the asyncio client reconnects, too"
    assert client.job(endless_job.id).status == "cancelled"


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_downloaded_completely_and_verified(client: Client, finished_job: Job, tmp_path: Path) -> None:
    progress: list[int] = []
    done = client.download(
        finished_job.id, directory=tmp_path / "final", on_progress=lambda now: progress.append(now.bytes)
    )
    assert done.manifest.name == "final"
    for file in done.files:
        assert sha256(done.directory / file.path) == file.sha256
    names = {path.name for path in done.directory.iterdir()}
    assert {"config.json", "model.safetensors", "manifest.json"} <= names
    assert not any(name.endswith(".part") for name in names)
    assert not (done.directory / "training_state").exists()
    assert progress[-1] == sum(file.size for file in done.files)


def test_training_state_is_optional_and_globs_select_files(client: Client, finished_job: Job, tmp_path: Path) -> None:
    whole = client.download(finished_job.id, "latest", tmp_path / "whole", state=True)
    assert any(file.role == "state" for file in whole.files)
    assert [
        file.path for file in client.download(finished_job.id, directory=tmp_path / "some", include=["*.json"]).files
    ]
    assert not (tmp_path / "some" / "model.safetensors").exists()
    with pytest.raises(NotFound, match=r"model\.safetensors"):
        client.download(finished_job.id, directory=tmp_path / "none", include=["*.gguf"])


@pytest.mark.parametrize("damage", ["half", "wrong", "too long"])
def test_an_interrupted_download_is_completed(client: Client, finished_job: Job, tmp_path: Path, damage: str) -> None:
    whole = client.download(finished_job.id, directory=tmp_path / "whole")
    weights = (whole.directory / "model.safetensors").read_bytes()
    part = tmp_path / "again" / "model.safetensors.part"
    part.parent.mkdir()
    half = weights[: len(weights) // 2]
    part.write_bytes({"half": half, "wrong": b"x" * len(half), "too long": weights + b"x"}[damage])
    progress: list[int] = []

    def record(now: DownloadProgress) -> None:
        if now.file == "model.safetensors":
            progress.append(now.bytes)

    client.download(finished_job.id, directory=part.parent, include=["model.safetensors"], on_progress=record)
    assert (part.parent / "model.safetensors").read_bytes() == weights
    assert not part.exists()
    if damage == "half":
        assert progress[0] > len(half)  # the existing part was not fetched again


def test_existing_files_are_not_fetched_again_or_overwritten(client: Client, finished_job: Job, tmp_path: Path) -> None:
    done = client.download(finished_job.id, directory=tmp_path)
    weights = tmp_path / "model.safetensors"
    before = weights.stat().st_mtime_ns
    client.download(finished_job.id, directory=tmp_path)
    assert weights.stat().st_mtime_ns == before
    (tmp_path / "config.json").write_text("my own")
    with pytest.raises(Conflict, match=r"config\.json"):
        client.download(finished_job.id, directory=tmp_path)
    assert (tmp_path / "config.json").read_text() == "my own"
    client.download(finished_job.id, directory=tmp_path, overwrite=True)
    expected = next(file.sha256 for file in done.files if file.path == "config.json")
    assert sha256(tmp_path / "config.json") == expected


def test_nothing_is_written_through_a_link_that_leaves_the_folder(
    client: Client, finished_job: Job, tmp_path: Path
) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (inside / "training_state").symlink_to(outside)
    with pytest.raises(InvalidRequest, match="training_state"):
        client.download(finished_job.id, "latest", inside, state=True)
    assert list(outside.iterdir()) == []
    assert [path.name for path in inside.iterdir()] == ["training_state"]


# --- Files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_uploaded_once_for_each_purpose(client: Client, text_file: Path) -> None:
    sent: list[tuple[int, int]] = []
    stored = client.upload(text_file, on_bytes=lambda done, total: sent.append((done, total)))
    size = text_file.stat().st_size
    assert (stored.filename, stored.bytes, stored.sha256) == (text_file.name, size, sha256(text_file))
    assert sent[-1] == (size, size)
    sent.clear()
    copy = text_file.with_name("other-name.txt")
    copy.write_bytes(text_file.read_bytes())
    assert client.upload(copy, on_bytes=lambda done, total: sent.append((done, total))).id == stored.id
    assert sent == []
    assert [file.id for file in client.files(sha256=stored.sha256)] == [stored.id]


def test_files_that_cannot_be_uploaded_are_rejected_with_their_path(client: Client, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    for path, expected in (
        (tmp_path, "folder"),
        (tmp_path / "missing.txt", "No such file"),
        (tmp_path / "empty.txt", "empty"),
    ):
        with pytest.raises(InvalidRequest, match=expected):
            client.upload(path)


def test_workers_are_listed_with_their_slots(client: Client) -> None:
    (worker,) = client.workers()
    assert worker.status == "ready"
    assert worker.slots[0].kind == "cpu"


@pytest.mark.extended
def test_the_client_accepts_specs_and_ids_as_the_command_line_does(
    client: Client, finished_job: Job, text_file: Path
) -> None:
    messages: list[str] = []
    spec = {**TINY_JOB, "model": f"{finished_job.id[:-3]}/step-8", "dataset": text_file, "max_steps": 1}
    job = client.submit(spec, on_upload=messages.append)
    assert job.spec["model"] == {"job": finished_job.id, "checkpoint": "step-8"}
    assert job.spec["dataset"] == {"file": client.upload(text_file).id}
    assert [text_file.name in sentence for sentence in messages] == [True]
    assert client.validate({**TINY_JOB, "dataset": "python-docs"}).object == client.validate(TINY_JOB).object
    assert client.job("@last").id == job.id
    assert client.wait("@last", timeout_seconds=240).id == job.id
    short = finished_job.id.removeprefix("job_")[:-2]
    assert client.stored_events(short) == client.stored_events(finished_job.id)
    assert "".join(client.logs(short)) == "".join(client.logs(finished_job.id))
    assert client.checkpoint(short, "step-8") == client.checkpoint(finished_job.id, "step-8")
    for unknown in ("nothing", "job_zzzz"):
        with pytest.raises(NotFound, match="No job id starts with"):
            client.cancel(unknown)
    with pytest.raises(InvalidRequest):
        client.job("../workers")
