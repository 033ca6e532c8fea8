"""The artifact store as a folder that the server and the workers share.

Guarantees: files and checkpoints appear under their keys by one rename, flushed to disk. Nothing is written outside the
root. There is no protection against other programs that change files in the folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from zeta_core.contract.job.checkpoint import FINAL_CHECKPOINT
from zeta_core.contract.wire.run_directory import checkpoint_key, job_key
from zeta_core.system.artifact_store.checkpoint_copies import (
    BrokenCheckpoint,
    CancellationCheck,
    local_manifest,
    never_cancelled,
    partial_path,
    remove_checkpoint,
    transfer,
)
from zeta_core.system.artifact_store.interface import ArtifactStore, StoredObject
from zeta_core.system.durable_files import create_durably, flush, rename_durably, unique_part_path, write_durably


class FolderStore(ArtifactStore):
    def __str__(self) -> str:
        return str(self.root)

    def check_access(self) -> None:
        """A folder may be mounted later, so there is nothing to check."""

    # --- Files -------------------------------------------------------------------------------------------------------

    def open(self, key: PurePosixPath) -> BinaryIO:
        return cast(BinaryIO, (self.root / key).open("rb", buffering=0))

    def size(self, key: PurePosixPath) -> int | None:
        try:
            return (self.root / key).stat().st_size
        except FileNotFoundError:
            return None

    def objects(self, prefix: PurePosixPath) -> Iterator[StoredObject]:
        for path in (self.root / prefix).rglob("*"):
            with suppress(FileNotFoundError):  # removed in the meantime
                if path.is_file():
                    yield StoredObject(PurePosixPath(path.relative_to(self.root)), path.stat().st_size)

    def upload(self, source: Path, key: PurePosixPath, sha256: str) -> None:
        flush(source)

    def commit(self, source: Path, key: PurePosixPath) -> None:
        target = self.root / key
        target.parent.mkdir(exist_ok=True)
        rename_durably(source, target)

    def write(self, key: PurePosixPath, content: bytes, *, replace: bool = True) -> None:
        target = self.root / key
        if replace:
            write_durably(target, content, part=unique_part_path(target))
        else:
            create_durably(target, content)

    def remove(self, key: PurePosixPath) -> None:
        path = self.root / key
        with suppress(FileNotFoundError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def remove_abandoned_uploads(self, prefix: PurePosixPath) -> None:
        """An interrupted upload leaves nothing below its key."""

    def publish(self, key: PurePosixPath) -> None:
        """Every machine reads the file itself."""

    def local(self, key: PurePosixPath, check_cancelled: CancellationCheck = never_cancelled) -> Path:
        return self.root / key

    def remove_unused_copies(self, active_jobs: Collection[str], max_age_seconds: float) -> None:
        """There are no copies."""

    # --- Jobs --------------------------------------------------------------------------------------------------------

    def open_job(self, job_id: str) -> None:
        (self.root / job_key(job_id)).mkdir(parents=True, exist_ok=True)

    def is_deleted(self, job_id: str) -> bool:
        """Whether the server has removed the job's folder; always false while the store is not mounted."""
        job = self.root / job_key(job_id)
        return job.parent.is_dir() and not job.exists()

    # --- Checkpoints -------------------------------------------------------------------------------------------------

    def checkpoint_names(self, job_id: str) -> list[str]:
        folder = self._directory(job_id, FINAL_CHECKPOINT).parent
        return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []

    def manifest_bytes(self, job_id: str, name: str) -> bytes | None:
        return local_manifest(self._directory(job_id, name))

    def content_key(self, job_id: str, name: str, manifest: bytes) -> PurePosixPath:
        return checkpoint_key(job_id, name)

    def put_checkpoint(self, job_id: str, name: str, source: Path) -> None:
        if self.is_deleted(job_id):
            raise BrokenCheckpoint(f"{job_id} was deleted; its checkpoints are no longer stored.")
        target = self._directory(job_id, name)
        target.parent.mkdir(exist_ok=True)
        transfer(source, target, never_cancelled)

    def abandon_checkpoint(self, job_id: str, name: str) -> None:
        """An interrupted transfer leaves nothing."""

    def remove_unfinished(self, job_id: str, name: str) -> None:
        remove_checkpoint(partial_path(self._directory(job_id, name)))

    def fetch_checkpoint(
        self, job_id: str, name: str, target: Path, check_cancelled: CancellationCheck = never_cancelled
    ) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        transfer(self._directory(job_id, name), target, check_cancelled)

    def remove_checkpoint(self, job_id: str, name: str) -> None:
        remove_checkpoint(self._directory(job_id, name))

    def _directory(self, job_id: str, name: str) -> Path:
        return self.root / checkpoint_key(job_id, name)
