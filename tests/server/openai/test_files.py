"""Files and uploads in parts under ``/openai/v1``, with the official client."""

import hashlib
import io
import sqlite3
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from openai import BadRequestError, ConflictError, NotFoundError, OpenAI, omit

from server.openai.uploads import MAX_PARTS
from tests.harness.model_archives import PICKLE, model_files, pack_tar, safetensors_file
from tests.harness.openai_client import strictly
from tests.server.openai.data import conversations, upload
from tests.server.rows import Rows
from tests.server.server_process import ServerProcess
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.job.status import JobStatus

CONTENT = conversations()


def test_a_file_is_uploaded_read_and_deleted(client: OpenAI) -> None:
    file = strictly(client.files.create(file=("train.jsonl", CONTENT), purpose="fine-tune"))
    assert (file.filename, file.bytes, file.purpose, file.status) == (
        "train.jsonl",
        len(CONTENT),
        "fine-tune",
        "processed",
    )
    assert strictly(client.files.retrieve(file.id)) == file
    assert client.files.wait_for_processing(file.id) == file
    assert client.files.content(file.id).read() == CONTENT
    partial = client.files.with_raw_response.content(file.id, extra_headers={"Range": "bytes=5-14"})
    assert (partial.http_response.status_code, partial.content) == (206, CONTENT[5:15])
    assert strictly(client.files.delete(file.id)).deleted
    with pytest.raises(NotFoundError):
        client.files.retrieve(file.id)


def test_bytes_without_a_name_are_json_lines(client: OpenAI) -> None:
    assert client.files.create(file=CONTENT, purpose="fine-tune").filename == "upload.jsonl"
    assert client.files.create(file=io.BytesIO(CONTENT), purpose="fine-tune").filename == "upload.jsonl"


def test_a_file_of_another_purpose_or_format_is_rejected(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="purpose is 'assistants'; it must be 'fine-tune'"):
        client.files.create(file=("train.jsonl", CONTENT), purpose="assistants")
    with pytest.raises(BadRequestError, match="is not a supported dataset format"):
        client.files.create(file=("train.exe", CONTENT), purpose="fine-tune")
    with pytest.raises(BadRequestError, match="is not a known field"):
        client.files.create(
            file=("train.jsonl", CONTENT),
            purpose="fine-tune",
            expires_after={"anchor": "created_at", "seconds": 3600},
        )


def test_files_are_listed_in_pages_in_both_orders(client: OpenAI) -> None:
    ids = [upload(client, name=f"{number}.jsonl") for number in range(5)]
    newest = [strictly(file).id for file in client.files.list(purpose="fine-tune", limit=2)]
    assert newest[:5] == ids[::-1]
    oldest = [file.id for file in client.files.list(purpose="fine-tune", limit=2, order="asc")]
    assert oldest == newest[::-1]
    page = client.files.list(purpose="fine-tune", limit=2)
    assert page.has_more
    assert [file.id for file in page.data] == ids[:2:-1]
    assert [file.id for file in client.files.list(purpose="vision")] == []
    with pytest.raises(BadRequestError, match="is not the id of a file"):
        client.files.list(after="file-1")


def test_a_file_in_use_is_not_deleted(client: OpenAI, rows: Rows) -> None:
    file_id = upload(client)
    client.fine_tuning.jobs.create(model="org/small", training_file=file_id)
    with pytest.raises(ConflictError, match="is in use by") as caught:
        client.files.delete(file_id)
    assert caught.value.response.headers["x-should-retry"] == "false"


# --- Result files -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ended(rows: Rows) -> str:
    """A job that has succeeded, with metrics and a final checkpoint."""
    job_id = rows.job()
    progress = [
        {"phase": "training", "step": 1, "loss": 2.0, "token_accuracy": 0.25},
        {"phase": "training", "step": 2, "loss": 1.0, "token_accuracy": 0.5},
        {"phase": "evaluating", "step": 2, "eval_loss": 1.5, "eval_token_accuracy": 0.375},
    ]
    rows.attempt(job_id, progress=progress, to=JobStatus.SUCCEEDED)
    rows.checkpoint(job_id, "final", 2, {"model.safetensors": ("weights", b"weights" * 100)})
    return job_id


def test_an_ended_job_has_its_metrics_and_weights_as_files(client: OpenAI, ended: str) -> None:
    job = client.fine_tuning.jobs.retrieve(ended)
    metrics_id, model_id = job.result_files
    metrics, model = [strictly(client.files.retrieve(file_id)) for file_id in job.result_files]
    assert (metrics.purpose, metrics.filename) == ("fine-tune-results", f"{ended}-metrics.csv")
    text = client.files.content(metrics_id).text
    assert len(text) == metrics.bytes
    header, first, second = text.splitlines()
    assert header.startswith("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,learning_rate")
    assert first.startswith("1,2.0,0.25,,,")
    assert second.startswith("2,1.0,0.5,1.5,0.375,")
    archive = client.files.content(model_id).read()
    assert (model.filename, model.bytes) == (f"{ended}-final.tar", len(archive))
    assert archive[257:262] == b"ustar"
    partial = client.files.with_raw_response.content(model_id, extra_headers={"Range": "bytes=512-520"})
    assert partial.content == archive[512:521]


