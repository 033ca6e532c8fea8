"""Uploads, lists, serves and deletes files. The bytes are stored before the row, so every row has its bytes."""

from __future__ import annotations

import asyncio

from fastapi import Request
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server.artifacts import stored_file_key
from server.auth import Caller
from server.database.file_tables import FileRow
from server.database.nul_characters import replace_nul
from server.database.object_removals import request_removal
from server.database.pagination import OrderedQuery, PageQuery, newest_first, page
from server.database.tables import JobRow
from server.http.downloads import Content, FilePart
from server.service import Service
from server.uploads.multipart import MAX_FORM_BYTES, FormRules, check_length, receive
from server.uploads.removals import remove_now
from zeta_core.contract.errors import Conflict
from zeta_core.contract.identifiers import is_id, new_id_at
from zeta_core.contract.job.responses import DeletedObject, Page, StoredFile
from zeta_core.contract.job.status import UNFINISHED


async def upload(service: Service, caller: Caller, request: Request, rules: FormRules | None = None) -> StoredFile:
    """Store the file of a multipart body, which has the fields of ``/v1/files`` unless ``rules`` are given.

    Raises `QuotaExceeded` and the errors of `receive`.
    """
    length = request.headers.get("content-length", "")
    announced = int(length) - MAX_FORM_BYTES if length.isdigit() and len(length) <= 18 else 0
    max_bytes = max_upload_bytes(service, caller)
    check_length(length, max_bytes)
    await asyncio.to_thread(service.artifacts.require_free, max(0, announced))
    quota_bytes = caller.limits.max_stored_bytes
    async with service.uploads.open(caller.project, max(0, announced), quota_bytes=quota_bytes) as opened:
        fields = await receive(request, service.uploads, opened, service.settings, rules or FormRules(), max_bytes)
        assert fields.purpose is not None
        file_id, created_at = new_id_at("file")
        row = FileRow(
            id=file_id,
            project=caller.project,
            created_by=caller.key_id,
            filename=fields.filename,
            bytes=opened.incoming.num_bytes,
            sha256=opened.incoming.sha256,
            purpose=fields.purpose,
            created_at=created_at,
        )
        await service.uploads.store(opened, row, caller.audit_row("file.upload", file_id, project=row.project))
    return _to_stored_file(row)


def max_upload_bytes(service: Service, caller: Caller) -> int:
    """The largest file that the caller's project may upload."""
    most, own = service.settings.max_upload_bytes, caller.limits.max_upload_bytes
    return most if own is None else min(most, own)


async def list_files(service: Service, caller: Caller, sha256: str | None, page_query: PageQuery) -> Page[StoredFile]:
    """One page of the caller's files, newest first; with ``sha256``, only those with these bytes."""
    query = select(FileRow).where(FileRow.project == caller.project)
    if sha256 is not None:
        query = query.where(FileRow.sha256 == replace_nul(sha256))
    async with service.database.read() as session:
        matches = OrderedQuery(query, FileRow.created_at, FileRow.id)
        rows, has_more = await newest_first(session, FileRow, [matches], page_query, project=caller.project)
    return page([_to_stored_file(row) for row in rows], has_more, lambda file: file.id)


async def get_file(service: Service, caller: Caller, file_id: str) -> StoredFile:
    async with service.database.read() as session:
        return _to_stored_file(await _find(session, caller, file_id))


async def content(service: Service, caller: Caller, file_id: str) -> Content:
    file = await get_file(service, caller, file_id)
    part = FilePart(service.artifacts.store, stored_file_key(file.id), file.bytes)
    return Content((part,), file.sha256, "application/octet-stream", file.filename)


async def delete(service: Service, caller: Caller, file_id: str) -> DeletedObject:
    """Delete a file. Raises `Conflict` while an unfinished job needs it."""
    async with service.database.write() as session:
        row = await _find(session, caller, file_id, lock=True)
        users = select(JobRow.id, JobRow.status).where(
            JobRow.project == row.project,
            JobRow.status.in_(UNFINISHED),
            JobRow.resolved_spec_json["files"][file_id].as_string().is_not(None),
        )
        user = (await session.execute(users.limit(1))).first()
        if user is not None:
            raise Conflict(
                f"File {file_id} is in use by {user.id}, which is {user.status}; "
                "cancel the job first, or wait until it ends.",
                code="file_in_use",
            )
        await session.delete(row)
        session.add(caller.audit_row("file.delete", file_id, project=row.project))
        await request_removal(session, str(stored_file_key(file_id)))
    await remove_now(service.database, service.artifacts, stored_file_key(file_id))
    return DeletedObject(id=file_id, object="file")


async def _find(session: AsyncSession, caller: Caller, file_id: str, *, lock: bool = False) -> FileRow:
    row = await session.get(FileRow, file_id, with_for_update=lock) if is_id(file_id, "file") else None
    if row is None or row.project != caller.project:
        raise caller.not_found("file", file_id, row.project if row is not None else None)
    return row


def _to_stored_file(row: FileRow) -> StoredFile:
    return StoredFile.model_validate(
        {name: getattr(row, name) for name in ("id", "filename", "bytes", "sha256", "purpose", "created_at")}
    )
