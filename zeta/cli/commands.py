"""What can be done to a job: cancel, pause, resume, rerun, delete."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from zeta.cli.app import JOBS, AsJson, JobId, app

if TYPE_CHECKING:
    from zeta_core.contract.job import Job

# What is told while a running job does what was asked.
_UNDER_WAY = {"cancel": "its end is under way", "pause": "it saves a checkpoint and pauses"}


@app.command(rich_help_panel=JOBS)
def cancel(job_id: JobId, as_json: AsJson = False) -> None:
    """Cancel a job; what it has stored stays."""
    from zeta.client import Client
    from zeta.job_ids import full_id

    with Client() as client:
        _tell(client.cancel(full_id(client, job_id)), as_json)


@app.command(rich_help_panel=JOBS)
def pause(job_id: JobId, as_json: AsJson = False) -> None:
    """Pause a job: it saves a checkpoint and frees its device."""
    from zeta.client import Client
    from zeta.job_ids import full_id

    with Client() as client:
        _tell(client.pause(full_id(client, job_id)), as_json)


@app.command(rich_help_panel=JOBS)
def resume(job_id: JobId, as_json: AsJson = False) -> None:
    """Let a paused job go on from its newest checkpoint."""
    from zeta.client import Client
    from zeta.job_ids import full_id

    with Client() as client:
        _tell(client.resume(full_id(client, job_id)), as_json)


@app.command(rich_help_panel=JOBS)
def rerun(
    job_id: JobId,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="K.L=V", help="Change a field, such as learning_rate=1e-4; null removes it."),
    ] = None,
    start: Annotated[
        str, typer.Option("--from", metavar="WHERE", help="start, latest, or a checkpoint such as step-100.")
    ] = "start",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow the new job until it ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a new job out of an earlier one, from its start or from one of its checkpoints."""
    from zeta.cli.follow import follow as follow_job
    from zeta.cli.output import print_json
    from zeta.client import Client
    from zeta.job_ids import full_id
    from zeta.spec_file import apply_settings

    with Client() as client:
        job = client.rerun(full_id(client, job_id), apply_settings({}, settings or []), from_checkpoint=start)
        if as_json:
            print_json(job)
        else:
            hint = "" if follow else f" Follow it: zeta wait {job.id}"
            print(f"{job.id} is {job.status}, a rerun of {job.parent}.{hint}", flush=True)
        if follow:
            raise typer.Exit(follow_job(client, job.id, as_json=as_json))


@app.command(rich_help_panel=JOBS)
def delete(job_id: JobId, as_json: AsJson = False) -> None:
    """Delete an ended job with its checkpoints, logs and events."""
    from zeta.cli.output import print_json
    from zeta.client import Client
    from zeta.job_ids import full_id

    with Client() as client:
        deleted = client.delete(full_id(client, job_id))
    if as_json:
        print_json(deleted)
    else:
        print(f"{deleted.id} is deleted.")


def _tell(job: Job, as_json: bool) -> None:
    from zeta.cli.output import print_json

    if as_json:
        print_json(job)
    else:
        under_way = _UNDER_WAY.get(job.requested_action or "")
        print(f"{job.id} is {job.status}" + (f", {under_way}." if under_way else "."))
