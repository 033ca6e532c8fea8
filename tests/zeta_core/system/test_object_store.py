"""The artifact store in a bucket of a real S3 server."""

import hashlib
import os
import signal
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from server.artifacts import Artifacts
from tests.harness.children import start_child
from tests.harness.seaweedfs import SeaweedServer
from tests.harness.waiting import wait_until
from zeta_core.contract.errors import InvalidSettings
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.job.checkpoint import Manifest, ManifestFile
from zeta_core.contract.wire.run_directory import checkpoint_key, file_key
from zeta_core.system.artifact_location import BucketLocation
from zeta_core.system.artifact_store import BrokenCheckpoint
from zeta_core.system.artifact_store.bucket import BucketStore
from zeta_core.system.artifact_store.object_upload import PART_BYTES, ObjectUpload, unfinished_uploads
from zeta_core.system.artifact_store.s3_client import open_client

JOB = "job_01k00000000000000000000000"


@pytest.fixture
def bucket(object_store: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in object_store.environment().items():
        monkeypatch.setenv(name, value)
    return object_store.new_bucket()


@pytest.fixture
def store(bucket: str, tmp_path: Path) -> BucketStore:
    return BucketStore(tmp_path / "copies", BucketLocation(bucket, "zeta/"))


def write_checkpoint(folder: Path, name: str, step: int, **contents: bytes) -> Path:
    directory = folder / name
    directory.mkdir(parents=True, exist_ok=True)
    files: list[ManifestFile] = []
    for path, content in contents.items():
        (directory / path).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        files.append(ManifestFile(path=path, size=len(content), sha256=digest, role="weights"))
    manifest = Manifest(
        run_id="r", name=name, format="module", step=step, tokens=1, created_at=datetime.now(UTC), files=files
    )
    (directory / "manifest.json").write_text(manifest.model_dump_json())
    return directory


def test_only_unused_copies_are_removed(tmp_path: Path) -> None:
    store = BucketStore(tmp_path, BucketLocation("bucket", ""))  # copies are local, so no server is needed
    used, unused, fresh = (tmp_path / "jobs/job_1/checkpoints" / name for name in ("final", "best", "step-1"))
    whole = tmp_path / "jobs/job_2/checkpoints/final"
    for copy in (used, unused, fresh, whole):
        copy.mkdir(parents=True)
    long_ago = datetime.now(UTC).timestamp() - 1000
    for path in (unused, used.parent, used.parent.parent, whole, whole.parent, whole.parent.parent):
        os.utime(path, (long_ago, long_ago))
    store.remove_unused_copies([], max_age_seconds=500)
    assert sorted(path.name for path in used.parent.iterdir()) == ["final", "step-1"]
    assert not whole.parent.parent.exists()


def test_a_checkpoint_is_stored_replaced_fetched_and_removed(
    store: BucketStore, bucket: str, object_store: SeaweedServer, tmp_path: Path
) -> None:
    store.open_job(JOB)
    first = write_checkpoint(tmp_path, "best", 1, weights=b"1" * 1000)
    store.put_checkpoint(JOB, "best", first)
    stored = store.checkpoint(JOB, "best")
    assert stored is not None
    with store.open(stored.key / "weights") as file:
        file.seek(990)
        assert file.read() == b"1" * 10
    store.fetch_checkpoint(JOB, "best", tmp_path / "fetched")
    assert (tmp_path / "fetched" / "manifest.json").read_bytes() == stored.manifest_bytes
    second = write_checkpoint(tmp_path, "best", 2, weights=b"2" * 1000)
    store.put_checkpoint(JOB, "best", second)
    store.put_checkpoint(JOB, "best", second)
    assert (store.local(checkpoint_key(JOB, "best")) / "weights").read_bytes() == b"2" * 1000
    assert len(object_store.keys(bucket)) == 3, "the mark of the job, the manifest and the new weights"
    assert store.checkpoint_names(JOB) == ["best"]
    store.remove_job(JOB)
    assert object_store.keys(bucket) == []
    assert store.is_deleted(JOB)
    with pytest.raises(BrokenCheckpoint, match="was deleted"):
        store.put_checkpoint(JOB, "best", second)


def test_a_damaged_object_is_not_used(
    store: BucketStore, bucket: str, object_store: SeaweedServer, tmp_path: Path
) -> None:
    store.open_job(JOB)
    store.put_checkpoint(JOB, "final", write_checkpoint(tmp_path, "final", 1, weights=b"good"))
    (key,) = [key for key in object_store.keys(bucket) if key.endswith("/weights")]
    object_store.client().put_object(Bucket=bucket, Key=key, Body=b"evil")
    with pytest.raises(BrokenCheckpoint, match="does not match its SHA-256"):
        store.fetch_checkpoint(JOB, "final", tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


def test_wrong_credentials_and_a_missing_bucket_are_reported(
    store: BucketStore, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.check_access()
    missing = BucketStore(tmp_path, BucketLocation("no-such-bucket", ""))
    with pytest.raises(InvalidSettings, match=r"ZETA_ARTIFACTS_URL is 's3://no-such-bucket'"):
        missing.check_access()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(InvalidSettings, match="SignatureDoesNotMatch"):
        BucketStore(tmp_path, BucketLocation(bucket, "")).check_access()
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(InvalidSettings, match="AWS_ACCESS_KEY_ID"):
        BucketStore(tmp_path, BucketLocation(bucket, "")).check_access()


UPLOADER = """
import sys
from pathlib import Path, PurePosixPath
from zeta_core.system.artifact_location import BucketLocation
from zeta_core.system.artifact_store.bucket import BucketStore
store = BucketStore(Path(sys.argv[1]), BucketLocation(sys.argv[2], "zeta/"))
store.upload(Path(sys.argv[3]), PurePosixPath(sys.argv[4]), sys.argv[5])
"""


def test_a_killed_upload_continues_with_the_stored_parts(
    store: BucketStore, bucket: str, object_store: SeaweedServer, tmp_path: Path
) -> None:
    content = os.urandom(7 * PART_BYTES + 5)
    source = tmp_path / "source"
    source.write_bytes(content)
    key = file_key(new_id("file"))
    sha256 = hashlib.sha256(content).hexdigest()
    command = [sys.executable, "-c", UPLOADER, str(tmp_path), bucket, str(source), str(key), sha256]
    uploader = start_child(command, log_file=tmp_path / "log", stop_signal=signal.SIGKILL)
    client = object_store.client()

    def num_parts() -> int:
        uploads = unfinished_uploads(client, bucket, "")
        if not uploads:
            return 0
        listed = client.list_parts(Bucket=bucket, Key=uploads[0]["Key"], UploadId=uploads[0]["UploadId"])
        return len(listed.get("Parts", []))

    wait_until(lambda: num_parts() >= 1, 30, "some parts to be stored")
    uploader.kill()
    uploader.wait()
    assert [upload["Key"] for upload in unfinished_uploads(client, bucket, "")] == [f"zeta/{key}"]
    kept = num_parts()
    assert 1 <= kept < 8, (tmp_path / "log").read_text()
    sent: list[str] = []

    def count_part(**_: object) -> None:
        sent.append("part")

    counted = open_client(checksums=True)
    counted.meta.events.register("before-call.s3.UploadPart", count_part)
    ObjectUpload(counted, bucket, f"zeta/{key}", checksums=True).put(source, sha256)
    assert 0 < len(sent) <= 8 - kept, "the stored parts are not sent again"
    assert unfinished_uploads(client, bucket, "") == []
    assert store.local(key).read_bytes() == content


def test_an_interrupted_checkpoint_is_listed_and_leaves_no_parts(
    store: BucketStore, bucket: str, object_store: SeaweedServer, tmp_path: Path
) -> None:
    client = object_store.client()
    store.open_job(JOB)
    store.put_checkpoint(JOB, "step-1", write_checkpoint(tmp_path, "step-1", 1, weights=b"1"))
    stored = object_store.keys(bucket)
    client.create_multipart_upload(Bucket=bucket, Key=f"zeta/{checkpoint_key(JOB, 'step-2')}/0123/weights")
    assert store.checkpoint_names(JOB) == ["step-1", "step-2"]
    Artifacts(store).remove_checkpoints(JOB, keep={"step-1"})
    assert unfinished_uploads(client, bucket, "") == []
    client.put_object(Bucket=bucket, Key=f"zeta/{checkpoint_key(JOB, 'step-1')}/0123/weights", Body=b"0")
    store.put_checkpoint(JOB, "step-1", tmp_path / "step-1")
    assert object_store.keys(bucket) == stored, "the files of an earlier checkpoint of this name are removed"


STORER = """
import sys
from pathlib import Path
from zeta_core.system.artifact_location import BucketLocation
from zeta_core.system.artifact_store.bucket import BucketStore
store = BucketStore(Path(sys.argv[1]), BucketLocation(sys.argv[2], "zeta/"))
store.put_checkpoint(sys.argv[3], "best", Path(sys.argv[4]))
"""


def test_an_upload_that_continues_after_its_job_ended_leaves_nothing(
    store: BucketStore, bucket: str, object_store: SeaweedServer, tmp_path: Path
) -> None:
    """A worker freezes while it stores ``best``, and continues after the server has removed what it stored."""
    store.open_job(JOB)
    store.put_checkpoint(JOB, "best", write_checkpoint(tmp_path, "best", 1, weights=b"1"))
    stored = object_store.keys(bucket)
    contents = {f"part-{number}": os.urandom(10_000) for number in range(500)}
    late = write_checkpoint(tmp_path / "late", "best", 2, **contents)
    command = [sys.executable, "-c", STORER, str(tmp_path / "late-copies"), bucket, JOB, str(late)]
    worker = start_child(command, log_file=tmp_path / "log", stop_signal=signal.SIGKILL)
    wait_until(lambda: len(object_store.keys(bucket)) > len(stored) + 5, 30, "some files to be stored")
    worker.send_signal(signal.SIGSTOP)
    assert object_store.keys(bucket) != stored
    Artifacts(store).remove_checkpoints(JOB, keep={"best"})
    assert set(object_store.keys(bucket)) >= set(stored)
    worker.send_signal(signal.SIGCONT)
    assert worker.wait(timeout=60) == 1
    assert f"{JOB} ended while its checkpoint best was being stored" in (tmp_path / "log").read_text()
    assert object_store.keys(bucket) == stored
    assert store.local(checkpoint_key(JOB, "best")).joinpath("weights").read_bytes() == b"1"


def test_a_starting_server_removes_only_old_unfinished_uploads(
    store: BucketStore, bucket: str, object_store: SeaweedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = object_store.client()
    of_user = [f"zeta/files/{new_id('file')}", f"zeta/uploads/{new_id('upload')}/{new_id('part')}"]
    of_worker = f"zeta/{checkpoint_key(JOB, 'final')}/weights"
    for key in (*of_user, of_worker):
        client.create_multipart_upload(Bucket=bucket, Key=key)

    def unfinished() -> list[str]:
        return sorted(upload["Key"] for upload in unfinished_uploads(client, bucket, ""))

    Artifacts(store).remove_abandoned_uploads()
    assert unfinished() == sorted([*of_user, of_worker]), "another server may be uploading them"
    monkeypatch.setattr("zeta_core.system.artifact_store.bucket.ABANDONED_AFTER", timedelta(0))
    Artifacts(store).remove_abandoned_uploads()
    assert unfinished() == [of_worker], "its worker continues it"
