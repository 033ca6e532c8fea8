"""Shell completion of ids and names. It asks the server, and completes nothing if that does not respond at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from zeta.client import Client

NUM_LISTED = 100  # the newest objects, from which a completion is chosen

Completed = Literal["job", "file or job", "sweep", "worker", "key", "webhook", "project"]


def complete(kind: Completed, incomplete: str) -> list[tuple[str, str]]:
    """The ids or names that begin with ``incomplete``, each with a description. ``job_`` may be left out."""
    from zeta.client import Client
    from zeta_core.contract.errors import ZetaError
    from zeta_core.contract.printable import printable

    try:
        with Client(patience_seconds=0.0) as client:
            listed = [*_listed(client, kind)]
    except ZetaError:  # a shell can't show the reason
        return []
    beginnings = (incomplete, f"job_{incomplete}")
    return [(name, printable(description)) for name, description in listed if name.startswith(beginnings)]


def _listed(client: Client, kind: Completed) -> Iterable[tuple[str, str]]:
    """The objects, newest first, each with its description."""
    match kind:
        case "job":
            yield from _jobs(client)
        case "file or job":
            yield from _jobs(client)
            yield from ((file.id, file.filename) for file in client.files(limit=NUM_LISTED))
        case "sweep":
            yield from ((sweep.id, ", ".join(sweep.fields)) for sweep in client.sweeps.list(limit=NUM_LISTED))
        case "worker":
            yield from ((worker.name, worker.status) for worker in client.workers())
        case "key":
            yield from ((key.id, key.name) for key in client.admin.keys(limit=NUM_LISTED))
        case "webhook":
            yield from ((hook.id, hook.name or hook.url) for hook in client.webhooks.list(limit=NUM_LISTED))
        case "project":
            yield from ((project.name, "") for project in client.admin.projects())


def _jobs(client: Client) -> Iterable[tuple[str, str]]:
    from zeta.cli.job_display import progress_cell
    from zeta.job_ids import LAST

    jobs = client.jobs(limit=NUM_LISTED)
    if jobs:
        yield LAST, "the newest job"
    for job in jobs:
        words = (str(job.status), progress_cell(job), job.entity_name)
        yield job.id, " ".join(word for word in words if word)