def test_result_files_follow_the_uploaded_files_in_lists(client: OpenAI, ended: str) -> None:
    upload(client)
    results = client.fine_tuning.jobs.retrieve(ended).result_files
    listed = [strictly(file).id for file in client.files.list(purpose="fine-tune-results", limit=1)]
    assert listed == results
    everything = [file.id for file in client.files.list(limit=3)]
    assert everything[-2:] == results
    assert len(everything) == len(set(everything)) > 3
    assert [file.id for file in client.files.list(limit=2, order="asc")][-2:] == results


def test_a_result_file_is_deleted_with_its_job(client: OpenAI, ended: str) -> None:
    (file_id, _) = client.fine_tuning.jobs.retrieve(ended).result_files
    with pytest.raises(BadRequestError, match=f"is a result of {ended} and is deleted with it"):
        client.files.delete(file_id)
    with pytest.raises(NotFoundError):
        client.files.content("file-metrics-00000000000000000000")


def test_a_running_job_and_other_projects_have_no_result_files(client: OpenAI, rows: Rows) -> None:
    running, other = rows.job(), rows.job(project="other")
    rows.attempt(running)
    rows.attempt(other, to=JobStatus.SUCCEEDED)
    for job_id in (running, other):
        with pytest.raises(NotFoundError):
            client.files.retrieve(f"file-metrics-{job_id.removeprefix('job_')}")
    assert client.fine_tuning.jobs.retrieve(running).result_files == []


# --- Uploads in parts -------------------------------------------------------------------------------------------------


