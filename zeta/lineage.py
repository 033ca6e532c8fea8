"""Which models saw a file, and which files a model saw."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from zeta.pagination import read_pages
from zeta.transport import HttpTransport
from zeta_core.contract.errors import NotFound
from zeta_core.contract.job.responses import FileUse

if TYPE_CHECKING:
    from zeta.client import Client


@dataclass(frozen=True)
class SeenFile:
    """A file that a model saw: in its own job, or in the job of a checkpoint that it continues from."""

    id: str
    filename: str
    sha256: str | None
    job: str


@dataclass(frozen=True)
class ModelLineage:
    """The files that a job's model saw. ``deleted_jobs`` are bases whose files are unknown, because they are gone."""

    files: list[SeenFile]
    bases: list[str]
    deleted_jobs: list[str]


def jobs_of_file(transport: HttpTransport, file_id: str) -> list[FileUse]:
    """The jobs whose models saw the file, newest first."""
    return list(read_pages(transport, FileUse, f"/v1/files/{quote(file_id, safe='')}/jobs", {}, None))


def files_of_job(client: Client, job_id: str) -> ModelLineage:
    """The files that the model of a job saw, following the checkpoints that it starts from."""
    files: list[SeenFile] = []
    bases: list[str] = []
    deleted: list[str] = []
    queue, known = deque([job_id]), {job_id}
    while queue:
        current = queue.popleft()
        try:
            job = client.job(current)
        except NotFound:
            if current == job_id:
                raise
            deleted.append(current)
            continue
        if current != job_id:
            bases.append(current)
        for file_id, file in job.resolved_spec.files.items():
            files.append(SeenFile(file_id, file.filename, file.sha256, current))
        model, resumed = job.resolved_spec.job_model, job.spec.get("resume_from_checkpoint")
        following = [model.job if model is not None else None, str(resumed).partition("/")[0] if resumed else None]
        for base in following:
            if base is not None and base not in known:
                known.add(base)
                queue.append(base)
    return ModelLineage(files, bases, deleted)
