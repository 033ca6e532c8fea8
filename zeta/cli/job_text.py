"""Short descriptions of a job's status, model and data, for tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from zeta_core.contract.job.job import Job

if TYPE_CHECKING:
    from zeta.client import Client

_OBVIOUS_REASONS = ("completed", "cancelled_by_user", "paused_by_user")  # they add nothing to the status


def status_of(job: Job) -> str:
    """The status, with the code of the reason why the job waits, is paused or failed."""
    reason = job.waiting_reason.code if job.waiting_reason is not None else None
    if reason is None and job.status in ("failed", "paused"):
        reason = job.status_reason
    return (
        str(job.status) if reason is None or reason in (*_OBVIOUS_REASONS, job.status) else f"{job.status} ({reason})"
    )


def model_of(job: Job, names: Mapping[str, str]) -> str | None:
    """The model in the job's spec; ``names`` maps the ids of uploaded files to their names."""
    model = job.spec.get("model")
    if not isinstance(model, dict):
        return None if model is None else str(model)
    source = cast("dict[str, Any]", model)
    if isinstance(config := source.get("config"), dict):
        return f"{cast('dict[str, Any]', config).get('model_type')} from scratch"
    if "job" in source:
        return f"{source['job']}/{source.get('checkpoint', 'final')}"
    return _file(source["file"], names) if "file" in source else str(source.get("builder"))


def data_of(job: Job, names: Mapping[str, str]) -> str | None:
    """The data sources in the job's spec, separated by commas."""
    dataset = job.spec.get("dataset")
    sources = cast("list[Any]", dataset if isinstance(dataset, list) else [dataset])
    return ", ".join(_source(source, names) for source in sources if source is not None) or None


def _source(source: Any, names: Mapping[str, str]) -> str:
    if not isinstance(source, dict):
        return str(source)
    fields = cast("dict[str, Any]", source)
    files = fields.get("file")
    if files is not None:
        return ", ".join(_file(one, names) for one in cast("list[Any]", files if isinstance(files, list) else [files]))
    return next((str(fields[kind]) for kind in ("hub", "path", "builtin") if kind in fields), str(fields))


def _file(file_id: Any, names: Mapping[str, str]) -> str:
    return names.get(str(file_id), str(file_id))


def file_names(client: Client, jobs: Sequence[Job]) -> dict[str, str]:
    """The names of the uploaded files that the jobs use, by id. Deleted files are missing."""
    if not any('"file"' in job.model_dump_json(include={"spec"}) for job in jobs):
        return {}
    return {file.id: file.filename for file in client.files(limit=None)}
