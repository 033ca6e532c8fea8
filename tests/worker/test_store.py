"""The artifact store: checkpoints are stored completely or not at all, as links or as verified copies."""

import hashlib
import itertools
import os
import shutil
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from server.artifacts import Artifacts
from tests.harness.waiting import wait_until
from worker.artifacts import checkpoint_uploads
from worker.artifacts.checkpoint_uploads import CheckpointUploads
from worker.artifacts.job_log import JobLog
from worker.artifacts.output_uploads import OutputUploads
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.job.checkpoint import Manifest, ManifestFile
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.wire.run_directory import checkpoint_key, log_key
from zeta_core.system.artifact_store import BrokenCheckpoint
from zeta_core.system.artifact_store.checkpoint_copies import transfer
from zeta_core.system.artifact_store.folder import FolderStore


def make_checkpoint(folder: Path, step: int, content: bytes = b"weights", *, name: str | None = None) -> Path:
    directory = folder / (name or f"step-{step}")
    (directory / "training_state").mkdir(parents=True)
    files: list[ManifestFile] = []
    for path, data in (("model.safetensors", content), ("training_state/optimizer.bin", content * 2)):
        (directory / path).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        files.append(ManifestFile(path=path, size=len(data), sha256=digest, role="weights"))
    manifest = Manifest(
        run_id="run_1", name=directory.name, format="module", step=step, tokens=0, created_at=utc_now(), files=files
    )
    (directory / "manifest.json").write_text(manifest.model_dump_json())
    return directory


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    made = FolderStore(tmp_path / "artifacts")
    made.open_job("job_1")
    return made


def test_a_checkpoint_is_stored_completely_once_and_by_hard_links(store: FolderStore, tmp_path: Path) -> None:
    local = make_checkpoint(tmp_path / "output", 3)
    (local / "not-in-the-manifest").write_text("x")
    store.put_checkpoint("job_1", "step-3", local)
    stored = store.local(checkpoint_key("job_1", "step-3"))
    assert os.path.samefile(stored / "model.safetensors", local / "model.safetensors")
    assert (stored / "training_state/optimizer.bin").read_bytes() == b"weights" * 2
    assert not (stored / "not-in-the-manifest").exists()
    inode = stored.stat().st_ino
    store.put_checkpoint("job_1", "step-3", local)
    assert stored.stat().st_ino == inode
    assert store.is_stored("job_1", "step-3", local)
    assert [entry.name for entry in stored.parent.iterdir()] == ["step-3"]


def test_a_best_checkpoint_replaced_during_its_upload_is_stored_consistently(
    store: FolderStore, tmp_path: Path
) -> None:
    """Like a run: the older one is renamed, the newer one takes its name, and the older one is removed."""
    output = tmp_path / "output"
    local = make_checkpoint(output, 0, b"%08d" % 0, name="best")
    stop = threading.Event()

    def replace() -> None:
        for step in itertools.count(1):
            if stop.is_set():
                return
            newer = make_checkpoint(output / "aside", step, b"%08d" % step, name="best")
            older = local.rename(output / "step-older")
            newer.rename(local)
            shutil.rmtree(older)

    training = threading.Thread(target=replace)
    training.start()
    try:
        for _ in range(200):
            with suppress(BrokenCheckpoint):  # between the two renames, there is none
                store.put_checkpoint("job_1", "best", local)
            stored = store.local(checkpoint_key("job_1", "best"))
            if stored.exists():
                manifest = Manifest.model_validate_json((stored / "manifest.json").read_bytes())
                assert (stored / "model.safetensors").read_bytes() == b"%08d" % manifest.step
    finally:
        stop.set()
        training.join()


