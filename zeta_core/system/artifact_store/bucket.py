"""The artifact store as a bucket of an S3 service; the local folder contains copies.

Objects have the keys of the folder's files, except for the files of a checkpoint: they are below the beginning of their
manifest's SHA-256, and the manifest is written last. So one request replaces a checkpoint, and a reader of the
earlier manifest never sees files of the new one.

Guarantees: objects appear at once and with the right content, or not at all. What is fetched is verified against its
SHA-256. A job that is deleted while something is stored for it leaves no objects behind.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from zeta_core.contract.errors import InvalidSettings
from zeta_core.contract.job.checkpoint import Manifest
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.wire.run_directory import MANIFEST_NAME, checkpoint_key, job_key
from zeta_core.system.artifact_location import BucketLocation
from zeta_core.system.artifact_store import checkpoint_copies
from zeta_core.system.artifact_store.checkpoint_copies import (
    COPY_BYTES,
    BrokenCheckpoint,
    CancellationCheck,
    local_manifest,
    never_cancelled,
    parse_manifest,
)
from zeta_core.system.artifact_store.interface import ArtifactStore, StoredObject
from zeta_core.system.artifact_store.object_reader import ObjectReader
from zeta_core.system.artifact_store.object_upload import SHA256_METADATA, ObjectUpload, unfinished_uploads
from zeta_core.system.artifact_store.s3_client import open_client, translated_errors
from zeta_core.system.durable_files import write_durably

JOB_MARK = "job"  # an empty object that exists as long as the job
UNFINISHED_MARK = "unfinished"  # an empty object that exists while a checkpoint with this name is being uploaded
ABANDONED_AFTER = timedelta(days=1)  # since an upload began; one that takes longer fails if a server starts meanwhile
KNOWN_SECONDS = 10.0  # for which a job is taken to exist since it was last seen
_DELETE_AT_ONCE = 1000  # objects per request
_NO_ACCESS = frozenset({errno.EACCES, errno.ENODEV, errno.ENOENT})

logger = logging.getLogger(__name__)


class BucketStore(ArtifactStore):
    def __init__(self, root: Path, location: BucketLocation, *, checksums: bool = True) -> None:
        super().__init__(root)
        self._location = location
        self._bucket, self._prefix = location.bucket, location.prefix
        self._checksums = checksums
        self._connected: Any = None
        self._known: dict[str, float] = {}  # when a job was last seen to exist (monotonic)

    def __str__(self) -> str:
        return str(self._location)

    @property
    def _client(self) -> Any:
        if self._connected is None:
            with translated_errors("opening the object store"):
                self._connected = open_client(checksums=self._checksums)
        return self._connected

    def check_access(self) -> None:
        try:
            with translated_errors("listing the bucket"):
                self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_ACCESS:
                raise
            reason = error.strerror if isinstance(error, OSError) else error
            raise InvalidSettings(
                f"ZETA_ARTIFACTS_URL is {str(self)!r}, which cannot be used: {reason}. Check the bucket's name, "
                "AWS_ENDPOINT_URL, and the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role).",
                param="ZETA_ARTIFACTS_URL",
            ) from error

    # --- Files -------------------------------------------------------------------------------------------------------

    def open(self, key: PurePosixPath) -> BinaryIO:
        return cast(BinaryIO, self._reader(key))

    def size(self, key: PurePosixPath) -> int | None:
        try:
            return int(self._head(key)["ContentLength"])
        except FileNotFoundError:
            return None

    def signed_link(self, key: PurePosixPath, *, seconds: int, media_type: str, disposition: str) -> str | None:
        parameters = {
            "Bucket": self._bucket,
            "Key": self._name(key),
            "ResponseContentType": media_type,
            "ResponseContentDisposition": disposition,
        }
        with translated_errors(f"signing a link to {key}"):
            return str(self._client.generate_presigned_url("get_object", Params=parameters, ExpiresIn=seconds))

    def objects(self, prefix: PurePosixPath) -> Iterator[StoredObject]:
        for found in self._list(self._folder(prefix)):
            key = PurePosixPath(found["Key"].removeprefix(self._prefix))
            if not key.match(str(job_key("*") / JOB_MARK)):
                yield StoredObject(key, int(found["Size"]))

    def upload(self, source: Path, key: PurePosixPath, sha256: str) -> None:
        self._put(source, key, sha256)

    def commit(self, source: Path, key: PurePosixPath) -> None:
        """It is already visible."""

    def write(self, key: PurePosixPath, content: bytes, *, replace: bool = True) -> None:
        condition = {} if replace else {"IfNoneMatch": "*"}
        with translated_errors(f"storing {key}"):
            self._client.put_object(Bucket=self._bucket, Key=self._name(key), Body=content, **condition)

    def remove(self, key: PurePosixPath) -> None:
        name = self._name(key)
        with translated_errors(f"removing {key}"):
            self._client.delete_object(Bucket=self._bucket, Key=name)
            self._remove_names([found["Key"] for found in self._list(self._folder(key))])
            for upload in unfinished_uploads(self._client, self._bucket, name):
                if upload["Key"] == name or upload["Key"].startswith(f"{name}/"):
                    self._abort(upload)
        path = self.root / key
        with suppress(FileNotFoundError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def remove_abandoned_uploads(self, prefix: PurePosixPath) -> None:
        """Those that began less than `ABANDONED_AFTER` ago remain: another process may be uploading them now."""
        with translated_errors(f"removing unfinished uploads below {prefix}"):
            for upload in unfinished_uploads(self._client, self._bucket, self._folder(prefix)):
                if utc_now() - upload["Initiated"] > ABANDONED_AFTER:
                    self._abort(upload)

    def publish(self, key: PurePosixPath) -> None:
        self._put(self.root / key, key, None)
        job_id = key.parts[1]
        if self._is_gone(job_id):
            self.remove_job(job_id)

    def local(self, key: PurePosixPath, check_cancelled: CancellationCheck = never_cancelled) -> Path:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        job_id, name = key.parts[1], key.name
        if key == checkpoint_key(job_id, name):
            if self.manifest_bytes(job_id, name) is not None:
                self.fetch_checkpoint(job_id, name, path, check_cancelled)
        elif not path.exists():
            with suppress(FileNotFoundError):
                self._fetch_file(key, path, None, check_cancelled)
        if path.exists():
            os.utime(path)
        return path

    def remove_unused_copies(self, active_jobs: Collection[str], max_age_seconds: float) -> None:
        copies = (*self.root.glob("files/*"), *self.root.glob("jobs/*/checkpoints/*"), *self.root.glob("jobs/*"))
        for path in copies:
            job_id = path.relative_to(self.root).parts[1]
            with suppress(FileNotFoundError):
                if job_id not in active_jobs and time.time() - _last_use(path) > max_age_seconds:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    # --- Jobs --------------------------------------------------------------------------------------------------------

    def open_job(self, job_id: str) -> None:
        self.write(job_key(job_id) / JOB_MARK, b"")
        (self.root / job_key(job_id)).mkdir(parents=True, exist_ok=True)
        self._known[job_id] = time.monotonic()

    def is_deleted(self, job_id: str) -> bool:
        if time.monotonic() - self._known.get(job_id, float("-inf")) < KNOWN_SECONDS:
            return False
        return self._is_gone(job_id)

    def remove_job(self, job_id: str) -> None:
        self._known.pop(job_id, None)
        # First the mark: whoever stores something afterwards finds it missing, and removes what it stored.
        with translated_errors(f"removing {job_id}"):
            self._client.delete_object(Bucket=self._bucket, Key=self._name(job_key(job_id) / JOB_MARK))
        self.remove(job_key(job_id))

    def _is_gone(self, job_id: str) -> bool:
        if self.size(job_key(job_id) / JOB_MARK) is None:
            self._known.pop(job_id, None)
            return True
        self._known[job_id] = time.monotonic()
        return False

    # --- Checkpoints -------------------------------------------------------------------------------------------------

    def checkpoint_names(self, job_id: str) -> list[str]:
        folder = self._folder(checkpoint_key(job_id, ""))
        names: set[str] = set()
        with translated_errors(f"listing the checkpoints of {job_id}"):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=folder, Delimiter="/"
            )
            for page in pages:
                names |= {found["Prefix"][len(folder) :].rstrip("/") for found in page.get("CommonPrefixes", [])}
            unfinished = unfinished_uploads(self._client, self._bucket, folder)
        return sorted(names | {upload["Key"][len(folder) :].partition("/")[0] for upload in unfinished})

    def manifest_bytes(self, job_id: str, name: str) -> bytes | None:
        try:
            with self._reader(checkpoint_key(job_id, name) / MANIFEST_NAME) as reader:
                return reader.readall()
        except FileNotFoundError:
            return None

    def content_key(self, job_id: str, name: str, manifest: bytes) -> PurePosixPath:
        return checkpoint_key(job_id, name) / hashlib.sha256(manifest).hexdigest()[:16]

    def put_checkpoint(self, job_id: str, name: str, source: Path) -> None:
        if self._is_gone(job_id):
            raise BrokenCheckpoint(f"{job_id} was deleted; its checkpoints are no longer stored.")
        copy = self.root / checkpoint_key(job_id, name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if local_manifest(source) is not None or local_manifest(copy) is None:
            # Links, so that the run may remove its files while they are uploaded; also found by a restarted worker.
            checkpoint_copies.transfer(source, copy, never_cancelled)
        manifest = local_manifest(copy)
        assert manifest is not None
        if manifest == self.manifest_bytes(job_id, name):
            # It is stored, but the removal of earlier files may have been interrupted.
            self._remove_other_content(job_id, name, self.content_key(job_id, name, manifest))
        else:
            self._put_content(job_id, name, copy, manifest)
        checkpoint_copies.remove_checkpoint(copy)

    def _put_content(self, job_id: str, name: str, copy: Path, manifest: bytes) -> None:
        """Upload the files, then the manifest; then remove the files of an earlier checkpoint with this name.

        Whoever removes unfinished checkpoints removes their mark first. Without it, what was uploaded is removed here.
        """
        content = self.content_key(job_id, name, manifest)
        earlier = self.checkpoint(job_id, name)
        mark = checkpoint_key(job_id, name) / UNFINISHED_MARK
        self.write(mark, b"")
        known = {} if earlier is None else {file.sha256: earlier.key / file.path for file in earlier.manifest.files}
        for file in parse_manifest(manifest, name).files:
            if self.size(content / file.path) == file.size:
                continue  # an interrupted upload has stored it
            if file.sha256 in known:
                self._copy(known[file.sha256], content / file.path)
            else:
                self._put(copy / file.path, content / file.path, file.sha256)
        if self.size(mark) is None:
            self.remove(content)
            raise BrokenCheckpoint(f"{job_id} ended while its checkpoint {name} was being stored.")
        self.write(checkpoint_key(job_id, name) / MANIFEST_NAME, manifest)
        if self._is_gone(job_id):
            self.remove_job(job_id)
            raise BrokenCheckpoint(f"{job_id} was deleted while its checkpoint {name} was being stored.")
        self._remove_other_content(job_id, name, content)

    def _remove_other_content(self, job_id: str, name: str, content: PurePosixPath) -> None:
        """Remove the files and unfinished uploads of checkpoints with this name whose files are not at ``content``."""
        folder = checkpoint_key(job_id, name)
        with translated_errors(f"removing earlier files of {name} of {job_id}"):
            self._client.delete_object(Bucket=self._bucket, Key=self._name(folder / UNFINISHED_MARK))
            names = [found["Key"] for found in self._list(self._folder(folder))]
            manifest, kept = self._name(folder / MANIFEST_NAME), self._folder(content)
            self._remove_names([found for found in names if found != manifest and not found.startswith(kept)])
            for upload in unfinished_uploads(self._client, self._bucket, self._folder(folder)):
                if not upload["Key"].startswith(kept):
                    self._abort(upload)

    def abandon_checkpoint(self, job_id: str, name: str) -> None:
        checkpoint_copies.remove_checkpoint(self.root / checkpoint_key(job_id, name))
        self.remove_unfinished(job_id, name)

    def remove_unfinished(self, job_id: str, name: str) -> None:
        manifest = self.manifest_bytes(job_id, name)
        if manifest is None:
            self.remove_checkpoint(job_id, name)
        else:
            self._remove_other_content(job_id, name, self.content_key(job_id, name, manifest))

    def fetch_checkpoint(
        self, job_id: str, name: str, target: Path, check_cancelled: CancellationCheck = never_cancelled
    ) -> None:
        while True:
            stored = self.checkpoint(job_id, name)
            check_cancelled()
            if stored is None:
                raise BrokenCheckpoint(f"{name} is missing or has no {MANIFEST_NAME}.")
            if stored.manifest_bytes == local_manifest(target):
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
            try:
                self._fetch_content(stored.manifest, stored.key, partial, check_cancelled)
                write_durably(partial / MANIFEST_NAME, stored.manifest_bytes)
                check_cancelled()
                partial.chmod(0o755)
                checkpoint_copies.replace_checkpoint(partial, target)
                return
            except FileNotFoundError as error:
                if self.manifest_bytes(job_id, name) == stored.manifest_bytes:
                    raise BrokenCheckpoint(f"{name} lacks a file that its manifest lists: {error}") from error
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    def _fetch_content(
        self, manifest: Manifest, content: PurePosixPath, partial: Path, check_cancelled: CancellationCheck
    ) -> None:
        for file in manifest.files:
            copy = partial / file.path
            copy.parent.mkdir(parents=True, exist_ok=True)
            self._fetch_file(content / file.path, copy, file.sha256, check_cancelled)

    def remove_checkpoint(self, job_id: str, name: str) -> None:
        with translated_errors(f"removing {name} of {job_id}"):  # first the manifest, without which nobody reads it
            for first in (MANIFEST_NAME, UNFINISHED_MARK):
                key = self._name(checkpoint_key(job_id, name) / first)
                self._client.delete_object(Bucket=self._bucket, Key=key)
        self.remove(checkpoint_key(job_id, name))

    # --- Requests ----------------------------------------------------------------------------------------------------

    def _name(self, key: PurePosixPath) -> str:
        return f"{self._prefix}{key}"

    def _folder(self, key: PurePosixPath) -> str:
        return self._prefix if key == PurePosixPath() else f"{self._name(key)}/"

    def _head(self, key: PurePosixPath) -> dict[str, Any]:
        with translated_errors(f"reading {key}"):
            return cast("dict[str, Any]", self._client.head_object(Bucket=self._bucket, Key=self._name(key)))

    def _reader(self, key: PurePosixPath) -> ObjectReader:
        return ObjectReader(self._client, self._bucket, self._name(key), self._head(key))

    def _put(self, source: Path, key: PurePosixPath, sha256: str | None) -> None:
        ObjectUpload(self._client, self._bucket, self._name(key), self._checksums).put(source, sha256)

    def _copy(self, source: PurePosixPath, key: PurePosixPath) -> None:
        """Copy an object within the bucket."""
        with translated_errors(f"copying {source}"):
            self._client.copy({"Bucket": self._bucket, "Key": self._name(source)}, self._bucket, self._name(key))

    def _fetch_file(
        self, key: PurePosixPath, target: Path, sha256: str | None, check_cancelled: CancellationCheck
    ) -> None:
        """Download an object, verified against ``sha256`` or the SHA-256 that was stored with it."""
        head = self._head(key)
        expected = sha256 or head.get("Metadata", {}).get(SHA256_METADATA)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        part = Path(name)
        try:
            digest = hashlib.sha256()
            with (
                os.fdopen(descriptor, "wb") as written,
                ObjectReader(self._client, self._bucket, self._name(key), head) as reader,
            ):
                while chunk := reader.read(COPY_BYTES):
                    check_cancelled()
                    digest.update(chunk)
                    written.write(chunk)
            if expected is not None and digest.hexdigest() != expected:
                raise BrokenCheckpoint(f"{key} in the object store does not match its SHA-256.")
            part.chmod(0o644)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def _list(self, prefix: str) -> Iterator[dict[str, Any]]:
        with translated_errors(f"listing {prefix}"):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix):
                yield from page.get("Contents", [])

    def _remove_names(self, names: Sequence[str]) -> None:
        for start in range(0, len(names), _DELETE_AT_ONCE):
            objects = [{"Key": name} for name in names[start : start + _DELETE_AT_ONCE]]
            answer = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": objects, "Quiet": True})
            if errors := answer.get("Errors"):
                raise OSError(errno.EIO, f"the object store did not remove {errors[0]['Key']}: {errors[0]['Code']}")

    def _abort(self, upload: dict[str, Any]) -> None:
        with suppress(self._client.exceptions.NoSuchUpload):
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"])


def _last_use(copy: Path) -> float:
    """When a local copy was last used (seconds since the epoch). Using a checkpoint also uses the folder of its job."""
    return max(path.stat().st_mtime for path in (copy, *copy.glob("checkpoints/*")))
