"""The interface of the artifact store, and what is the same for every kind of store.

Keys are those of `contract.wire.run_directory`. Programs such as training runs read files, so every store has a local
folder, ``root``, with the same layout: it is either the store itself, or contains copies of objects. `publish` makes a
local file visible to other machines, and `local` makes a stored file available here.

All methods block; call them in a thread. If the store fails, they raise `OSError`: ``ENOSPC`` or ``EDQUOT`` if it is
full, ``EACCES`` if it refuses access, and `FileNotFoundError` for a missing object.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from zeta_core.contract.job.checkpoint import FINAL_CHECKPOINT, Manifest, checkpoint_step, surplus_checkpoints
from zeta_core.contract.wire.run_directory import MANIFEST_NAME, job_key, tensorboard_key
from zeta_core.system.artifact_store.checkpoint_copies import (
    BrokenCheckpoint,
    CancellationCheck,
    local_manifest,
    never_cancelled,
    parse_manifest,
)


@dataclass(frozen=True)
class StoredObject:
    """One stored file: its key and its size in bytes."""

    key: PurePosixPath
    num_bytes: int


class ArtifactStore(ABC):
    """`open_job` marks a job as existing; if the mark is missing later, the server has deleted the job."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @abstractmethod
    def __str__(self) -> str:
        """The store's address, for messages."""

    @abstractmethod
    def check_access(self) -> None:
        """Raise `InvalidSettings` if the store does not exist or refuses access, and `OSError` if it fails."""

    # --- Files -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def open(self, key: PurePosixPath) -> BinaryIO:
        """A stored file, unbuffered and seekable."""

    @abstractmethod
    def size(self, key: PurePosixPath) -> int | None:
        """The size of a stored file in bytes; ``None`` if it doesn't exist."""

    def signed_link(self, key: PurePosixPath, *, seconds: int, media_type: str, disposition: str) -> str | None:
        """A URL from which anyone can read a file for ``seconds``; ``None`` if the store is not on the network.

        The response has the given Content-Type and Content-Disposition. The file may not exist.
        """
        return None

    @abstractmethod
    def objects(self, prefix: PurePosixPath) -> Iterator[StoredObject]:
        """The stored files below ``prefix``, in no particular order."""

    @abstractmethod
    def upload(self, source: Path, key: PurePosixPath, sha256: str) -> None:
        """Do the slow part of storing a complete file on the store's disk or in the bucket; then call `commit`."""

    @abstractmethod
    def commit(self, source: Path, key: PurePosixPath) -> None:
        """Make an uploaded file visible under its key, at once; ``source`` may be gone afterwards."""

    @abstractmethod
    def write(self, key: PurePosixPath, content: bytes, *, replace: bool = True) -> None:
        """Write a small file. Raises `FileExistsError` if it exists and ``replace`` is false."""

    @abstractmethod
    def remove(self, key: PurePosixPath) -> None:
        """Remove a file, or everything below a key, with all unfinished uploads; harmless when repeated."""

    @abstractmethod
    def remove_abandoned_uploads(self, prefix: PurePosixPath) -> None:
        """Remove what uploads below ``prefix`` have left that a killed process began long ago and nobody continued."""

    @abstractmethod
    def publish(self, key: PurePosixPath) -> None:
        """Store the file at ``root / key`` as it is now. Nothing is stored for a deleted job."""

    @abstractmethod
    def local(self, key: PurePosixPath, check_cancelled: CancellationCheck = lambda: None) -> Path:
        """The path of a stored file, or of a checkpoint's directory, on this machine; verified if it was fetched.

        A missing file or checkpoint is not an error: the path then doesn't exist.
        """

    @abstractmethod
    def remove_unused_copies(self, active_jobs: Collection[str], max_age_seconds: float) -> None:
        """Remove local copies that were not used for a while; does nothing if ``root`` is the store itself."""

    # --- Jobs --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def open_job(self, job_id: str) -> None:
        """Mark the job as existing; call it only for an attempt that the server has just granted."""

    @abstractmethod
    def is_deleted(self, job_id: str) -> bool:
        """Whether the server has removed a job."""

    def remove_job(self, job_id: str) -> None:
        """Remove everything that a job stored; harmless when repeated."""
        self.remove(job_key(job_id))

    # --- Checkpoints -------------------------------------------------------------------------------------------------

    @abstractmethod
    def checkpoint_names(self, job_id: str) -> list[str]:
        """The names of the job's checkpoints, with those that are not complete yet."""

    @abstractmethod
    def manifest_bytes(self, job_id: str, name: str) -> bytes | None:
        """The manifest of a complete checkpoint."""

    @abstractmethod
    def content_key(self, job_id: str, name: str, manifest: bytes) -> PurePosixPath:
        """The key below which the files of the checkpoint with this manifest are stored."""

    @abstractmethod
    def put_checkpoint(self, job_id: str, name: str, source: Path) -> None:
        """Store the checkpoint directory ``source``; an equal one is left unchanged. It becomes visible at once.

        Raises `BrokenCheckpoint`, also for a deleted job.
        """

    @abstractmethod
    def abandon_checkpoint(self, job_id: str, name: str) -> None:
        """Remove what an interrupted `put_checkpoint` left; a complete checkpoint of this name remains."""

    @abstractmethod
    def remove_unfinished(self, job_id: str, name: str) -> None:
        """Remove what was stored of a checkpoint of an ended job that is not complete; a complete one remains.

        A `put_checkpoint` that still runs somewhere then raises `BrokenCheckpoint` and leaves nothing.
        """

    @abstractmethod
    def fetch_checkpoint(
        self, job_id: str, name: str, target: Path, check_cancelled: CancellationCheck = never_cancelled
    ) -> None:
        """Copy a stored checkpoint to ``target``, by links where possible.

        Raises `BrokenCheckpoint`, and `TransferCancelled` if ``check_cancelled``, which is called before every change,
        does.
        """

    @abstractmethod
    def remove_checkpoint(self, job_id: str, name: str) -> None:
        """Remove a checkpoint, which is never visible without all of its files; harmless when repeated."""

    def put_curves(self, job_id: str, source: Path) -> None:
        """Store TensorBoard's files; those of each attempt have names of their own."""
        curves = tensorboard_key(job_id)
        shutil.copytree(source, self.root / curves, dirs_exist_ok=True)
        for file in source.rglob("*"):
            if file.is_file():
                self.publish(curves / file.relative_to(source).as_posix())

    def checkpoint(self, job_id: str, name: str) -> StoredCheckpoint | None:
        """A stored checkpoint, or ``None`` if it doesn't exist. Raises `BrokenCheckpoint` for a damaged manifest."""
        content = self.manifest_bytes(job_id, name)
        if content is None:
            return None
        key = self.content_key(job_id, name, content)
        return StoredCheckpoint(parse_manifest(content, name), content, self, key)

    def is_stored(self, job_id: str, name: str, local: Path) -> bool:
        """Whether the store has exactly the checkpoint that is in ``local``."""
        manifest = local_manifest(local)
        return manifest is not None and manifest == self.manifest_bytes(job_id, name)

    def remove_newer_checkpoints(
        self, job_id: str, name: str | None, check_cancelled: Callable[[], None] = never_cancelled
    ) -> None:
        """Remove each ``step-N`` and ``final`` of a job that is newer than its checkpoint ``name``, if given.

        Raises `BrokenCheckpoint` if ``name`` has no manifest, and `TransferCancelled` as `fetch_checkpoint` does.
        """
        last = -1 if name is None else self._manifest(job_id, name).step
        for found in sorted(self.checkpoint_names(job_id)):
            step = checkpoint_step(found)
            if found == FINAL_CHECKPOINT and name != FINAL_CHECKPOINT:
                complete = self.checkpoint(job_id, FINAL_CHECKPOINT)
                step = last + 1 if complete is None else complete.manifest.step
            check_cancelled()
            if step is not None and step > last:
                self.remove_checkpoint(job_id, found)

    def prune(
        self, job_id: str, save_total_limit: int, *, published_step: int, keep: Collection[str] = frozenset()
    ) -> None:
        """Remove all but the newest ``save_total_limit`` checkpoints ``step-N``, except those in ``keep``.

        Checkpoints above ``published_step`` are neither counted nor removed: the server resumes from the earlier ones
        until it knows them.
        """
        names = self.checkpoint_names(job_id)
        published = [name for name in names if (step := checkpoint_step(name)) is not None and step <= published_step]
        for name in surplus_checkpoints(published, save_total_limit):
            if name not in keep:
                self.remove_checkpoint(job_id, name)

    def _manifest(self, job_id: str, name: str) -> Manifest:
        stored = self.checkpoint(job_id, name)
        if stored is None:
            raise BrokenCheckpoint(f"{name} is not in the store, or has no {MANIFEST_NAME}.")
        return stored.manifest


@dataclass(frozen=True)
class StoredCheckpoint:
    """A complete checkpoint: its manifest, parsed and as bytes, and the key below which its other files are stored."""

    manifest: Manifest
    manifest_bytes: bytes
    store: ArtifactStore
    key: PurePosixPath
