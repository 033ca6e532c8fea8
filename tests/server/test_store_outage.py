"""An artifact store that fails: requests report it, and no object of a deleted file or failed upload is forgotten."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server.artifacts import Artifacts, parts_key, stored_file_key
from server.database.availability import DatabaseUnavailable
from server.database.connections import Database
from server.database.file_tables import FileRow, UploadRow
from server.database.object_removals import (
    UPLOAD_AGE,
    ObjectRemovalRow,
    announce_upload,
    complete_upload,
    request_removal,
)
from server.uploads.expiry import remove_expired
from server.uploads.quota import OpenUploads
from server.uploads.removals import remove_due
from tests.harness.seaweedfs import SeaweedServer
from tests.harness.waiting import wait_until
from tests.server.rows import Rows
from tests.server.server_process import error_of, running_server
from zeta_core.contract.errors import Unavailable
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.wire.run_directory import checkpoint_key
from zeta_core.system.artifact_store.folder import FolderStore


def upload(http: httpx.Client, content: bytes) -> httpx.Response:
    return http.post("/v1/files", files={"file": ("a.txt", content)}, data={"purpose": "dataset"})


def require_storage_error(response: httpx.Response) -> None:
    assert (response.status_code, error_of(response)["code"]) == (503, "storage_unavailable"), response.text
    assert "127.0.0.1" not in response.text, "the address of the store is not the client's business"


@pytest.mark.extended
def test_a_folder_that_fails_is_an_error_and_its_files_are_removed_later(tmp_path: Path, redis_url: str) -> None:
    with running_server(tmp_path, redis_url) as server, server.http() as http:
        file_id = upload(http, b"some text").json()["id"]
        folder, away = tmp_path / "artifacts" / "files", tmp_path / "artifacts" / "away"
        folder.rename(away)
        folder.write_text("no folder")
        require_storage_error(http.get(f"/v1/files/{file_id}/content"))
        require_storage_error(upload(http, b"more text"))
        assert http.delete(f"/v1/files/{file_id}").json()["deleted"]
        assert http.get(f"/v1/files/{file_id}").status_code == 404
        folder.unlink()
        away.rename(folder)
        assert [path.name for path in folder.iterdir()] == [file_id]
        wait_until(lambda: not list(folder.iterdir()), 30, "the file to be removed")


@pytest.mark.extended
def test_an_outage_of_the_bucket_is_an_error_and_its_objects_are_removed_later(tmp_path: Path, redis_url: str) -> None:
    store = SeaweedServer(tmp_path / "seaweedfs")
    store.start()
    try:
        bucket = store.new_bucket()
        variables = {**store.environment(), "ZETA_ARTIFACTS_URL": f"s3://{bucket}"}
        with running_server(tmp_path / "home", redis_url, None, **variables) as server, server.http() as http:
            kept, deleted = (upload(http, content).json()["id"] for content in (b"kept", b"deleted"))
            store.kill()
            require_storage_error(http.get(f"/v1/files/{kept}/content"))
            require_storage_error(upload(http, b"more text"))
            assert http.delete(f"/v1/files/{deleted}").json()["deleted"]

            def is_reported() -> bool:
                return "loop removals" in http.get("/readyz").json()["parts"]

            wait_until(is_reported, 60, "the failing removals to be reported")
            store.start()
            expected = [f"files/{kept}", "service.json"]
            wait_until(lambda: store.keys(bucket) == expected, 60, "the object to be removed")
            assert http.get(f"/v1/files/{kept}/content").content == b"kept"
            assert upload(http, b"more text").status_code == 201
            wait_until(lambda: not is_reported(), 30, "the removals to recover")
    finally:
        store.stop()


@pytest.mark.anyio
async def test_a_file_whose_commit_only_seems_to_fail_keeps_its_bytes(database: Database, tmp_path: Path) -> None:
    """The connection to the database is lost after it has committed, and before it could confirm this."""
    artifacts = Artifacts(FolderStore(tmp_path / "store"))
    await asyncio.to_thread(artifacts.prepare)
    uploads = OpenUploads(database, artifacts)

    async def store(also: Callable[[AsyncSession], Awaitable[None]]) -> Path:
        row = FileRow(id=new_id("file"), project="default", created_by="test", filename="a.txt", bytes=4, sha256="")
        row.purpose, row.created_at = "dataset", utc_now()
        path = artifacts.root / stored_file_key(row.id)
        async with uploads.open("default", 4, quota_bytes=None) as opened:
            opened.incoming.write([memoryview(b"text")])
            with pytest.raises(DatabaseUnavailable):
                await uploads.store(opened, row, None, also)
        return path

    async def fail(session: AsyncSession) -> None:
        raise DatabaseUnavailable("the connection was lost")

    async def commit_and_fail(session: AsyncSession) -> None:
        await session.commit()
        await fail(session)

    assert not (await store(fail)).exists()
    assert (await store(commit_and_fail)).read_bytes() == b"text"


@pytest.mark.anyio
async def test_the_object_of_an_abandoned_upload_is_removed_and_that_of_a_new_one_stays(
    database: Database, tmp_path: Path
) -> None:
    artifacts = Artifacts(FolderStore(tmp_path / "store"))
    await asyncio.to_thread(artifacts.prepare)
    abandoned, new = (str(stored_file_key(new_id("file"))) for _ in range(2))
    async with database.write() as session:
        for key in (abandoned, new):
            announce_upload(session, key)
            (artifacts.root / key).write_text("stored, but a killed server has not added its row")
        await session.flush()
        old = await session.get_one(ObjectRemovalRow, abandoned)
        old.created_at = utc_now() - UPLOAD_AGE - timedelta(minutes=1)
    await remove_due(database, artifacts)
    assert not (artifacts.root / abandoned).exists()
    assert (artifacts.root / new).exists()
    async with database.write() as session:
        await complete_upload(session, new)
    with pytest.raises(Unavailable, match="took longer than a day"):
        async with database.write() as session:
            await complete_upload(session, abandoned)
    await remove_due(database, artifacts)
    assert (artifacts.root / new).exists()


@pytest.mark.anyio
async def test_an_object_that_cannot_be_removed_does_not_keep_later_ones(database: Database, tmp_path: Path) -> None:
    artifacts = Artifacts(FolderStore(tmp_path / "store"))
    await asyncio.to_thread(artifacts.prepare)
    stuck, later = (str(stored_file_key(new_id("file"))) for _ in range(2))
    for key in (stuck, later):
        (artifacts.root / key).write_text("deleted")
        async with database.write() as session:
            await request_removal(session, key)
    async with immutable(artifacts.root / stuck):
        for _ in range(2):
            with pytest.raises(OSError, match="not permitted"):
                await remove_due(database, artifacts)
        assert not (artifacts.root / later).exists()
    await remove_due(database, artifacts)
    assert not (artifacts.root / stuck).exists()


@pytest.mark.extended
def test_checkpoints_that_no_worker_could_remove_are_removed_after_the_end(tmp_path: Path, redis_url: str) -> None:
    with running_server(tmp_path, redis_url) as server:
        rows = Rows(server.settings)
        job_id = rows.job()
        rows.attempt(job_id)
        rows.checkpoint(job_id, "step-2", 2, {"weights": ("weights", b"w")})
        rows.checkpoint(job_id, "final", 3, {"weights": ("weights", b"w")})
        folder = tmp_path / "artifacts" / checkpoint_key(job_id, "")
        for name in ("step-1", ".step-3.partial"):
            (folder / name).mkdir()
            (folder / name / "weights").write_bytes(b"w")
        rows.end(job_id, JobStatus.SUCCEEDED)
        wait_until(lambda: sorted(path.name for path in folder.iterdir()) == ["final", "step-2"], 30, "the removals")


@asynccontextmanager
async def immutable(file: Path) -> AsyncGenerator[None]:
    """Let nobody remove the file until the block ends; skips the test where this is not possible."""
    if await (await asyncio.create_subprocess_exec("chattr", "+i", file, stderr=asyncio.subprocess.DEVNULL)).wait():
        pytest.skip("this user or file system can't make a file immutable")
    try:
        yield
    finally:
        await (await asyncio.create_subprocess_exec("chattr", "-i", file)).wait()


@pytest.mark.anyio
async def test_only_an_upload_that_is_still_expired_is_removed(database: Database, tmp_path: Path) -> None:
    artifacts = Artifacts(FolderStore(tmp_path / "store"))
    await asyncio.to_thread(artifacts.prepare)
    expired, renewed = new_id("upload"), new_id("upload")
    now = utc_now()
    fields = {"project": "p", "created_by": "k", "filename": "a", "bytes": 4, "purpose": "dataset", "status": "pending"}
    async with database.write() as session:
        for upload_id, minutes in ((expired, -1), (renewed, 1)):
            session.add(UploadRow(id=upload_id, created_at=now, expires_at=now + timedelta(minutes=minutes), **fields))
    for upload_id in (expired, renewed):
        part = artifacts.root / parts_key(upload_id) / "part"
        part.parent.mkdir(parents=True)
        part.write_text("text")
    await remove_expired(database, artifacts)
    assert not (artifacts.root / parts_key(expired)).exists()
    assert (artifacts.root / parts_key(renewed) / "part").exists()
    async with database.read() as session:
        assert list(await session.scalars(select(UploadRow.id))) == [renewed]
        assert list(await session.scalars(select(ObjectRemovalRow.key))) == []
