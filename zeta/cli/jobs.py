"""The commands that read jobs: jobs, job, wait, events, logs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from zeta.cli.app import JOBS, AsJson, JobId, app
from zeta_core.contract.job.order import JobSort


@app.command("jobs", rich_help_panel=JOBS)
def list_jobs(
    status: Annotated[str | None, typer.Option(help="List only jobs with this status.")] = None,
    entity_name: Annotated[str | None, typer.Option("--name", help="List only jobs with this entity_name.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="List only jobs of this kind: training, export, batch or evaluation.")
    ] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="List only jobs with this metadata. Repeatable.")
    ] = None,
    sort: Annotated[
        JobSort | None,
        typer.Option(
            metavar="FIELD",
            help="Order by created, name, status, progress, time_left, loss or eval_loss; descending with a minus.",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of jobs.")] = 20,
    show_all: Annotated[bool, typer.Option("--all", help="List all jobs.")] = False,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first.

    --sort changes the order, such as --sort loss or --sort -progress; jobs without a value come last. The table fits
    the terminal width (80 columns in a pipe; COLUMNS overrides both), and long names are shortened in the middle.
    `zeta job ID` shows them in full. LOSS is the mean over the tokens of the last 50 steps, EVAL the newest loss on
    held-out data.
    """
    from zeta.cli.job_display import file_names
    from zeta.cli.job_table import print_jobs
    from zeta.cli.output import print_list
    from zeta.client import Client

    with Client() as client:
        listed = client.jobs(
            status=status,
            entity_name=entity_name,
            kind=kind,
            metadata=_read_metadata(metadata or []),
            sort=sort,
            limit=None if show_all else limit,
        )
        names = {} if as_json else file_names(client, listed)
    print_list(listed) if as_json else print_jobs(listed, names)


def _read_metadata(pairs: Sequence[str]) -> dict[str, str]:
    """The entries of repeated ``--metadata NAME=VALUE``. Raises `InvalidRequest`."""
    from zeta_core.contract.errors import InvalidRequest

    entries: dict[str, str] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise InvalidRequest(f"--metadata {pair!r} has no value; write it as name=value.")
        entries[name] = value
    return entries


@app.command("job", rich_help_panel=JOBS)
def show_job(job_id: JobId, as_json: AsJson = False) -> None:
    """Show a job's status, progress, result and warnings."""
    from zeta.cli.job_display import (
        advice_rows,
        attempt_cell,
        data_cell,
        eval_cell,
        file_names,
        loss_cell,
        model_cell,
        progress_cell,
        start_cell,
        time_cell,
        worker_cell,
    )
    from zeta.cli.output import print_fields, print_json
    from zeta.client import Client
    from zeta.job_ids import resolve_job_id

    with Client() as client:
        job = client.job(resolve_job_id(client, job_id))
        names = {} if as_json else file_names(client, [job])
    if as_json:
        print_json(job)
        return
    waiting, result = job.waiting_reason, job.result
    print_fields(
        (
            ("id", job.id),
            ("kind", job.kind),
            ("status", job.status if job.status_reason is None else f"{job.status} ({job.status_reason})"),
            ("requested", job.requested_action),
            ("waiting for", None if waiting is None else f"{waiting.message} ({waiting.code})"),
            ("queue position", job.queue_position),
            ("estimated start", start_cell(job)),
            ("name", job.entity_name),
            ("model", model_cell(job, names)),
            ("data", data_cell(job, names)),
            ("attempt", attempt_cell(job)),
            ("worker", worker_cell(job)),
            ("step", progress_cell(job)),
            ("loss (last 50 steps)", loss_cell(job)),
            ("mean loss", None if result is None or result.train_loss is None else f"{result.train_loss:.4f}"),
            ("held-out loss", eval_cell(job)),
            ("running time", time_cell(job)),
            ("created", job.created_at),
            ("started", job.started_at),
            ("finished", job.finished_at),
            ("checkpoints", job.checkpoints),
            ("best checkpoint", None if result is None else result.best_checkpoint),
            ("final checkpoint", job.final_checkpoint),
            *advice_rows(job),
        )
    )


@app.command(rich_help_panel=JOBS)
def wait(
    job_id: JobId,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Stop waiting after this many seconds.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Wait until a job has ended, and show its progress.

    With --json, only the ended job is printed. The exit status is 0 if it succeeded, 1 if it
    failed, and 3 if it was cancelled.
    """
    from zeta.cli.exit_status import exit_status_of_job
    from zeta.cli.follow import follow, wait_quietly
    from zeta.cli.job_display import outcome_text
    from zeta.cli.output import print_json, print_text
    from zeta.client import Client
    from zeta.job_ids import resolve_job_id
    from zeta_core.contract.job.status import ENDED

    with Client() as client:
        resolved_id = resolve_job_id(client, job_id)
        # The history of a job that has already ended is shown in a terminal only, not in a pipe or a file.
        if not as_json and (sys.stdout.isatty() or client.job(resolved_id).status not in ENDED):
            raise typer.Exit(follow(client, resolved_id, timeout_seconds=timeout))
        job = wait_quietly(client, resolved_id, timeout, as_json=as_json)
    if as_json:
        print_json(job)
    else:
        print_text(outcome_text(job))
    raise typer.Exit(exit_status_of_job(job))


@app.command(rich_help_panel=JOBS)
def events(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print new events until the job has ended.")] = False,
    after: Annotated[int, typer.Option(min=0, metavar="SEQ", help="Print only events after this sequence number.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Print a job's events, oldest first."""
    from zeta.cli.event_text import print_event, print_event_line
    from zeta.cli.follow import interruption
    from zeta.client import Client
    from zeta.job_ids import resolve_job_id

    with Client() as client:
        resolved_id = resolve_job_id(client, job_id)
        source = (
            client.events(resolved_id, after=after, on_interruption=interruption(as_json))
            if follow
            else client.stored_events(resolved_id, after=after)
        )
        for event in source:
            if as_json:
                print_event(event)
            else:
                print_event_line(event, resolved_id)


@app.command(rich_help_panel=JOBS)
def logs(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print new lines until the job has ended.")] = False,
    tail: Annotated[int | None, typer.Option(min=0, metavar="LINES", help="Print only the last lines.")] = None,
    attempt: Annotated[int | None, typer.Option(min=1, help="Print only the log of this attempt.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Keep all control characters and escape sequences.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print a job's log: the output of its training processes.

    Escape sequences are removed (except colours in a terminal), and other control characters are escaped.
    """
    from zeta.cli.follow import interruption
    from zeta.cli.log_sanitizer import LogSanitizer
    from zeta.cli.output import print_json
    from zeta.client import Client
    from zeta.job_ids import resolve_job_id

    sanitizer = LogSanitizer(keep_colours=sys.stdout.isatty())
    with Client() as client:
        log = client.logs(
            resolve_job_id(client, job_id),
            follow=follow,
            tail=tail,
            attempt=attempt,
            on_interruption=interruption(as_json),
        )
        try:
            for piece in log:
                if as_json:
                    print_json({"text": piece})
                else:
                    sys.stdout.write(piece if raw else sanitizer.feed(piece))
                    sys.stdout.flush()
        finally:
            sys.stdout.write(sanitizer.end())