def test_files_from_another_file_system_are_copied_and_verified(store: FolderStore, tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system at /dev/shm")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        local = make_checkpoint(Path(folder), 3)
        store.put_checkpoint("job_1", "step-3", local)
        stored = store.local(checkpoint_key("job_1", "step-3"))
        assert (stored / "model.safetensors").read_bytes() == b"weights"
        assert stored.stat().st_dev != local.stat().st_dev
        (local / "model.safetensors").write_bytes(b"WEIGHTS")  # the same size, but not the hash in the manifest
        with pytest.raises(BrokenCheckpoint, match="SHA-256"):
            store.put_checkpoint("job_1", "best", local)
        assert not store.local(checkpoint_key("job_1", "best")).exists()


@pytest.mark.parametrize("fault", ["cut", "missing", "no manifest", "bad manifest", "huge manifest"])
def test_a_broken_checkpoint_never_appears_in_the_store(store: FolderStore, tmp_path: Path, fault: str) -> None:
    local = make_checkpoint(tmp_path / "output", 3)
    match fault:
        case "cut":
            (local / "model.safetensors").write_bytes(b"wei")
        case "missing":
            (local / "training_state/optimizer.bin").unlink()
        case "no manifest":
            (local / "manifest.json").unlink()
        case "huge manifest":  # the worker and the server read it as a whole
            with (local / "manifest.json").open("r+b") as file:
                file.truncate(1 << 40)
        case _:
            (local / "manifest.json").write_text("{")
    with pytest.raises(BrokenCheckpoint):
        store.put_checkpoint("job_1", "step-3", local)
    assert not store.local(checkpoint_key("job_1", "step-3")).exists()


def test_a_changed_checkpoint_replaces_the_stored_one(store: FolderStore, tmp_path: Path) -> None:
    store.put_checkpoint("job_1", "best", make_checkpoint(tmp_path / "old", 3, b"old", name="best"))
    store.put_checkpoint("job_1", "best", make_checkpoint(tmp_path / "new", 5, b"new", name="best"))
    assert (store.local(checkpoint_key("job_1", "best")) / "model.safetensors").read_bytes() == b"new"


def test_pruning_keeps_the_newest_and_all_unpublished_checkpoints(store: FolderStore, tmp_path: Path) -> None:
    for step in (1, 2, 3, 10, 20):
        store.put_checkpoint("job_1", f"step-{step}", make_checkpoint(tmp_path / "output", step))
    store.put_checkpoint("job_1", "final", make_checkpoint(tmp_path / "output", 20, name="final"))
    store.prune("job_1", 2, published_step=10, keep=("step-2",))
    kept = sorted(entry.name for entry in store.local(checkpoint_key("job_1", "final")).parent.iterdir())
    assert kept == ["final", "step-10", "step-2", "step-20", "step-3"]
    store.prune("job_unknown", 2, published_step=10)


def test_a_failing_store_is_retried_for_longer_after_the_run_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_uploads, "MAX_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint_uploads, "RETRY_PAUSE_SECONDS", 0.01)
    (tmp_path / "store").write_text("no folder")
    make_checkpoint(tmp_path / "output", 5)
    line = {"type": "checkpoint", "name": "step-5", "step": 5}

    def stepped(uploads: CheckpointUploads, *, is_over: bool) -> bool:
        uploads.step(is_over=is_over)
        return uploads.is_settled(1)

    with ThreadPoolExecutor(1) as pool:
        of_live_run, of_ended_run = [
            CheckpointUploads(FolderStore(tmp_path / "store"), pool, "job_1", tmp_path / "output", save_total_limit=3)
            for _ in range(2)
        ]
        for uploads in (of_live_run, of_ended_run):
            uploads.add(1, "step-5")
        wait_until(
            lambda: stepped(of_live_run, is_over=False) or stepped(of_ended_run, is_over=True),
            30,
            "the first to give up",
        )
        assert of_live_run.published_line(1, line)["code"] == "checkpoint_not_stored"
        assert not of_ended_run.is_settled(1)
        (tmp_path / "store").unlink()
        FolderStore(tmp_path / "store").open_job("job_1")
        wait_until(lambda: stepped(of_ended_run, is_over=True), 30, "the store to be back")
        assert of_ended_run.published_line(1, line) == line


def test_a_checkpoint_that_is_still_copied_after_its_job_ended_leaves_nothing(
    store: FolderStore, tmp_path: Path
) -> None:
    """A worker was cut off while it stored ``best``: the server removes unfinished checkpoints at any moment."""
    job_id = new_id("job")
    store.open_job(job_id)
    store.put_checkpoint(job_id, "best", make_checkpoint(tmp_path / "old", 3, b"old", name="best"))
    recorded = store.manifest_bytes(job_id, "best")
    late = make_checkpoint(tmp_path / "late", 5, b"late", name="best")
    folder = store.local(checkpoint_key(job_id, "best")).parent
    calls = itertools.count()

    def count_call() -> None:
        next(calls)

    transfer(late, tmp_path / "undisturbed", count_call)
    num_moments = next(calls)
    assert num_moments > 3, "before each file, and before the checkpoint appears"
    for moment in range(1, num_moments):  # at the first call, number 0, nothing is stored yet
        calls = itertools.count()

        def remove_unfinished(moment: int = moment, calls: "itertools.count[int]" = calls) -> None:
            if next(calls) == moment:
                Artifacts(store).remove_checkpoints(job_id, keep={"best"})

        with pytest.raises(BrokenCheckpoint, match="was removed before it was complete"):
            transfer(late, folder / "best", remove_unfinished)
        assert [entry.name for entry in folder.iterdir()] == ["best"]
        assert store.manifest_bytes(job_id, "best") == recorded


def test_no_file_of_a_deleted_job_is_stored_again(store: FolderStore, tmp_path: Path) -> None:
    """A worker was cut off: the run continues, but the server has ended and deleted the job."""
    output = tmp_path / "output"
    local = make_checkpoint(output, 3)
    (output / "tensorboard").mkdir()
    (tmp_path / "train.log").write_text("one\n")
    with ThreadPoolExecutor(1) as pool:
        log = JobLog(tmp_path / "train.log", store, log_key("job_1", 1), max_bytes=10**6)
        archive = OutputUploads(store, pool, "job_1", output, log)
        archive.copy_log()
        wait_until((store.root / log_key("job_1", 1)).is_file, 30, "the log to be stored")
        shutil.rmtree(store.root / "jobs/job_1")
        with (tmp_path / "train.log").open("a") as more:
            more.write("two\n")
        with pytest.raises(BrokenCheckpoint, match="job_1 was deleted"):
            store.put_checkpoint("job_1", "step-3", local)
        wait_until(lambda: archive.complete(succeeded=True, keep=()), 30, "nothing to be left to store")
        archive.copy_log()
    assert list((store.root / "jobs").iterdir()) == []
