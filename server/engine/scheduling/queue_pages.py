"""Reads the queue in pages: first the jobs that the order of the queue considers first.

A page contains the oldest waiting jobs of several projects, those with the smallest share first, because a single
project with thousands of jobs must not hide the others. Each query reads a few entries of an index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, func, literal_column, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import JobCountRow, JobRow
from zeta_core.contract.job.kind import BACKGROUND_KINDS
from zeta_core.contract.job.status import JobStatus

PAGE_JOBS = 200
MIN_JOBS = 10  # of each project in a page, so a page takes 20 queries at most

QueuedRow = Any  # a row of `COLUMNS`

COLUMNS = select(
    JobRow.id,
    JobRow.kind,
    JobRow.project,
    JobRow.attempt,
    JobRow.priority,
    JobRow.created_at,
    JobRow.worker,
    JobRow.dispatched_at,
    JobRow.not_before,
    JobRow.waiting_reason,
    JobRow.spec["resources"].label("resources"),
    JobRow.spec["model"].label("model"),
    JobRow.spec["dataset"].label("dataset"),
    JobRow.resolved_spec_json["model"].label("resolved_model"),
    JobRow.resolved_spec_json["resources"].label("resolved_resources"),
    JobRow.resolved_spec_json["threads"].label("resolved_threads"),
    JobRow.resolved_spec_json["device_kind"].label("device_kind"),
    JobRow.spec["time_limit_seconds"].label("time_limit"),
    JobRow.spec["resume_from_checkpoint"].label("resumed"),
    JobRow.spec["elastic"].label("elastic"),
    JobRow.resolved_spec_json["global_batch_size"].label("global_batch_size"),
    JobRow.progress["eta_seconds"].as_float().label("eta_seconds"),
)
# Parameters would not match the conditions of the partial indexes.
_IS_QUEUED = JobRow.status == literal_column(f"'{JobStatus.QUEUED}'")
_IS_OTHER_KIND = JobRow.kind != literal_column("'training'")
# These statements are built once, because building one takes longer than executing it.
_OF_A_PART = COLUMNS.where(
    _IS_QUEUED,
    JobRow.worker.is_(None),
    JobRow.project == bindparam("project"),
    JobRow.priority == bindparam("priority"),
).order_by(JobRow.created_at, JobRow.id)
_FIRST_ROWS = _OF_A_PART.limit(bindparam("num_rows"))
_LAST = bindparam("last_created_at", type_=JobRow.created_at.type), bindparam("last_id", type_=JobRow.id.type)
_NEXT_ROWS = _FIRST_ROWS.where(tuple_(JobRow.created_at, JobRow.id) > tuple_(*_LAST))
_DISPATCHED = COLUMNS.where(_IS_QUEUED, JobRow.worker.is_not(None))
_BACKGROUND = (
    COLUMNS.where(JobRow.status == JobStatus.QUEUED, _IS_OTHER_KIND)
    .where(JobRow.kind.in_(sorted(BACKGROUND_KINDS)), JobRow.worker.is_(None))
    .order_by(JobRow.priority.desc(), JobRow.created_at, JobRow.id)
    .limit(PAGE_JOBS)
)


async def dispatched_jobs(session: AsyncSession) -> Sequence[QueuedRow]:
    """The queued jobs that a worker has not claimed yet."""
    return (await session.execute(_DISPATCHED)).all()


async def first_background_jobs(session: AsyncSession) -> Sequence[QueuedRow]:
    return (await session.execute(_BACKGROUND)).all()


async def queue_version(session: AsyncSession) -> object:
    """A value that almost always changes when a job enters or leaves the queue."""
    columns = func.max(JobCountRow.id), func.sum(JobCountRow.count)
    return tuple((await session.execute(select(*columns).where(JobCountRow.status == JobStatus.QUEUED))).one())


@dataclass
class _Part:
    """The waiting jobs of one project and priority; ``last`` is the last row that was read."""

    project: str
    priority: int
    last: QueuedRow | None = None
    is_complete: bool = False

    async def read(self, session: AsyncSession, limit: int) -> Sequence[QueuedRow]:
        values: dict[str, Any] = {"project": self.project, "priority": self.priority, "num_rows": limit}
        if self.last is None:
            rows = (await session.execute(_FIRST_ROWS, values)).all()
        else:
            values |= {"last_created_at": self.last.created_at, "last_id": self.last.id}
            rows = (await session.execute(_NEXT_ROWS, values)).all()
        self.is_complete = len(rows) < limit
        self.last = rows[-1] if rows else self.last
        return rows


class QueuePages:
    """The pages of the queue, as long as `is_complete` is false. ``share`` is that of a project now."""

    def __init__(self, share: Callable[[str], float]) -> None:
        self._share = share
        self._parts: list[_Part] | None = None

    @property
    def is_complete(self) -> bool:
        return self._parts is not None and all(part.is_complete for part in self._parts)

    async def next_page(self, session: AsyncSession) -> Sequence[QueuedRow]:
        """The next jobs, up to about `PAGE_JOBS`."""
        if self._parts is None:
            self._parts = [_Part(project, priority) for project, priority in await _projects_and_priorities(session)]
        page: list[QueuedRow] = []
        for parts in self._by_priority():
            limit = max(min(MIN_JOBS, PAGE_JOBS), PAGE_JOBS // len(parts))
            for part in parts:
                if len(page) >= PAGE_JOBS:
                    return page
                page += await part.read(session, min(limit, PAGE_JOBS))
            if any(not part.is_complete for part in parts):
                return page  # the rest of this priority comes before the next one
        return page

    def _by_priority(self) -> Iterator[Sequence[_Part]]:
        remaining = [part for part in self._parts or () if not part.is_complete]
        for priority in sorted({part.priority for part in remaining}, reverse=True):
            parts = [part for part in remaining if part.priority == priority]
            yield sorted(parts, key=lambda part: (self._share(part.project), part.project))


async def _projects_and_priorities(session: AsyncSession) -> Sequence[tuple[str, int]]:
    """Each project and priority with queued jobs. The recursion reads one entry of the index for each."""
    first = select(func.min(JobRow.project).label("project")).where(_IS_QUEUED)
    projects = first.cte("projects", recursive=True)
    following = select(func.min(JobRow.project)).where(_IS_QUEUED, JobRow.project > projects.c.project)
    projects = projects.union_all(select(following.scalar_subquery()).where(projects.c.project.is_not(None)))

    highest = select(func.max(JobRow.priority)).where(_IS_QUEUED, JobRow.project == projects.c.project)
    start = select(projects.c.project.label("project"), highest.scalar_subquery().label("priority"))
    pairs = start.where(projects.c.project.is_not(None)).cte("pairs", recursive=True)
    lower = select(func.max(JobRow.priority)).where(
        _IS_QUEUED, JobRow.project == pairs.c.project, JobRow.priority < pairs.c.priority
    )
    pairs = pairs.union_all(select(pairs.c.project, lower.scalar_subquery()).where(pairs.c.priority.is_not(None)))
    rows = await session.execute(select(pairs.c.project, pairs.c.priority).where(pairs.c.priority.is_not(None)))
    return [(project, priority) for project, priority in rows]
