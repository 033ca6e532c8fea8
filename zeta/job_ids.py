"""Resolving job ids as users type them: a full id, the beginning of one, or ``@last`` for the newest job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from zeta.local_files import exists
from zeta_core.contract.errors import InvalidRequest, NotFound
from zeta_core.contract.identifiers import ID_CHARACTERS, is_id
from zeta_core.contract.job.job import Job

LAST = "@last"


class JobLister(Protocol):
    """Lists jobs, newest first, as `zeta.client.Client` does."""

    def jobs(self, *, limit: int | None = 20) -> Sequence[Job]: ...


def resolve_job_id(client: JobLister, text: str) -> str:
    """Resolve an id, a unique prefix of one (with or without ``job_``), or ``@last`` (`LAST`).

    Raises `NotFound` if no job matches and `InvalidRequest` if several do.
    """
    if is_id(text, "job") and len(text) == len("job_") + ID_CHARACTERS:
        return text
    if text == LAST:
        newest = client.jobs(limit=1)
        if not newest:
            raise NotFound("@last does not exist, because there are no jobs yet; submit one with `zeta submit`.")
        return newest[0].id
    beginning = text if text.startswith("job_") else f"job_{text}"
    matching = [job.id for job in client.jobs(limit=None) if job.id.startswith(beginning)] if text else []
    if not matching:
        raise NotFound(f"No job id starts with {text!r}; `zeta jobs` lists the jobs.")
    if len(matching) > 1:
        shown = ", ".join(matching[:3]) + (" ..." if len(matching) > 3 else "")
        raise InvalidRequest(f"{len(matching)} job ids start with {text!r} ({shown}); give more characters.")
    return matching[0]


def with_full_job(client: JobLister, spec: dict[str, Any]) -> dict[str, Any]:
    """The spec with a full job id if its model is a job's checkpoint, such as ``@last`` or ``job_01k9/step-8``."""
    model = spec.get("model")
    if not isinstance(model, str) or not looks_like_checkpoint(model) or exists(Path(model)):
        return spec
    job, separator, checkpoint = model.partition("/")
    return {**spec, "model": f"{resolve_job_id(client, job)}{separator}{checkpoint}"}


def looks_like_checkpoint(model: str) -> bool:
    """Whether a model is a job's checkpoint, unless a local file has this name."""
    job = model.partition("/")[0]
    return job == LAST or job.startswith("job_")
