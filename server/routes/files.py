"""/v1/files: upload, list, read, download, delete."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Request, Response
from pydantic import Field

from server import files
from server.database.pagination import PageQuery
from server.http.downloads import serve
from server.http.proxies import location
from server.routes.routing import Router, TheCaller, TheService
from zeta_core.contract.job.answers import DeletedObject, Page, StoredFile

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


class FileQuery(PageQuery):
    sha256: str | None = Field(default=None, description="of the file's bytes, in hex")


@router.post("", status_code=201, openapi_extra=UPLOAD_BODY)
async def upload_file(service: TheService, caller: TheCaller, request: Request, response: Response) -> StoredFile:
    """Store a data file, or a .tar of a Hugging Face model directory whose files name nothing outside it."""
    stored = await files.upload(service, caller, request)
    response.headers["Location"] = location(request, f"/v1/files/{stored.id}")
    return stored


@router.get("")
async def list_files(service: TheService, caller: TheCaller, asked: Annotated[FileQuery, Query()]) -> Page[StoredFile]:
    """The files of the project, newest first."""
    return await files.list_files(service, caller, asked.sha256, asked)


@router.get("/{file_id}")
async def get_file(service: TheService, caller: TheCaller, file_id: str) -> StoredFile:
    """One file's description."""
    return await files.get_file(service, caller, file_id)


@router.get("/{file_id}/content", response_class=Response)
async def get_file_content(service: TheService, caller: TheCaller, request: Request, file_id: str) -> Response:
    """The file's bytes; Range, If-Range and If-None-Match are understood, and the ETag is its SHA-256."""
    return serve(request, await files.content(service, caller, file_id))


@router.delete("/{file_id}")
async def delete_file(service: TheService, caller: TheCaller, file_id: str) -> DeletedObject:
    """Remove a file that no job needs any more."""
    return await files.delete(service, caller, file_id)
