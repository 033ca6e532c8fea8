"""The commands that list, run, observe, add, drain and revoke workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from zeta.cli.app import SERVICE, AsJson, app, completing
from zeta.cli.service import Home, exec_module

if TYPE_CHECKING:
    from zeta_core.contract.access import CreatedWorkerSecret
    from zeta_core.contract.job.responses import DeviceReport, Worker

worker_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
workers_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(worker_app, name="worker", rich_help_panel=SERVICE)
app.add_typer(workers_app, name="workers", rich_help_panel=SERVICE)

CLOCK_NOTICE_SECONDS = 10.0  # a larger difference between the clocks of a worker and the server is shown

NewName = Annotated[str, typer.Argument(metavar="NAME", help="The worker's name.")]
WorkerName = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="A worker's name, as `zeta workers` lists it.", autocompletion=completing("worker")
    ),
]


@worker_app.callback()
def worker(
    context: typer.Context,
    home: Home = None,
    stop_after: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="TIME",
            help="Stop after this time, such as 3h55m: runs save a checkpoint and are queued again, and the exit "
            "status is 0 (ZETA_STOP_AFTER_SECONDS). Default: no limit.",
        ),
    ] = None,
) -> None:
    """Run one worker in the foreground, or drain a running one.

    The worker is configured by ZETA_REDIS_URL, ZETA_ARTIFACTS_URL and ZETA_WORKER_SECRET.
    """
    from zeta.cli.durations import seconds_of

    if context.invoked_subcommand is None:
        seconds = None if stop_after is None else seconds_of(stop_after, "--for")
        exec_module("worker", "worker", "celery", home=home, stop_after_seconds=seconds)


@worker_app.command()
def drain(name: WorkerName, as_json: AsJson = False) -> None:
    """Stop assigning jobs to a worker.

    Its running jobs save a checkpoint and are queued again. The worker stays drained, even if it restarts, until
    `zeta worker undrain`.
    """
    _set_draining(name, True, as_json)


@worker_app.command()
def undrain(name: WorkerName, as_json: AsJson = False) -> None:
    """Assign jobs to a drained worker again."""
    _set_draining(name, False, as_json)


def _set_draining(name: str, draining: bool, as_json: bool) -> None:
    from zeta.cli.output import print_json, print_text
    from zeta.client import Client

    with Client() as client:
        worker = client.drain(name, draining=draining)
    if as_json:
        print_json(worker)
        return
    jobs = [slot.job_id for slot in worker.listed_slots if slot.job_id is not None]
    handed_back = f" It is handing back {', '.join(jobs)}." if draining and jobs else ""
    print_text(f"{worker.name} is {worker.status}.{handed_back}")


@workers_app.callback()
def workers(context: typer.Context, as_json: AsJson = False) -> None:
    """List workers and what they do, show the usage of a machine, or manage the workers' secrets.

    A slot runs a job, serves models, is free, or can't be used because its GPU has a problem. Managing secrets needs a
    key with the scope `admin`.
    """
    if context.invoked_subcommand is None:
        _list_workers(as_json)


@workers_app.command()
def usage(
    name: WorkerName,
    hours: Annotated[int, typer.Option(min=1, max=168, help="How many hours to look back.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Show the usage of a worker's cores, memory and GPUs over time.

    The figures include other programs on the machine. Each one is a mean over 15 seconds, or over five minutes for more
    than one hour.
    """
    from zeta.cli.output import print_json, print_text, terminal_size
    from zeta.cli.usage_display import usage_lines
    from zeta.client import Client

    with Client() as client:
        recorded = client.worker_usage(name, hours=hours)
    if as_json:
        print_json(recorded)
    elif not recorded.at:
        print_text(f"No usage of {name} was recorded in the last {hours} h; a worker reports it once it is connected.")
    else:
        print("\n".join(usage_lines(recorded, hours, terminal_size().columns)))


@workers_app.command()
def add(name: NewName, as_json: AsJson = False) -> None:
    """Let a worker join with a secret of its own, and print the line that starts it.

    The secret can't be shown again. No other worker can use it, and `zeta workers revoke` ends it.
    """
    from zeta.client import Client

    with Client() as client:
        _print_secret(client.admin.add_worker(name), f"Added worker {name}", as_json)


