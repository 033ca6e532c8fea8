"""/v1/files: upload, list, read, download and delete files."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Request, Response
from pydantic import Field

from server import files, lineage
from server.database.pagination import PageQuery, cursor
from server.http.downloads import LINK_RESPONSES, serve
from server.http.proxies import public_path
from server.routes.routing import Router, TheCaller, TheService
from zeta_core.contract.identifiers import NEW_ID_PATTERN
from zeta_core.contract.job.responses import DeletedObject, FileUse, Page, StoredFile

router = Router(prefix="/v1/files", tags=["files"])

UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["dataset", "model"]},
                    },
                }
            }
        },
    }
}


class FileJobQuery(PageQuery):
    after: str | None = cursor(NEW_ID_PATTERN.format(prefix="job"))


class FileQuery(PageQuery):
    after: str | None = cursor(NEW_ID_PATTERN.format(prefix="file"))
    sha256: str | None = Field(default=None, description="only files with this SHA-256, in hex")


@router.post("", status_code=201, openapi_extra=UPLOAD_BODY)
async def upload_file(service: TheService, caller: TheCaller, request: Request, response: Response) -> StoredFile:
    """Upload a data file, or a .tar of a Hugging Face model directory that doesn't refer to files outside it."""
    stored = await files.upload(service, caller, request)
    response.headers["Location"] = public_path(request, f"/v1/files/{stored.id}")
    return stored


@router.get("")
async def list_files(service: TheService, caller: TheCaller, query: Annotated[FileQuery, Query()]) -> Page[StoredFile]:
    """List the files of the project, newest first."""
    return await files.list_files(service, caller, query.sha256, query)


@router.get("/{file_id}")
async def get_file(service: TheService, caller: TheCaller, file_id: str) -> StoredFile:
    """Return the metadata of one file."""
    return await files.get_file(service, caller, file_id)


@router.get("/{file_id}/content", response_class=Response, responses=LINK_RESPONSES)
async def get_file_content(service: TheService, caller: TheCaller, request: Request, file_id: str) -> Response:
    """Download a file. Supports Range, If-Range and If-None-Match; the ETag is the SHA-256."""
    return await serve(
        request, await files.content(service, caller, file_id), by_link=service.settings.downloads_by_link
    )


@router.get("/{file_id}/jobs")
async def list_file_jobs(
    service: TheService, caller: TheCaller, file_id: str, query: Annotated[FileJobQuery, Query()]
) -> Page[FileUse]:
    """List the jobs whose models saw a file, also through the checkpoints of other jobs, newest first."""
    return await lineage.list_file_jobs(service, caller, file_id, query)


@router.delete("/{file_id}")
async def delete_file(service: TheService, caller: TheCaller, file_id: str) -> DeletedObject:
    """Delete a file. Fails while an unfinished job uses it."""
    return await files.delete(service, caller, file_id)
