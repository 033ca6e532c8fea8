"""Uploads in parts: each part is stored as it arrives, and completing the upload makes one file of them.

Guarantees: a stored part is on disk before its response. Parts count against the quota of the project, and the complete
file replaces them in one transaction. An upload that has received no part for `UPLOAD_SECONDS` is removed with its
parts (`server.uploads.expiry`), so that a long upload over a slow line is not cut off.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from server.artifacts import Artifacts, IncomingFile, parts_key
from server.auth import Caller
from server.database.file_tables import FileRow, UploadPartRow, UploadRow
from server.files import max_upload_bytes
from server.openai.file_objects import DEFAULT_SUFFIX, SHOWN, FileObject, require_uploadable, to_file_object
from server.service import Service
from server.uploads.file_checks import check_beginning, check_model, check_name
from server.uploads.multipart import FormRules, check_length, receive
from zeta_core.contract.data_files.file_types import file_type
from zeta_core.contract.data_files.signatures import FIRST_BYTES
from zeta_core.contract.errors import Conflict, InvalidRequest, NotFound, TooLarge, Unavailable
from zeta_core.contract.identifiers import is_id, new_id_at
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.spec.validation import StrictModel, parse, shown
from zeta_core.contract.text import in_one_line

UPLOAD_SECONDS = 3600
MAX_PARTS = 10_000
MAX_PART_ID_LENGTH = 40
MAX_COMPLETION_BYTES = MAX_PARTS * (MAX_PART_ID_LENGTH + 64)  # JSON with the ids of all parts, indented
_PART_FORM = FormRules(file_field="data", purposes={})
_CHUNK_BYTES = 1 << 20


class UploadRequest(StrictModel):
    """The body of ``POST /openai/v1/uploads``. ``mime_type`` is required by OpenAI and has no effect."""

    bytes: int = Field(ge=1)
    filename: str = Field(min_length=1, max_length=255)
    mime_type: str = Field(max_length=255)
    purpose: str


class CompletionRequest(StrictModel):
    """The body of ``POST /openai/v1/uploads/{id}/complete``: the parts in their order."""

    part_ids: list[Annotated[str, Field(max_length=MAX_PART_ID_LENGTH)]] = Field(min_length=1, max_length=MAX_PARTS)
    md5: str | None = None


class Upload(BaseModel):
    """An upload. Times are Unix times in seconds; ``file`` is set when it is completed."""

    model_config = ConfigDict(frozen=True)

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileObject | None = None


class UploadPart(BaseModel):
    model_config = ConfigDict(frozen=True)

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


async def create(service: Service, caller: Caller, body: Any) -> Upload:
    """Start an upload. Raises `InvalidRequest`, `TooLarge` and `QuotaExceeded` before any byte is sent."""
    request = parse(UploadRequest, body, error_class=InvalidRequest)
    purpose = require_uploadable(request.purpose)
    filename = request.filename if file_type(request.filename).suffix else f"{request.filename}{DEFAULT_SUFFIX}"
    try:
        check_name(in_one_line(filename), purpose)
    except ValueError as error:
        raise InvalidRequest(f"filename is {shown(filename)}: {error}.", param="filename") from error
    max_bytes = max_upload_bytes(service, caller)
    if request.bytes > max_bytes:
        raise TooLarge(
            f"bytes is {request.bytes}, which exceeds the upload limit of {max_bytes} bytes (ZETA_MAX_UPLOAD_BYTES).",
            param="bytes",
        )
    await service.uploads.require_space(caller.project, request.bytes, caller.limits.max_stored_bytes)
    upload_id, created_at = new_id_at("upload")
    row = UploadRow(
        id=upload_id,
        project=caller.project,
        created_by=caller.key_id,
        filename=filename,
        bytes=request.bytes,
        purpose=purpose,
        status="pending",
        created_at=created_at,
        expires_at=created_at + timedelta(seconds=UPLOAD_SECONDS),
    )
    async with service.database.write() as session:
        session.add(row)
    return _to_upload(row)


async def add_part(service: Service, caller: Caller, upload_id: str, request: Request) -> UploadPart:
    """Store the ``data`` of a multipart body as the next part. Raises the errors of `receive`, and `NotFound`."""
    async with service.database.read() as session:
        _require_pending(await _find(session, caller, upload_id))
    max_bytes = max_upload_bytes(service, caller)
    check_length(request.headers.get("content-length", ""), max_bytes)
    async with service.uploads.open(caller.project, 0, quota_bytes=caller.limits.max_stored_bytes) as opened:
        await receive(request, service.uploads, opened, service.settings, _PART_FORM, max_bytes)
        part_id, created_at = new_id_at("part")
        row = UploadPartRow(
            id=part_id,
            upload_id=upload_id,
            project=caller.project,
            bytes=opened.incoming.num_bytes,
            created_at=created_at,
        )

        async def extend(session: AsyncSession) -> None:
            upload = await _find(session, caller, upload_id, lock=True)
            _require_pending(upload)
            parts = select(func.count()).where(UploadPartRow.upload_id == upload_id)
            if (await session.scalar(parts) or 0) >= MAX_PARTS:
                raise InvalidRequest(
                    f"Upload {upload_id} has {MAX_PARTS:,} parts, the limit; send the file in larger parts.",
                    code="too_many_parts",
                    param="data",
                )
            upload.expires_at = created_at + timedelta(seconds=UPLOAD_SECONDS)

        await service.uploads.store(opened, row, None, extend)
    return UploadPart(id=part_id, created_at=int(created_at.timestamp()), upload_id=upload_id)


async def complete(service: Service, caller: Caller, upload_id: str, body: Any, *, is_retry: bool) -> Upload:
    """Make a file of the parts.

    A repeated request, whose first response was lost, returns the completed upload. Raises `InvalidRequest` if parts,
    size or checksum don't match, `Conflict` if the upload is not pending, and `NotFound`.
    """
    request = parse(CompletionRequest, body, error_class=InvalidRequest)
    async with service.database.read() as session:
        stored = await _stored_parts(session, upload_id)
        row = await _find(session, caller, upload_id)  # after the parts: if it is pending, they were not removed yet
        if is_retry and row.status == "completed":
            return _to_upload(row, await session.get(FileRow, row.file_id))
        _require_pending(row)
    parts = _listed_parts(stored, request.part_ids)
    num_bytes = sum(part.bytes for part in parts)
    if num_bytes != row.bytes:
        raise InvalidRequest(
            f"The parts have {num_bytes} bytes in total, but the upload was created for {row.bytes}; list every part "
            "once, or start a new upload.",
            code="size_mismatch",
            param="part_ids",
        )
    async with service.uploads.open(caller.project, 0, quota_bytes=caller.limits.max_stored_bytes) as opened:
        ids = [part.id for part in parts]
        try:
            md5, beginning = await asyncio.to_thread(_concatenate, service.artifacts, upload_id, ids, opened.incoming)
        except FileNotFoundError as error:
            raise await _parts_removed(service, caller, upload_id) from error
        if request.md5 is not None and request.md5.lower() != md5:
            raise InvalidRequest(
                f"md5 is {shown(request.md5)}, but the parts have {md5!r}; upload the file again.",
                code="checksum_mismatch",
                param="md5",
            )
        check_beginning(row.filename, beginning)
        if row.purpose == "model":
            await check_model(opened.incoming.path, row.filename)
        file_id, created_at = new_id_at("file")
        file = FileRow(
            id=file_id,
            project=caller.project,
            created_by=caller.key_id,
            filename=row.filename,
            bytes=num_bytes,
            sha256=opened.incoming.sha256,
            purpose=row.purpose,
            created_at=created_at,
        )

        async def finish(session: AsyncSession) -> None:
            current = await _find(session, caller, upload_id, lock=True)
            _require_pending(current)
            current.status, current.file_id = "completed", file_id
            await session.execute(delete(UploadPartRow).where(UploadPartRow.upload_id == upload_id))

        entry = caller.audit_row("file.upload", file_id, project=file.project)
        await service.uploads.store(opened, file, entry, finish)
    await asyncio.to_thread(service.artifacts.discard, parts_key(upload_id))  # again when it expires, if this fails
    row.status = "completed"
    return _to_upload(row, file)


async def cancel(service: Service, caller: Caller, upload_id: str, *, is_retry: bool) -> Upload:
    """Cancel a pending upload and remove its parts. Raises `Conflict` and `NotFound`."""
    async with service.database.write() as session:
        row = await _find(session, caller, upload_id, lock=True)
        if not (is_retry and row.status == "cancelled"):
            _require_pending(row)
        row.status = "cancelled"
        await session.execute(delete(UploadPartRow).where(UploadPartRow.upload_id == upload_id))
    await asyncio.to_thread(service.artifacts.discard, parts_key(upload_id))  # again when it expires, if this fails
    return _to_upload(row)


async def _find(session: AsyncSession, caller: Caller, upload_id: str, *, lock: bool = False) -> UploadRow:
    row: UploadRow | None = None
    if is_id(upload_id, "upload"):
        row = await session.get(UploadRow, upload_id, with_for_update=lock, populate_existing=lock)
    if row is None or row.project != caller.project:
        raise NotFound(
            f"Upload {shown(upload_id)} not found; start one with client.uploads.create.", code="upload_not_found"
        )
    return row


def _require_pending(row: UploadRow) -> None:
    status = _status(row)
    if status != "pending":
        raise Conflict(f"Upload {row.id} is {status}; start a new one.", code="upload_not_pending")


async def _parts_removed(service: Service, caller: Caller, upload_id: str) -> Conflict | Unavailable:
    """The error for parts that disappeared, because another request has ended the upload. Raises `NotFound`."""
    async with service.database.read() as session:
        row = await _find(session, caller, upload_id)
    try:
        _require_pending(row)
    except Conflict as error:
        return error
    return Unavailable(f"The parts of upload {upload_id} are missing in the artifact store; start a new upload.")


async def _stored_parts(session: AsyncSession, upload_id: str) -> dict[str, UploadPartRow]:
    """The parts by their ids."""
    if not is_id(upload_id, "upload"):
        return {}
    rows = await session.scalars(select(UploadPartRow).where(UploadPartRow.upload_id == upload_id))
    return {row.id: row for row in rows}


def _listed_parts(by_id: dict[str, UploadPartRow], part_ids: Sequence[str]) -> list[UploadPartRow]:
    """The parts in the order of ``part_ids``. Raises `InvalidRequest` for an unknown or repeated one."""
    seen: set[str] = set()
    for part_id in part_ids:
        fault = "which is listed twice" if part_id in seen else None
        fault = fault if part_id in by_id else "which is not a part of this upload"
        seen.add(part_id)
        if fault is not None:
            raise InvalidRequest(
                f"part_ids contains {shown(part_id)}, {fault}; list the ids of the parts in their order.",
                code="invalid_part",
                param="part_ids",
            )
    return [by_id[part_id] for part_id in part_ids]


def _concatenate(
    artifacts: Artifacts, upload_id: str, part_ids: Sequence[str], incoming: IncomingFile
) -> tuple[str, bytes]:
    """Copy the parts to ``incoming``. Returns the MD5 in hex and the first bytes.

    Raises `Unavailable`, and `FileNotFoundError` if the parts were removed in the meantime.
    """
    md5, beginning = hashlib.md5(usedforsecurity=False), b""
    for part_id in part_ids:
        with artifacts.open_part(upload_id, part_id) as part:
            while chunk := part.read(_CHUNK_BYTES):
                md5.update(chunk)
                beginning += chunk[: max(0, FIRST_BYTES - len(beginning))]
                incoming.write([memoryview(chunk)])
    return md5.hexdigest(), beginning


def _status(row: UploadRow) -> Literal["pending", "completed", "cancelled", "expired"]:
    if row.status == "pending":
        return "expired" if row.expires_at <= utc_now() else "pending"
    return "completed" if row.status == "completed" else "cancelled"


def _to_upload(row: UploadRow, file: FileRow | None = None) -> Upload:
    created: datetime = row.created_at
    expires: datetime = row.expires_at
    return Upload(
        id=row.id,
        bytes=row.bytes,
        created_at=int(created.timestamp()),
        expires_at=int(expires.timestamp()),
        filename=row.filename,
        purpose=SHOWN[row.purpose],
        status=_status(row),
        file=to_file_object(file) if file is not None else None,
    )
