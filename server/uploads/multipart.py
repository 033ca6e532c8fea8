"""Receives uploads: parses a multipart body as it arrives, and hashes and writes it to a temporary file in the store.

Guarantees: the body is never held in memory as a whole or written twice. Reading starts only after the caller is
authenticated and the announced length fits the limit and the disk. Every byte counts against the quota when it arrives
(`server.uploads.quota`). An interrupted upload leaves nothing behind. Uploads that stall or take too long are ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from server.settings import ServerSettings
from server.uploads.file_checks import check_beginning, check_model, check_name
from server.uploads.file_names import file_name, parameters
from server.uploads.quota import OpenUpload, OpenUploads
from zeta_core.contract.data_files.file_types import file_type
from zeta_core.contract.data_files.signatures import FIRST_BYTES
from zeta_core.contract.errors import ErrorDetail, InvalidRequest, MalformedRequest, RequestTimeout, TooLarge
from zeta_core.contract.job.responses import FilePurpose
from zeta_core.contract.spec.validation import error_from_details, nearest, shown

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_FORM_BYTES = 64 * 1024  # everything but the file: boundaries, part headers, `purpose`


@dataclass(frozen=True)
class FormRules:
    """The fields of a form: its file, and a purpose unless ``purposes`` is empty.

    ``purposes`` maps the values of the form to those that are stored. ``default_suffix`` is appended to the name of a
    file without a suffix.
    """

    file_field: str = "file"
    purposes: Mapping[str, FilePurpose] = field(default_factory=lambda: {"dataset": "dataset", "model": "model"})
    default_suffix: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.file_field, "purpose") if self.purposes else (self.file_field,)

    @property
    def listed_purposes(self) -> str:
        return " or ".join(repr(name) for name in self.purposes)


@dataclass(frozen=True)
class UploadFields:
    """The form fields of a complete upload; ``purpose`` is ``None`` if the form has none."""

    filename: str
    purpose: FilePurpose | None


async def receive(
    request: Request,
    uploads: OpenUploads,
    upload: OpenUpload,
    settings: ServerSettings,
    rules: FormRules,
    max_bytes: int,
) -> UploadFields:
    """Read the multipart body, with a file of at most ``max_bytes``, into the upload's temporary file.

    Raises `TooLarge`, `MalformedRequest`, `InvalidRequest`, `RequestTimeout`, `QuotaExceeded` or `Unavailable`.
    """
    boundary = _boundary(request.headers.get("content-type", ""), rules)
    form = _MultipartForm(max_bytes, rules)
    await _read(_in_time(request.stream(), settings), form, boundary, uploads, upload)
    fields = _complete_fields(form)
    if fields.purpose == "model":
        await check_model(upload.incoming.path, fields.filename)
    return fields


async def _in_time(body: AsyncIterator[bytes], settings: ServerSettings) -> AsyncGenerator[bytes]:
    """The chunks of the body. Raises `RequestTimeout` when the idle timeout or the total timeout expires."""
    idle, total = settings.upload_idle_seconds, settings.upload_max_seconds
    deadline = time.monotonic() + total
    while True:
        left = deadline - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, min(idle, left))):
                piece = await anext(body, None)
        except TimeoutError as error:
            if left <= idle:
                raise RequestTimeout(
                    f"The upload took longer than {total:g} s (ZETA_UPLOAD_MAX_SECONDS); send a smaller file, or "
                    "send it over a faster connection.",
                    code="upload_timeout",
                ) from error
            raise RequestTimeout(
                f"The upload received no data for {idle:g} s (ZETA_UPLOAD_IDLE_SECONDS); upload the file again.",
                code="upload_timeout",
            ) from error
        if piece is None:
            return
        yield piece


async def _read(
    body: AsyncIterable[bytes], form: _MultipartForm, boundary: bytes, uploads: OpenUploads, upload: OpenUpload
) -> None:
    """Parse the body while a thread hashes and writes the previous batch; at most two batches are in memory."""
    writing: asyncio.Task[None] | None = None
    incoming = upload.incoming
    try:
        parser = MultipartParser(boundary, form.callbacks())
        async for chunk in body:
            parser.write(chunk)
            form.check()
            await uploads.count(upload, form.num_bytes - upload.num_bytes)
            if form.pending_bytes >= uploads.batch_bytes:
                if writing is not None:
                    await writing
                writing = asyncio.create_task(asyncio.to_thread(incoming.write, form.take()))
        if writing is not None:
            await writing
        await asyncio.to_thread(incoming.write, form.take())
        parser.finalize()
    except FormParserError as error:
        raise MalformedRequest(
            f"The request body is not valid multipart/form-data: {error}.", code="invalid_multipart"
        ) from error
    finally:
        if writing is not None:
            await asyncio.wait([writing])  # don't remove the file while the thread writes to it
    if not form.is_whole:
        raise MalformedRequest(
            "The multipart body is truncated: its last boundary is missing; upload the file again.",
            code="incomplete_body",
        )


def _complete_fields(form: _MultipartForm) -> UploadFields:
    rules, purpose = form.rules, form.purpose()
    details: list[ErrorDetail] = []
    if form.filename is None:
        message = f"{rules.file_field} is required; send it as a part with a file name."
        details.append(ErrorDetail(param=rules.file_field, message=message, code="missing_field"))
    if purpose is None and rules.purposes:
        message = f"purpose is required; it must be {rules.listed_purposes}."
        details.append(ErrorDetail(param="purpose", message=message, code="missing_field"))
    if details:
        raise error_from_details(details, InvalidRequest)
    assert form.filename is not None
    if purpose is not None:
        check_name(form.filename, purpose)
        check_beginning(form.filename, bytes(form.beginning))
    return UploadFields(form.filename, purpose)


def _boundary(content_type: str, rules: FormRules) -> bytes:
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise MalformedRequest(
            f"Content-Type is {content_type[:100]!r}; send multipart/form-data with {_listed_parts(rules)}.",
            code="invalid_content_type",
            param="Content-Type",
        )
    return boundary


def _listed_parts(rules: FormRules) -> str:
    names = " and ".join(repr(name) for name in rules.names)
    return f"the part{'s' if len(rules.names) > 1 else ''} {names}"


def check_length(header: str, max_bytes: int) -> None:
    """Raise `TooLarge` if the announced length exceeds the limit; a chunked body announces none."""
    if header.isdigit() and (len(header) > 18 or int(header) > max_bytes + MAX_FORM_BYTES):
        raise _too_large(max_bytes)


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(
        f"The file exceeds the upload limit of {max_bytes} bytes (ZETA_MAX_UPLOAD_BYTES, or max_upload_bytes of the "
        "project)."
    )


def _check_encoding(encoding: str) -> None:
    """Reject encoded bytes, because nothing decodes them (RFC 7578, section 4.7, deprecates the header)."""
    if encoding.lower() not in ("", "7bit", "8bit", "binary"):
        raise InvalidRequest(
            f"A part's Content-Transfer-Encoding is {shown(encoding)}; send the bytes unencoded, without this header.",
            code="invalid_value",
            param="Content-Transfer-Encoding",
        )


@dataclass
class _MultipartForm:
    """The parser's state; ``pending`` are bytes of the file that are not written yet."""

    max_bytes: int
    rules: FormRules
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
        pieces, self.pending, self.pending_bytes = self.pending, [], 0
        return pieces

    def purpose(self) -> FilePurpose | None:
        """Raises `InvalidRequest` for an unknown purpose."""
        if "purpose" not in self._fields:
            return None
        purpose_text = self._fields["purpose"].decode("utf-8", "replace").strip()
        if purpose_text in self.rules.purposes:
            return self.rules.purposes[purpose_text]
        raise InvalidRequest(
            f"purpose is {purpose_text[:40]!r}; it must be {self.rules.listed_purposes}.",
            code="invalid_value",
            param="purpose",
        )

    def check(self) -> None:
        """Raise for errors that can be detected before the whole body was read."""
        if self.num_bytes > self.max_bytes:
            raise _too_large(self.max_bytes)
        if self._form_bytes > MAX_FORM_BYTES:
            raise MalformedRequest(
                f"The form fields other than the file exceed {MAX_FORM_BYTES} bytes; shorten them.",
                code="invalid_multipart",
            )
        if self.filename is not None and "purpose" in self._fields and self._part != "purpose":
            purpose = self.purpose()
            assert purpose is not None
            check_name(self.filename, purpose)

    def _begin(self) -> None:
        self._disposition, self._part = b"", ""

    def _add_header(self, index: int, text: bytes) -> None:
        self._form_bytes += len(text)
        self._header[index].extend(text)

    def _end_header(self) -> None:
        name = bytes(self._header[0]).lower()
        if name == b"content-disposition":
            self._disposition = bytes(self._header[1])
        elif name == b"content-transfer-encoding":
            _check_encoding(self._header[1].decode("latin-1").strip())
        self._header = (bytearray(), bytearray())

    def _start_part(self) -> None:
        options = parameters(self._disposition)
        self._part = options.get(b"name", b"").decode("utf-8", "replace")
        rules = self.rules
        if self._part not in rules.names:
            suggestion = nearest(self._part, rules.names)
            raise InvalidRequest(
                f"{self._part[:60]!r} is not a known field; send {' and '.join(map(repr, rules.names))}.",
                code="unknown_field",
                param=self._part[:60],
                suggestion=suggestion,
            )
        if self._part in self._fields or (self._part == rules.file_field and self.filename is not None):
            raise InvalidRequest(f"{self._part} is given twice; send it once.", code="invalid_value", param=self._part)
        if self._part == "purpose":
            self._fields["purpose"] = bytearray()
            return
        name = file_name(options)
        if name is None:
            raise InvalidRequest(
                f"{self._part} has no file name; send it as a part with a file name.",
                code="missing_field",
                param=self._part,
            )
        has_suffix = bool(file_type(name).suffix)
        self.filename = name if has_suffix else f"{name}{rules.default_suffix}"

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._part == self.rules.file_field:
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
