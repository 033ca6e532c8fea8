"""Shell completion of job ids. It asks the server, and completes nothing if that does not respond at once."""

from __future__ import annotations

NUM_JOBS = 100  # the newest ones, from which a completion is chosen


def complete_job_id(incomplete: str) -> list[tuple[str, str]]:
    """The ids that begin with ``incomplete`` (with or without ``job_``), each with its status and name."""
    from zeta.cli.job_display import progress_cell
    from zeta.client import Client
    from zeta.job_ids import LAST
    from zeta_core.contract.errors import ZetaError
    from zeta_core.contract.printable import printable

    try:
        with Client(patience_seconds=0.0) as client:
            jobs = client.jobs(limit=NUM_JOBS)
    except ZetaError:  # a shell can't show the reason
        return []
    beginnings = (incomplete, f"job_{incomplete}")
    found = [(LAST, "the newest job")] if jobs and LAST.startswith(incomplete) else []
    for job in jobs:
        if job.id.startswith(beginnings):
            words = (str(job.status), progress_cell(job), job.entity_name)
            found.append((job.id, printable(" ".join(word for word in words if word))))
    return found
