"""The models that adapters may name as their bases, according to the specs of the jobs that trained them.

The checkpoint of an adapter names its base in a file that its run has written. A run that was taken over could name a
model of another project, so workers open only the bases that the server names.
"""

from __future__ import annotations

from typing import Any, cast

from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import JobRow

MAX_BASES = 20  # the longest chain of adapters that were trained on adapters


async def names_of_bases(session: AsyncSession, project: str, *models: object) -> list[str]:
    """The names of the bases of ``models``, of the bases of those bases, and so on.

    ``models`` are values of a spec's ``model``. A name is that of a checkpoint (``job_.../final``), an uploaded file
    (``file_...``), or a repository on the Hub. Models of other projects are left out.
    """
    names: list[str] = []
    for model in models:
        job = await _job_of(session, project, model)
        while job is not None and job.spec.get("lora") is not None and len(names) < MAX_BASES:
            source = _source(job)
            job = await _job_of(session, project, source)
            name = _name(source)
            if name is not None and (job is not None or not _is_checkpoint(source)):
                names.append(name)
    return names


async def _job_of(session: AsyncSession, project: str, model: object) -> JobRow | None:
    """The project's job whose checkpoint the model is."""
    if not _is_checkpoint(model):
        return None
    job = await session.get(JobRow, str(cast("dict[str, Any]", model)["job"]))
    return job if job is not None and job.project == project else None


def _source(job: JobRow) -> object:
    """The model that the job was trained on; the server has replaced ``latest`` by the name of a checkpoint."""
    submitted = job.spec.get("model")
    return job.resolved_spec.model if _is_checkpoint(submitted) else submitted


def _is_checkpoint(source: object) -> bool:
    return isinstance(source, dict) and "job" in source


def _name(source: object) -> str | None:
    """The name of a source, as the configuration of an adapter contains it."""
    if isinstance(source, str):
        return source.partition("@")[0]
    values = cast("dict[str, Any]", source) if isinstance(source, dict) else {}
    if "job" in values:
        return f"{values['job']}/{values.get('checkpoint', 'final')}"
    return str(values["file"]) if "file" in values else None
