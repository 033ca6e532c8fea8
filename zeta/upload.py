"""A local file to the service: hashed first, sent only if the service has not got it, streamed from the disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import httpx

from zeta.transport import Transport, read_answer
from zeta_core.contract.answers import FilePurpose, Page, StoredFile
from zeta_core.contract.errors import InvalidRequest, Unavailable

CHUNK_BYTES = 1 << 20
ANSWER_SECONDS = 300.0  # the server may still be writing to a slow disk after the last byte


def upload(
    transport: Transport, path: Path, purpose: FilePurpose, *, on_bytes: Callable[[int, int], None] | None = None
) -> StoredFile:
    """The stored file with these bytes and this purpose, uploaded now unless it is there already.

    Raises `InvalidRequest` for a path that is no readable file, an empty one, or one that changes meanwhile.
    """
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size == 0:
                raise InvalidRequest(f"{path} is empty; there is nothing in it to upload.", code="empty_file")
            sha256 = _sha256(stream)
            return _known(transport, sha256, purpose) or _send(
                transport, path.name, stream, size, sha256, purpose, on_bytes
            )
    except IsADirectoryError as error:
        raise InvalidRequest(f"{path} is a folder; name a file.", code="not_a_file") from error
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror or error}.", code="unreadable_file") from error


def _sha256(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _known(transport: Transport, sha256: str, purpose: FilePurpose) -> StoredFile | None:
    response = transport.request("GET", "/v1/files", params={"sha256": sha256, "limit": 1000})
    page = read_answer(Page[StoredFile], response)
    return next((file for file in page.data if file.sha256 == sha256 and file.purpose == purpose), None)


def _send(
    transport: Transport,
    name: str,
    stream: BinaryIO,
    size: int,
    sha256: str,
    purpose: FilePurpose,
    on_bytes: Callable[[int, int], None] | None,
) -> StoredFile:
    pauses = transport.pauses()
    while True:
        stream.seek(0)
        body = _Counted(stream, size, on_bytes)
        try:
            with transport.stream(
                "POST",
                "/v1/files",
                read_seconds=ANSWER_SECONDS,
                data={"purpose": purpose},  # before the file, so that the server knows it when the bytes come
                files={"file": (name, body, "application/octet-stream")},
            ) as response:
                response.read()
        except httpx.LocalProtocolError as error:  # fewer bytes than were announced
            raise _changed(name) from error
        except httpx.TransportError as error:
            # The answer may be what was lost: then the file is there now.
            if not pauses.wait():
                raise transport.unreachable(error) from error
            stored = _known(transport, sha256, purpose)
            if stored is not None:
                return stored
            continue
        except Unavailable:
            if not pauses.wait():
                raise
            continue
        stored = read_answer(StoredFile, response)
        if stored.sha256 != sha256:
            raise _changed(name)
        return stored


def _changed(name: str) -> InvalidRequest:
    return InvalidRequest(f"{name} changed while it was uploaded; upload it again.", code="file_changed")


class _Counted:
    """A file that tells how much of it was read; httpx asks its length by `seek` and `tell`."""

    def __init__(self, stream: BinaryIO, size: int, on_bytes: Callable[[int, int], None] | None) -> None:
        self._stream, self._size, self._on_bytes = stream, size, on_bytes

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._stream.tell())  # a file that grows meanwhile must not overrun its length
        chunk = self._stream.read(left if size < 0 else min(size, left))
        if self._on_bytes is not None:
            self._on_bytes(self._stream.tell(), self._size)
        return chunk

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()
