"""Uploading a local file: hash it first, and stream it from disk only if the service does not have it yet."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from urllib.parse import quote

import httpx

from zeta.errors import parse_response
from zeta.transport import HttpTransport
from zeta_core.contract.errors import InvalidRequest, Unavailable
from zeta_core.contract.job.responses import FilePurpose, Page, StoredFile
from zeta_core.contract.printable import printable
from zeta_core.system.file_hash import stream_sha256

CHUNK_BYTES = 1 << 20
RESPONSE_SECONDS = 300.0  # the server may still be writing to a slow disk after the last byte


def upload(
    transport: HttpTransport, path: Path, purpose: FilePurpose, *, on_bytes: Callable[[int, int], None] | None = None
) -> StoredFile:
    """Upload a file, unless the service already has the same bytes with this purpose, and return the stored file.

    Raises `InvalidRequest` if the path is not a readable regular file, is empty, or changes during the upload.
    """
    shown = printable(str(path))
    try:
        with _opened(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size == 0:
                raise InvalidRequest(f"{shown} is empty; name a file with content.", code="empty_file")
            sha256 = stream_sha256(stream)
            return _known(transport, sha256, purpose) or _send(
                transport, path.name, stream, size, sha256, purpose, on_bytes
            )
    except OSError as error:
        raise InvalidRequest(f"{shown} cannot be read: {error.strerror or error}.", code="unreadable_file") from error


def _opened(path: Path) -> BufferedReader:
    """Open a regular file. Raises `InvalidRequest` if it is something else."""
    try:
        # Without O_NONBLOCK, opening a named pipe blocks until another process opens it for writing.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as error:
        raise InvalidRequest(f"{printable(str(path))} is not a valid path: {error}.", code="unreadable_file") from error
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise _not_a_file(path, stat.S_IFSOCK) from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise _not_a_file(path, mode)
    return open(descriptor, "rb")


def _not_a_file(path: Path, mode: int) -> InvalidRequest:
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}
    kind = kinds.get(stat.S_IFMT(mode), "device")
    return InvalidRequest(f"{printable(str(path))} is a {kind}; name a regular file.", code="not_a_file")


def _known(transport: HttpTransport, sha256: str, purpose: FilePurpose) -> StoredFile | None:
    response = transport.request("GET", "/v1/files", params={"sha256": sha256, "limit": 1000})
    page = parse_response(Page[StoredFile], response)
    return next((file for file in page.data if file.sha256 == sha256 and file.purpose == purpose), None)


def _send(
    transport: HttpTransport,
    name: str,
    stream: BufferedReader,
    size: int,
    sha256: str,
    purpose: FilePurpose,
    on_bytes: Callable[[int, int], None] | None,
) -> StoredFile:
    backoff = transport.backoff()
    form = _UploadForm.of(purpose, name)
    while True:
        stream.seek(0)
        try:
            with transport.stream(
                "POST",
                "/v1/files",
                read_seconds=RESPONSE_SECONDS,
                headers=form.headers(size),
                content=form.body(stream, size, on_bytes),
            ) as response:
                response.read()
        except httpx.TransportError as error:
            # If only the response was lost, the file is already stored.
            if not backoff.wait():
                raise transport.unreachable(error) from error
            stored = _known(transport, sha256, purpose)
            if stored is not None:
                return stored
            continue
        except Unavailable:
            if not backoff.wait():
                raise
            continue
        stored = parse_response(StoredFile, response)
        if stored.sha256 != sha256:
            raise _changed(name)
        return stored


def _changed(name: str) -> InvalidRequest:
    return InvalidRequest(f"{printable(name)} changed while it was uploaded; upload it again.", code="file_changed")


def _sent_name(name: str) -> str:
    """The name to upload the file under, with U+FFFD for each byte that is not valid UTF-8."""
    return os.fsencode(name).decode("utf-8", "replace")


@dataclass(frozen=True)
class _UploadForm:
    """A multipart form with the purpose and one file.

    httpx's own forms escape only some characters of a file name, and servers disagree on how to unescape them. This
    form contains the exact name in ``filename*`` (RFC 5987), and in ``filename`` the browsers' encoding of it (WHATWG
    HTML, multipart form data), for servers that read only that.
    """

    name: str
    boundary: str
    beginning: bytes
    end: bytes

    @classmethod
    def of(cls, purpose: FilePurpose, name: str) -> _UploadForm:
        boundary = secrets.token_hex(16)
        name = _sent_name(name)
        browser_name = name.replace("\r", "%0D").replace("\n", "%0A").replace('"', "%22")
        disposition = f'form-data; name="file"; filename="{browser_name}"; filename*=UTF-8\'\'{quote(name, safe="")}'
        beginning = (
            # The purpose precedes the file, so the server knows it before the bytes arrive.
            f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n{purpose}\r\n'
            f"--{boundary}\r\nContent-Disposition: {disposition}\r\nContent-Type: application/octet-stream\r\n\r\n"
        )
        return cls(name, boundary, beginning.encode(), f"\r\n--{boundary}--\r\n".encode())

    def headers(self, size: int) -> dict[str, str]:
        length = len(self.beginning) + size + len(self.end)
        return {"Content-Type": f"multipart/form-data; boundary={self.boundary}", "Content-Length": str(length)}

    def body(self, stream: BufferedReader, size: int, on_bytes: Callable[[int, int], None] | None) -> Iterator[bytes]:
        """Yield the bytes of the form. If the file grows during the upload, only the first ``size`` bytes are sent.

        Raises `InvalidRequest`, which aborts the request, if the file has become shorter.
        """
        yield self.beginning
        sent = 0
        while chunk := stream.read(min(CHUNK_BYTES, size - sent)):
            yield chunk
            sent += len(chunk)
            if on_bytes is not None:
                on_bytes(sent, size)
        if sent < size:
            raise _changed(self.name)
        yield self.end