@workers_app.command()
def rotate(
    name: WorkerName,
    grace: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="How long the old secret continues to work: 1h, 7d. Default: it stops at once."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replace the secret of a worker, and print the line that starts it.

    A running worker stops when its old secret does; after it was started again, its jobs continue.
    """
    from zeta.cli.durations import seconds_of
    from zeta.client import Client

    grace_seconds = 0 if grace is None else seconds_of(grace, "--grace")
    with Client() as client:
        rotated = client.admin.rotate_worker_secret(name, grace_seconds=grace_seconds)
        _print_secret(rotated, f"Rotated the secret of worker {name}", as_json)


@workers_app.command()
def revoke(name: WorkerName, as_json: AsJson = False) -> None:
    """Revoke the secret of a worker. Its messages are rejected, and its jobs move to other workers."""
    from zeta.cli.output import print_json, print_text
    from zeta.client import Client

    with Client() as client:
        revoked = client.admin.revoke_worker(name)
    if as_json:
        print_json(revoked)
    else:
        print_text(f"Revoked worker {revoked.id}.")


@workers_app.command(name="secrets")
def list_secrets(as_json: AsJson = False) -> None:
    """List the workers that have a secret of their own, by name."""
    from zeta.cli.output import print_list
    from zeta.cli.table import Column, print_table
    from zeta.client import Client

    with Client() as client:
        listed = client.admin.worker_secrets()
    if as_json:
        print_list(listed)
        return
    rows = [
        (secret.name, "revoked" if secret.revoked_at is not None else "valid", secret.created_at, secret.created_by)
        for secret in listed
    ]
    columns = (
        Column("NAME", min_width=8),
        Column("SECRET"),
        Column("CREATED", drop_order=2),
        Column("CREATED BY", min_width=8, drop_order=1),
    )
    print_table(columns, rows, none="No worker has a secret of its own; `zeta workers add` creates one.")


def _print_secret(created: CreatedWorkerSecret, sentence: str, as_json: bool) -> None:
    from zeta.cli.output import notice, print_json

    if as_json:
        print_json(created)
        return
    print(f"ZETA_WORKER_SECRET={created.secret} zeta worker", flush=True)
    notice(
        f"{sentence}. The secret can't be shown again. Run the line on the worker's machine, where ZETA_REDIS_URL and "
        "ZETA_ARTIFACTS_URL must be set as for the server.",
        as_json=as_json,
    )


def _list_workers(as_json: bool) -> None:
    from zeta.cli.output import print_list, size
    from zeta.cli.table import Column, print_table
    from zeta.client import Client
    from zeta_core.contract.identifiers import ID_CHARACTERS

    with Client() as client:
        listed = client.workers()
    if as_json:
        print_list(listed)
        return
    rows = [
        (
            worker.name,
            _status(worker),
            worker.host,
            slot.slot,
            slot.name,
            size(slot.memory_bytes),
            (worker.sandbox or "").partition(" ")[0] or None,
            slot.job_id or slot.problem or _served(slot),
            worker.last_seen_at,
        )
        for worker in listed
        for slot in worker.listed_slots
    ]
    columns = (
        Column("NAME", min_width=6),
        Column("STATUS", drop_order=1),
        Column("HOST", min_width=8, drop_order=6),
        Column("SLOT", drop_order=2),
        Column("DEVICE", min_width=8, drop_order=3),
        Column("MEMORY", drop_order=4),
        Column("SANDBOX", drop_order=7),
        Column("JOB", min_width=len("job_") + ID_CHARACTERS),
        Column("LAST SEEN", drop_order=5),
    )
    print_table(columns, rows, none="No worker is connected; start one with `zeta worker`.")


def _status(worker: Worker) -> str:
    """The status, with the difference between the clocks if that may be a problem."""
    ahead = worker.clock_ahead_seconds
    if ahead is None or abs(ahead) < CLOCK_NOTICE_SECONDS:
        return worker.status
    return f"{worker.status} (clock {abs(ahead):.0f} s {'ahead' if ahead > 0 else 'behind'})"


def _served(slot: DeviceReport) -> str | None:
    """The models in a slot that answer requests."""
    return f"serves {', '.join(served.model for served in slot.served)}" if slot.served else None
