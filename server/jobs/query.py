"""The filters of a job list: ``?status=&entity_name=&metadata[k]=v``."""

from __future__ import annotations

import re

from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from sqlalchemy import Select, select

from server.database.pages import PageQuery, storable
from server.database.tables import JobRow
from zeta_core.contract.job.status import JobStatus

MAX_METADATA = 16  # maximum number of entries of a job
_METADATA = re.compile(r"\Ametadata\[([^\"\\\]]+)\]\Z")  # without what would end a path in SQLite's JSON


class JobQuery(PageQuery):
    """All filters must match; several ``status`` values match any of them. ``metadata[k]=v`` matches one entry."""

    model_config = ConfigDict(frozen=True, extra="allow")  # metadata[k] is no fixed name; others are refused below

    status: list[JobStatus] = Field(default_factory=list[JobStatus])
    entity_name: str | None = None

    @model_validator(mode="after")
    def _only_metadata_besides(self) -> JobQuery:
        for name in self.model_extra or {}:
            if not _METADATA.match(name):
                raise PydanticCustomError("extra_forbidden", "{name}", {"name": name})
        if (count := len(self.model_extra or {})) > MAX_METADATA:
            sentence = f"metadata[k] is given {count} times; a job has at most {MAX_METADATA} entries."
            raise PydanticCustomError("too_many", "{sentence}", {"name": "metadata", "sentence": sentence})
        return self

    @property
    def metadata(self) -> dict[str, str]:
        found = ((_METADATA.match(name), value) for name, value in (self.model_extra or {}).items())
        return {match.group(1): str(value) for match, value in found if match}


def matching(project: str, asked: JobQuery) -> Select[JobRow]:
    query = select(JobRow).where(JobRow.project == project, JobRow.deleted_at.is_(None))
    if asked.status:
        query = query.where(JobRow.status.in_(sorted(set(asked.status))))
    if asked.entity_name is not None:
        query = query.where(JobRow.entity_name == storable(asked.entity_name))
    for name, value in asked.metadata.items():
        query = query.where(JobRow.job_metadata[storable(name)].as_string() == storable(value))
    return query
