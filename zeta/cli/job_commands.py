"""The commands that change a job: cancel, pause, resume, checkpoint, rerun, delete."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from zeta.cli.app import JOBS, AsJson, JobId, app, completing

if TYPE_CHECKING:
    from zeta_core.contract.job.job import Job

# A running job carries out a command some time after the request.
_PENDING_ACTIONS = {"cancel": "it is being cancelled", "pause": "it is saving a checkpoint and will then pause"}


@app.command(rich_help_panel=JOBS)
def cancel(
    job_id: Annotated[
        str,
        typer.Argument(
            metavar="ID",
            help="A job id, the beginning of one, @last, or the id of a sweep.",
            autocompletion=completing("job"),
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Cancel a job, or all unfinished jobs of a sweep. Their checkpoints, logs and events are kept."""
    from zeta.cli.output import print_json, print_text
    from zeta.client import Client
    from zeta.job_ids import resolve_job_id

    with Client() as client:
        if job_id.startswith("sweep_"):
            sweep = client.sweeps.cancel(job_id)
            if as_json:
                print_json(sweep)
            else:
                print_text(f"The unfinished jobs of {sweep.id} are being cancelled. Show them: zeta sweeps {sweep.id}")
            return
        _print_job(client.cancel(resolve_job_id(client, job_id)), as_json)


@app.command(rich_help_panel=JOBS)
def pause(job_id: JobId, as_json: AsJson = False) -> None:
    """Pause a job. It saves a checkpoint and frees its device."""
    from zeta.client import Client
    from zeta.job_ids import resolve_job_id

    with Client() as client:
        _print_job(client.pause(resolve_job_id(client, job_id)), as_json)


@app.command(rich_help_panel=JOBS)
def resume(job_id: JobId, as_json: AsJson = False) -> None:
    """Resume a paused job from its newest checkpoint."""
    from zeta.client import Client
    from zeta.job_ids import resolve_job_id

    with Client() as client:
        _print_job(client.resume(resolve_job_id(client, job_id)), as_json)


@app.command(rich_help_panel=JOBS)
def checkpoint(job_id: JobId, as_json: AsJson = False) -> None:
    """Save a checkpoint of a running job now. The job continues."""
    from zeta.cli.output import print_json, print_text
    from zeta.client import Client
    from zeta.job_ids import resolve_job_id

    with Client() as client:
        job = client.save_checkpoint(resolve_job_id(client, job_id))
    if as_json:
        print_json(job)
    else:
        print_text(
            f"{job.id} saves a checkpoint after its current step. List its checkpoints: zeta checkpoints {job.id}"
        )


@app.command(rich_help_panel=JOBS)
def rerun(
    job_id: JobId,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Change a field, such as learning_rate=1e-4; null removes it. Repeatable.",
        ),
    ] = None,
    start: Annotated[
        str,
        typer.Option("--from", metavar="CHECKPOINT", help="Checkpoint to continue from: step-N or latest; or start."),
    ] = "start",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow the new job until it ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Create a job from an earlier one.

    The new job trains from the start, or continues from a checkpoint of the earlier job.
    """
    from zeta.cli.follow import follow as follow_job
    from zeta.cli.output import print_json, print_text
    from zeta.client import Client
    from zeta.job_ids import resolve_job_id
    from zeta.spec_file import apply_settings

    with Client() as client:
        job = client.rerun(resolve_job_id(client, job_id), apply_settings({}, settings or []), from_checkpoint=start)
        if as_json:
            print_json(job)
        else:
            hint = "" if follow else f" Follow it: zeta wait {job.id}"
            print_text(f"{job.id} is {job.status} as a rerun of {job.parent}.{hint}")
        if follow:
            raise typer.Exit(follow_job(client, job.id, as_json=as_json))


@app.command(rich_help_panel=JOBS)
def delete(job_id: JobId, as_json: AsJson = False) -> None:
    """Delete a finished job with its checkpoints, logs and events."""
    from zeta.cli.output import print_json
    from zeta.client import Client
    from zeta.job_ids import resolve_job_id

    with Client() as client:
        deleted = client.delete(resolve_job_id(client, job_id))
    if as_json:
        print_json(deleted)
    else:
        print(f"Deleted {deleted.id}.")


def _print_job(job: Job, as_json: bool) -> None:
    from zeta.cli.output import print_json, print_text

    if as_json:
        print_json(job)
    else:
        pending = _PENDING_ACTIONS.get(job.requested_action or "")
        print_text(f"{job.id} is {job.status}" + (f"; {pending}." if pending else "."))
