"""Uploads: a multipart body parsed as it arrives, straight into the store's temporary file, hashed on the way.

Guarantees: the body is never whole in memory nor on the disk twice; no byte of it is read before the caller was known
and the announced length fitted the limit and the disk; whatever ends the upload early leaves nothing behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from server.artifacts import ArtifactStore, Incoming
from server.files.formats import FIRST_BYTES, SUFFIXES, check_beginning, check_name
from zeta_core.contract.answers import FilePurpose
from zeta_core.contract.errors import ErrorDetail, InvalidRequest, MalformedRequest, TooLarge, Unavailable
from zeta_core.contract.validation import error_of, nearest

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

WRITE_BYTES = 4 << 20  # one trip to a thread for so many bytes: hashing and writing them never hold up the loop
MAX_FORM_BYTES = 64 * 1024  # beside the file itself: boundaries, part headers, `purpose`
FIELDS = ("file", "purpose")


@dataclass
class Upload:
    """A complete upload, still a temporary file."""

    filename: str
    purpose: FilePurpose
    incoming: Incoming


async def receive(request: Request, store: ArtifactStore, max_bytes: int) -> Upload:
    """Read the multipart body. Raises `TooLarge`, `MalformedRequest`, `InvalidRequest` or `Unavailable`."""
    boundary = _boundary(request.headers.get("content-type", ""))
    _check_length(request.headers.get("content-length"), max_bytes, await asyncio.to_thread(store.free_bytes))
    incoming = await asyncio.to_thread(store.open_incoming)
    try:
        form = _Form(max_bytes)
        await _read(request.stream(), form, boundary, incoming)
        return _complete(form, incoming)
    except BaseException:
        incoming.drop()
        raise


async def _read(body: AsyncIterable[bytes], form: _Form, boundary: bytes, incoming: Incoming) -> None:
    """Parse the body while a thread hashes and writes what was parsed before: two batches in memory at most."""
    writing: asyncio.Task[None] | None = None
    try:
        parser = MultipartParser(boundary, form.callbacks())
        async for chunk in body:
            parser.write(chunk)
            form.check()
            if form.pending_bytes >= WRITE_BYTES:
                if writing is not None:
                    await writing
                writing = asyncio.create_task(asyncio.to_thread(incoming.write, form.take()))
        if writing is not None:
            await writing
        await asyncio.to_thread(incoming.write, form.take())
        parser.finalize()
    except FormParserError as error:
        raise MalformedRequest(f"The body is not multipart/form-data: {error}.", code="invalid_multipart") from error
    finally:
        if writing is not None:
            await asyncio.wait([writing])  # the file is not dropped under the thread that writes it
    if not form.is_whole:
        raise MalformedRequest(
            "The multipart body ends before its last boundary; send it again.", code="incomplete_body"
        )


def _complete(form: _Form, incoming: Incoming) -> Upload:
    purpose = form.purpose()
    details: list[ErrorDetail] = []
    if form.filename is None:
        details.append(ErrorDetail(param="file", message="file is required; send it as a file.", code="missing_field"))
    if purpose is None:
        message = "purpose is required; it must be 'dataset' or 'model'."
        details.append(ErrorDetail(param="purpose", message=message, code="missing_field"))
    if details:
        raise error_of(details, InvalidRequest)
    assert form.filename is not None
    assert purpose is not None
    check_name(form.filename, purpose)
    check_beginning(form.filename, bytes(form.beginning))
    return Upload(form.filename, purpose, incoming)


def _boundary(content_type: str) -> bytes:
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise MalformedRequest(
            f"Content-Type is {content_type[:100]!r}; send multipart/form-data with the parts 'file' and 'purpose'.",
            code="invalid_content_type",
            param="Content-Type",
        )
    return boundary


def _check_length(header: str | None, max_bytes: int, free_bytes: int) -> None:
    """What the length says before the first byte of the body is read; unknown in a chunked body."""
    if header is None or not header.isdigit():
        return
    if int(header) > max_bytes + MAX_FORM_BYTES:
        raise _too_large(max_bytes)
    if int(header) > free_bytes:
        raise Unavailable(
            f"The upload has {header} bytes and the artifact store has room for {free_bytes}; make room there.",
            code="disk_full",
        )


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"The file is larger than the {max_bytes} bytes that this server takes (ZETA_MAX_UPLOAD_BYTES).")


@dataclass
class _Form:
    """What the parser found so far; ``pending`` are bytes of the file that are not written yet."""

    max_bytes: int
    filename: str | None = None
    pending: list[memoryview] = field(default_factory=list[memoryview])
    pending_bytes: int = 0
    beginning: bytearray = field(default_factory=bytearray)
    num_bytes: int = 0
    is_whole: bool = False
    _fields: dict[str, bytearray] = field(default_factory=dict[str, bytearray])
    _header: tuple[bytearray, bytearray] = field(default_factory=lambda: (bytearray(), bytearray()))
    _disposition: bytes = b""
    _part: str = ""
    _form_bytes: int = 0

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._add_header(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._add_header(1, data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._start_part,
            "on_part_data": self._add_data,
            "on_end": self._end,
        }

    def take(self) -> list[memoryview]:
        taken, self.pending, self.pending_bytes = self.pending, [], 0
        return taken

    def purpose(self) -> FilePurpose | None:
        """Raises `InvalidRequest` for one that there is not."""
        if "purpose" not in self._fields:
            return None
        said = self._fields["purpose"].decode("utf-8", "replace").strip()
        for purpose in SUFFIXES:
            if said == purpose:
                return purpose
        raise InvalidRequest(
            f"purpose is {said[:40]!r}; it must be 'dataset' or 'model'.", code="invalid_value", param="purpose"
        )

    def check(self) -> None:
        """What can be refused before the whole body was read."""
        if self.num_bytes > self.max_bytes:
            raise _too_large(self.max_bytes)
        if self._form_bytes > MAX_FORM_BYTES:
            raise MalformedRequest("The form fields beside the file are too long.", code="invalid_multipart")
        if self.filename is not None and "purpose" in self._fields and self._part != "purpose":
            purpose = self.purpose()
            assert purpose is not None
            check_name(self.filename, purpose)

    def _begin(self) -> None:
        self._disposition, self._part = b"", ""

    def _add_header(self, which: int, text: bytes) -> None:
        self._form_bytes += len(text)
        self._header[which].extend(text)

    def _end_header(self) -> None:
        if bytes(self._header[0]).lower() == b"content-disposition":
            self._disposition = bytes(self._header[1])
        self._header = (bytearray(), bytearray())

    def _start_part(self) -> None:
        _kind, options = parse_options_header(self._disposition)
        self._part = options.get(b"name", b"").decode("utf-8", "replace")
        if self._part not in FIELDS:
            meant = nearest(self._part, FIELDS)
            raise InvalidRequest(
                f"{self._part[:60]!r} is not a known field; send 'file' and 'purpose'.",
                code="unknown_field",
                param=self._part[:60],
                suggestion=meant,
            )
        if self._part in self._fields or (self._part == "file" and self.filename is not None):
            raise InvalidRequest(f"{self._part} is given twice; send one.", code="invalid_value", param=self._part)
        if self._part == "purpose":
            self._fields["purpose"] = bytearray()
            return
        name = options.get(b"filename", b"").decode("utf-8", "replace").replace("\\", "/").rpartition("/")[2]
        name = "".join(character for character in name if character.isprintable())[-255:]
        if not name:
            raise InvalidRequest("file has no file name; send it as a file.", code="missing_field", param="file")
        self.filename = name

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._part == "file":
            self.num_bytes += end - start
            if len(self.beginning) < FIRST_BYTES:
                self.beginning += data[start : min(end, start + FIRST_BYTES)]
            self.pending.append(memoryview(data)[start:end])
            self.pending_bytes += end - start
        else:
            self._form_bytes += end - start
            if self._form_bytes <= MAX_FORM_BYTES:
                self._fields[self._part] += data[start:end]

    def _end(self) -> None:
        self.is_whole = True
