"""The page of uploaded files: uploading in parts that survive a lost connection, and deleting."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Response
from pydantic import BaseModel, ConfigDict

from server import files
from server.database.pagination import PageQuery
from server.routes.routing import TheService
from server.web.pages import PageRouter, ReadPage, SubmitPage

router = PageRouter()
PAGE_SIZE = 100


class FilesQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    after: str | None = None


@router.get("/files")
async def show_files(service: TheService, page: ReadPage, query: Annotated[FilesQuery, Query()]) -> Response:
    """The files of the project, newest first."""
    listed = await files.list_files(service, page.caller, None, PageQuery(limit=PAGE_SIZE, after=query.after))
    max_bytes = files.max_upload_bytes(service, page.caller)
    return page.render("files.html", files=listed, after=query.after, max_bytes=max_bytes)


@router.post("/files/{file_id}/delete")
async def delete_file(service: TheService, page: SubmitPage, file_id: str) -> Response:
    """Delete a file that no unfinished job needs."""
    await files.delete(service, page.caller, file_id)
    return page.redirect("/files")
