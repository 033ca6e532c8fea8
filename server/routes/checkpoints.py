"""/v1/jobs/{id}/checkpoints: list, read and download checkpoints."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from server.database.pagination import PageQuery, cursor
from server.http.downloads import LINK_RESPONSES, serve
from server.jobs import checkpoints
from server.routes.routing import Router, TheCaller, TheService
from zeta_core.contract.job.checkpoint import Manifest
from zeta_core.contract.job.responses import Page

router = Router(prefix="/v1/jobs/{job_id}/checkpoints", tags=["checkpoints"])


class CheckpointQuery(PageQuery):
    after: str | None = cursor("^(step-[0-9]{1,18}|best|final)$")


class ArchiveQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    include: str | None = Field(default=None, max_length=1000, description="a glob for the paths of files to include")
    state: bool = Field(default=False, description="include training_state/, which is required to resume")


@router.get("")
async def list_checkpoints(
    service: TheService, caller: TheCaller, job_id: str, query: Annotated[CheckpointQuery, Query()]
) -> Page[Manifest]:
    """List the manifests of a job's checkpoints, newest first."""
    return await checkpoints.list_checkpoints(service, caller, job_id, query.after, query.limit)


@router.get("/{name}")
async def get_checkpoint(service: TheService, caller: TheCaller, job_id: str, name: str) -> Manifest:
    """Return the manifest of the checkpoint `step-N`, `best`, `final` or `latest`."""
    return (await checkpoints.find_checkpoint(service, caller, job_id, name)).manifest


@router.get("/{name}/files/{path:path}", response_class=Response, responses=LINK_RESPONSES)
async def get_checkpoint_file(
    service: TheService, caller: TheCaller, request: Request, job_id: str, name: str, path: str
) -> Response:
    """Download one file. Supports Range, If-Range and If-None-Match; the ETag is the SHA-256."""
    stored = await checkpoints.find_checkpoint(service, caller, job_id, name)
    return await serve(request, checkpoints.file_content(stored, path), by_link=service.settings.downloads_by_link)


@router.get("/{name}/archive", response_class=Response)
async def get_checkpoint_archive(
    service: TheService,
    caller: TheCaller,
    request: Request,
    job_id: str,
    name: str,
    query: Annotated[ArchiveQuery, Query()],
) -> Response:
    """Download the checkpoint as a .tar file with reproducible contents, so that the download can be resumed."""
    stored = await checkpoints.find_checkpoint(service, caller, job_id, name)
    return await serve(request, checkpoints.archive_content(stored, job_id, query.include, query.state))
