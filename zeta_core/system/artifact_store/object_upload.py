"""Uploading a file to a bucket, in parts if it is large.

Guarantees: the object appears at once, with all its bytes, or not at all; if its SHA-256 is known, only with that
content. An upload that was interrupted, even by a kill, continues with the parts that the store already has and that
equal those of the file.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO

from botocore.exceptions import ClientError

from zeta_core.system.artifact_store.checkpoint_copies import BrokenCheckpoint
from zeta_core.system.artifact_store.s3_client import translated_errors

PART_BYTES = 8 * 2**20  # S3 requires at least 5 MiB
MAX_PARTS = 10_000
NUM_CONCURRENT_PARTS = 4
SHA256_METADATA = "sha256"  # of the whole object, in hex; S3's own checksum of an object in parts is another one


@dataclass(frozen=True)
class ObjectUpload:
    """Uploads to one key. ``checksums``: let the store verify the SHA-256 of each part."""

    client: Any
    bucket: str
    key: str
    checksums: bool = True

    def put(self, source: Path, sha256: str | None = None) -> None:
        """Upload a file. Raises `BrokenCheckpoint` if its content doesn't have the given SHA-256, and `OSError`."""
        num_bytes = source.stat().st_size
        with translated_errors(f"storing {self.key}"), source.open("rb") as file:
            if num_bytes <= PART_BYTES:
                self._put_whole(file.read(), sha256)
            else:
                self._put_parts(file, num_bytes, sha256)

    def _put_whole(self, content: bytes, sha256: str | None) -> None:
        digest = hashlib.sha256(content)
        _require_sha256(self.key, digest.hexdigest(), sha256)
        self.client.put_object(
            Bucket=self.bucket,
            Key=self.key,
            Body=content,
            Metadata={SHA256_METADATA: digest.hexdigest()},
            **self._checksum(digest.digest()),
        )

    def _put_parts(self, file: BinaryIO, num_bytes: int, sha256: str | None) -> None:
        part_bytes = max(PART_BYTES, -(-num_bytes // MAX_PARTS))
        upload_id, stored = self._unfinished() or (self._begin(sha256), {})
        digest = hashlib.sha256()
        complete: dict[int, dict[str, Any]] = {}
        running: set[Future[dict[str, Any]]] = set()
        with ThreadPoolExecutor(NUM_CONCURRENT_PARTS, thread_name_prefix="upload") as executor:
            try:
                for number, content in enumerate(_pieces(file, part_bytes), start=1):
                    digest.update(content)
                    if _is_equal(stored.get(number), content):
                        complete[number] = self._listed(number, stored[number]["ETag"], content)
                        continue
                    running.add(executor.submit(self._put_part, upload_id, number, content))
                    if len(running) >= NUM_CONCURRENT_PARTS:
                        running = _collect(running, complete)
                while running:
                    running = _collect(running, complete)
            finally:
                for future in running:
                    future.cancel()
        parts = [complete[number] for number in sorted(complete)]
        try:
            _require_sha256(self.key, digest.hexdigest(), sha256)
            self.client.complete_multipart_upload(
                Bucket=self.bucket, Key=self.key, UploadId=upload_id, MultipartUpload={"Parts": parts}
            )
        except (BrokenCheckpoint, ClientError) as error:
            # An upload that the store rejects as invalid would be rejected again; the next attempt starts a new one.
            if isinstance(error, BrokenCheckpoint) or _status(error) == HTTPStatus.BAD_REQUEST:
                with suppress(ClientError):
                    self.client.abort_multipart_upload(Bucket=self.bucket, Key=self.key, UploadId=upload_id)
            raise

    def _begin(self, sha256: str | None) -> str:
        algorithm = {"ChecksumAlgorithm": "SHA256"} if self.checksums else {}
        metadata = {SHA256_METADATA: sha256} if sha256 is not None else {}
        begun = self.client.create_multipart_upload(Bucket=self.bucket, Key=self.key, Metadata=metadata, **algorithm)
        return str(begun["UploadId"])

    def _unfinished(self) -> tuple[str, dict[int, dict[str, Any]]] | None:
        """The newest unfinished upload of this key, and its parts by number."""
        ids = [upload["UploadId"] for upload in unfinished_uploads(self.client, self.bucket, self.key, exact=True)]
        for upload_id in reversed(ids):
            try:
                pages = self.client.get_paginator("list_parts").paginate(
                    Bucket=self.bucket, Key=self.key, UploadId=upload_id
                )
                return str(upload_id), {part["PartNumber"]: part for page in pages for part in page.get("Parts", [])}
            except self.client.exceptions.NoSuchUpload:
                continue  # completed or aborted in the meantime
        return None

    def _put_part(self, upload_id: str, number: int, content: bytes) -> dict[str, Any]:
        answer = self.client.upload_part(
            Bucket=self.bucket,
            Key=self.key,
            UploadId=upload_id,
            PartNumber=number,
            Body=content,
            **self._checksum(hashlib.sha256(content).digest()),
        )
        return self._listed(number, answer["ETag"], content)

    def _listed(self, number: int, etag: str, content: bytes) -> dict[str, Any]:
        """A stored part, as completing the upload needs it; stores don't list the checksums that they need there."""
        return {"PartNumber": number, "ETag": etag, **self._checksum(hashlib.sha256(content).digest())}

    def _checksum(self, sha256: bytes) -> dict[str, str]:
        return {"ChecksumSHA256": base64.b64encode(sha256).decode()} if self.checksums else {}


def unfinished_uploads(client: Any, bucket: str, prefix: str, *, exact: bool = False) -> list[dict[str, Any]]:
    """The unfinished uploads below a prefix, or of exactly this key; the oldest first."""
    pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix)
    found = [upload for page in pages for upload in page.get("Uploads", []) if not exact or upload["Key"] == prefix]
    return sorted(found, key=lambda upload: upload["Initiated"])


def _pieces(file: BinaryIO, num_bytes: int) -> Iterator[bytes]:
    while content := file.read(num_bytes):
        yield content


def _is_equal(part: dict[str, Any] | None, content: bytes) -> bool:
    """Whether a stored part has this content, as far as its checksum or its ETag, usually an MD5, shows."""
    if part is None or part["Size"] != len(content):
        return False
    checksum = part.get("ChecksumSHA256")
    if checksum is not None:
        return checksum == base64.b64encode(hashlib.sha256(content).digest()).decode()
    return part["ETag"].strip('"') == hashlib.md5(content, usedforsecurity=False).hexdigest()


def _status(error: ClientError) -> int:
    response: Any = error.response
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _collect(running: set[Future[dict[str, Any]]], complete: dict[int, dict[str, Any]]) -> set[Future[dict[str, Any]]]:
    """Wait for a part, and add it to ``complete``; returns those that are still running. Raises a part's error."""
    done, rest = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        part = future.result()
        complete[part["PartNumber"]] = part
    return rest


def _require_sha256(key: str, actual: str, expected: str | None) -> None:
    if expected is not None and actual != expected:
        raise BrokenCheckpoint(f"{key} does not match its SHA-256 and was not stored.")
