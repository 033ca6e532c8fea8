"""/openai/v1/files and /openai/v1/uploads: upload, list, read, download and delete files with the `openai` client."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Header, Query, Request, Response

from server.http.bodies import read_body
from server.http.downloads import LINK_RESPONSES, serve
from server.openai import files, uploads
from server.openai.bodies import read_fields
from server.openai.errors import OPENAI_ERRORS, OpenAIRoute
from server.openai.file_objects import FileObject
from server.openai.lists import NamedEndsList
from server.routes.routing import Router, TheCaller, TheService, json_body
from zeta_core.contract.errors import InvalidRequest

router = Router(prefix="/openai/v1", tags=["openai"], route_class=OpenAIRoute, responses=OPENAI_ERRORS)


def _form(**fields: dict[str, str]) -> dict[str, Any]:
    """The OpenAPI description of a multipart body that the route parses itself."""
    schema = {"type": "object", "required": list(fields), "additionalProperties": False, "properties": fields}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


_BINARY = {"type": "string", "format": "binary"}
RETRY_COUNT = Header(
    alias="x-stainless-retry-count", ge=0, description="how often the client has repeated this request"
)


@router.post("/files", openapi_extra=_form(file=_BINARY, purpose={"type": "string"}))
async def create_openai_file(service: TheService, caller: TheCaller, request: Request) -> FileObject:
    """Upload a file with purpose `fine-tune`. A file without a suffix is read as JSON Lines."""
    return await files.create(service, caller, request)


@router.get("/files")
async def list_openai_files(
    service: TheService, caller: TheCaller, query: Annotated[files.FileListQuery, Query()]
) -> NamedEndsList[FileObject]:
    """List the uploaded files of the project, followed by the result files of its jobs."""
    return await files.list_files(service, caller, query)


@router.get("/files/{file_id}")
async def get_openai_file(service: TheService, caller: TheCaller, file_id: str) -> FileObject:
    """Return the metadata of one file."""
    return await files.get_file(service, caller, file_id)


@router.get("/files/{file_id}/content", response_class=Response, responses=LINK_RESPONSES)
async def get_openai_file_content(service: TheService, caller: TheCaller, request: Request, file_id: str) -> Response:
    """Download a file. Supports Range, If-Range and If-None-Match."""
    return await serve(
        request, await files.content(service, caller, file_id), by_link=service.settings.downloads_by_link
    )


@router.delete("/files/{file_id}")
async def delete_openai_file(service: TheService, caller: TheCaller, file_id: str) -> files.DeletedFile:
    """Delete an uploaded file. Fails while an unfinished job uses it."""
    return await files.delete(service, caller, file_id)


@router.post("/uploads", openapi_extra=json_body("UploadRequest", required=True))
async def create_openai_upload(service: TheService, caller: TheCaller, request: Request) -> uploads.Upload:
    """Start an upload in parts."""
    limit = service.settings.max_spec_bytes
    body = await read_fields(request, limit, uploads.UploadRequest, error_class=InvalidRequest)
    return await uploads.create(service, caller, body)


@router.post("/uploads/{upload_id}/parts", openapi_extra=_form(data=_BINARY))
async def add_openai_upload_part(
    service: TheService, caller: TheCaller, request: Request, upload_id: str
) -> uploads.UploadPart:
    """Upload the next part."""
    return await uploads.add_part(service, caller, upload_id, request)


@router.post("/uploads/{upload_id}/complete", openapi_extra=json_body("CompletionRequest", required=True))
async def complete_openai_upload(
    service: TheService,
    caller: TheCaller,
    request: Request,
    upload_id: str,
    retry_count: Annotated[int, RETRY_COUNT] = 0,
) -> uploads.Upload:
    """Make a file of the listed parts."""
    body = await read_body(request, uploads.MAX_COMPLETION_BYTES)
    return await uploads.complete(service, caller, upload_id, body, is_retry=retry_count > 0)


@router.post("/uploads/{upload_id}/cancel")
async def cancel_openai_upload(
    service: TheService, caller: TheCaller, upload_id: str, retry_count: Annotated[int, RETRY_COUNT] = 0
) -> uploads.Upload:
    """Cancel an upload and remove its parts."""
    return await uploads.cancel(service, caller, upload_id, is_retry=retry_count > 0)