def test_a_file_is_uploaded_in_parts(client: OpenAI, server: ServerProcess) -> None:
    upload = strictly(
        client.uploads.create(bytes=len(CONTENT), filename="big.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    )
    assert (upload.status, upload.expires_at - upload.created_at) == ("pending", 3600)
    halves = CONTENT[:100], CONTENT[100:]
    second, first = [strictly(client.uploads.parts.create(upload.id, data=half)) for half in halves[::-1]]
    digest = hashlib.md5(CONTENT).hexdigest()
    completed = strictly(client.uploads.complete(upload.id, part_ids=[first.id, second.id], md5=digest))
    assert completed.status == "completed"
    assert completed.file is not None
    assert (completed.file.filename, completed.file.bytes) == ("big.jsonl", len(CONTENT))
    assert client.files.content(completed.file.id).read() == CONTENT
    assert not (server.settings.artifacts / "uploads" / upload.id).exists()
    with pytest.raises(ConflictError, match="is completed"):
        client.uploads.parts.create(upload.id, data=b"more")


def test_the_helper_for_large_files_works(client: OpenAI, tmp_path: object) -> None:
    upload = client.uploads.upload_file_chunked(
        file=CONTENT,
        filename="big.jsonl",
        bytes=len(CONTENT),
        mime_type="text/jsonl",
        purpose="fine-tune",
        part_size=64,
    )
    assert upload.file is not None
    assert client.files.content(upload.file.id).read() == CONTENT


def test_a_model_is_uploaded_in_parts_and_checked(client: OpenAI) -> None:
    safe, pickled = (
        pack_tar(model_files(model__safetensors=safetensors_file())),
        pack_tar(model_files(pytorch_model__bin=PICKLE)),
    )
    for content, name in ((safe, "safe.tar"), (pickled, "pickled.tar")):
        upload = client.uploads.create(
            bytes=len(content), filename=name, mime_type="application/x-tar", purpose="user_data"
        )
        parts = [client.uploads.parts.create(upload.id, data=half).id for half in (content[:999], content[999:])]
        if name == "safe.tar":
            assert strictly(client.uploads.complete(upload.id, part_ids=parts)).status == "completed"
        else:
            with pytest.raises(BadRequestError, match=r"pytorch_model\.bin"):
                client.uploads.complete(upload.id, part_ids=parts)


def test_a_part_extends_the_life_of_its_upload(client: OpenAI, server: ServerProcess) -> None:
    upload = client.uploads.create(bytes=3, filename="a.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    soon = (datetime.now(UTC) + timedelta(seconds=30)).strftime("%Y-%m-%d %H:%M:%S.%f")
    with sqlite3.connect(server.home / "zeta.db") as database:
        database.execute("UPDATE uploads SET expires_at = ? WHERE id = ?", (soon, upload.id))
        database.commit()
        client.uploads.parts.create(upload.id, data=b'"a"')
        (expires,) = database.execute("SELECT expires_at FROM uploads WHERE id = ?", (upload.id,)).fetchone()
    assert expires > soon


def test_an_upload_has_a_limited_number_of_parts_and_all_can_be_completed(
    client: OpenAI, server: ServerProcess
) -> None:
    """Parts of a byte would otherwise fill the disk with files, within every quota of bytes."""
    upload = client.uploads.create(bytes=MAX_PARTS, filename="a.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    first = client.uploads.parts.create(upload.id, data=b"1")
    with sqlite3.connect(server.home / "zeta.db") as database:
        names = "id, upload_id, project, bytes, created_at"
        copied = f"SELECT ?, {names.partition(', ')[2]} FROM upload_parts WHERE id = ?"
        rows = [(new_id("part"), first.id) for _ in range(MAX_PARTS - 1)]
        database.executemany(f"INSERT INTO upload_parts ({names}) {copied}", rows)
    with pytest.raises(BadRequestError, match="has 10,000 parts, the limit"):
        client.uploads.parts.create(upload.id, data=b"2")
    parts = server.settings.artifacts / "uploads" / upload.id
    assert [file.name for file in parts.iterdir()] == [first.id]
    for part_id, _ in rows:
        (parts / part_id).hardlink_to(parts / first.id)
    completed = client.uploads.complete(upload.id, part_ids=[first.id, *(part_id for part_id, _ in rows)])
    assert completed.file is not None
    assert client.files.content(completed.file.id).read() == b"1" * MAX_PARTS


def test_an_upload_is_cancelled(client: OpenAI, server: ServerProcess) -> None:
    upload = client.uploads.create(bytes=9, filename="a.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    client.uploads.parts.create(upload.id, data=b"123")
    assert strictly(client.uploads.cancel(upload.id)).status == "cancelled"
    assert not (server.settings.artifacts / "uploads" / upload.id).exists()
    with pytest.raises(ConflictError, match="is cancelled"):
        client.uploads.complete(upload.id, part_ids=["part_1"])


def test_an_invalid_completion_is_rejected_and_can_be_repeated(client: OpenAI) -> None:
    upload = client.uploads.create(bytes=len(CONTENT), filename="a.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    part = client.uploads.parts.create(upload.id, data=CONTENT)
    for part_ids, md5, message in (
        ([part.id, "part_1"], omit, "is not a part of this upload"),
        ([part.id, part.id], omit, "is listed twice"),
        ([part.id], "0" * 32, "md5 is"),
    ):
        with pytest.raises(BadRequestError, match=message):
            client.uploads.complete(upload.id, part_ids=part_ids, md5=md5)
    assert client.uploads.complete(upload.id, part_ids=[part.id]).status == "completed"


def test_a_completion_whose_response_was_lost_is_repeated(client: OpenAI, http: httpx.Client) -> None:
    upload = client.uploads.create(bytes=len(CONTENT), filename="a.jsonl", mime_type="a/b", purpose="fine-tune")
    part = client.uploads.parts.create(upload.id, data=CONTENT)
    first = client.uploads.complete(upload.id, part_ids=[part.id])
    retry = client.uploads.complete(upload.id, part_ids=[part.id], extra_headers={"x-stainless-retry-count": "1"})
    assert first.file is not None
    assert retry.file == first.file
    with pytest.raises(ConflictError):
        client.uploads.complete(upload.id, part_ids=[part.id])


def test_a_size_that_differs_from_the_announced_one_is_rejected(client: OpenAI) -> None:
    upload = client.uploads.create(bytes=10, filename="a.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    part = client.uploads.parts.create(upload.id, data=b"123")
    with pytest.raises(BadRequestError, match="have 3 bytes in total, but the upload was created for 10"):
        client.uploads.complete(upload.id, part_ids=[part.id])


def test_an_expired_upload_accepts_no_part(client: OpenAI, server: ServerProcess) -> None:
    upload = client.uploads.create(bytes=3, filename="a.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    with sqlite3.connect(server.home / "zeta.db") as database:
        database.execute("UPDATE uploads SET expires_at = '2020-01-01 00:00:00' WHERE id = ?", (upload.id,))
    with pytest.raises(ConflictError, match="is expired"):
        client.uploads.parts.create(upload.id, data=b"123")


def test_an_invalid_upload_is_rejected_before_its_bytes_are_sent(client: OpenAI) -> None:
    for filename, purpose, message in (
        ("a.exe", "fine-tune", "is not a supported dataset format"),
        ("a.jsonl", "vision", "it must be 'fine-tune'"),
    ):
        with pytest.raises(BadRequestError, match=message):
            client.uploads.create(bytes=3, filename=filename, mime_type="text/jsonl", purpose=purpose)  # type: ignore[arg-type]
    with pytest.raises(NotFoundError):
        client.uploads.parts.create("upload_00000000000000000000", data=b"1")
