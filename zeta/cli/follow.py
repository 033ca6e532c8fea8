"""Following a job live until it has ended. Ctrl-C stops following; the job continues."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from zeta.cli.event_views import open_view
from zeta.cli.exit_status import ExitStatus, exit_status_of_job
from zeta.cli.job_display import outcome_text
from zeta.cli.output import notice, print_json, print_text
from zeta.client import Client
from zeta_core.contract.errors import ZetaError
from zeta_core.contract.job.job import Job


class Detached(ZetaError):
    """The user stopped following with Ctrl-C; the job continues."""

    type = "interrupted"
    code = "detached"


def follow(client: Client, job_id: str, *, as_json: bool = False, timeout_seconds: float | None = None) -> ExitStatus:
    """Show the job until it has ended, then its outcome, which the exit status reports as well."""
    # A shell that starts a command with `&` makes it ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        job = show(client, job_id, as_json=as_json, timeout_seconds=timeout_seconds)
    except KeyboardInterrupt:
        left = Detached(
            f"Stopped following; {job_id} continues. Follow it again with `zeta wait {job_id}`, or cancel it with "
            f"`zeta cancel {job_id}`."
        )
        if as_json:
            print(left.body().model_dump_json(), file=sys.stderr)
        notice(f"\n{left.message}", as_json=as_json)
        return ExitStatus.INTERRUPTED
    return exit_status_of_job(job)


def show(client: Client, job_id: str, *, as_json: bool = False, timeout_seconds: float | None = None) -> Job:
    """Show the job until it has ended, then its outcome. Raises `KeyboardInterrupt` on Ctrl-C."""
    with open_view(as_json, job_id) as view:
        job = client.wait(
            job_id, timeout_seconds=timeout_seconds, on_event=view.show, on_interruption=interruption(as_json)
        )
    if as_json:
        print_json(job)
    else:
        print_text(outcome_text(job))
    return job


def wait_quietly(client: Client, job_id: str, timeout_seconds: float | None, *, as_json: bool) -> Job:
    """Wait without showing anything."""
    return client.wait(job_id, timeout_seconds=timeout_seconds, on_interruption=interruption(as_json))


def interruption(as_json: bool) -> Callable[[ZetaError], None]:
    """A callback that reports a lost connection to the user."""
    return lambda error: notice(f"{error.message} Reconnecting.", as_json=as_json)
