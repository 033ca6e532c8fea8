"""The commands that list, run and drain workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from zeta.cli.app import SERVICE, AsJson, app
from zeta.cli.service import Home, exec_module

if TYPE_CHECKING:
    from zeta_core.contract.job.responses import DeviceReport

worker_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(worker_app, name="worker", rich_help_panel=SERVICE)

WorkerName = Annotated[str, typer.Argument(metavar="NAME", help="A worker's name, as `zeta workers` lists it.")]


@worker_app.callback()
def worker(context: typer.Context, home: Home = None) -> None:
    """Run one worker in the foreground, or drain a running one.

    The worker is configured by ZETA_REDIS_URL, ZETA_ARTIFACTS_URL and ZETA_WORKER_SECRET.
    """
    if context.invoked_subcommand is None:
        exec_module("worker", "worker", "celery", home=home)


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
    from zeta.cli.output import print_json
    from zeta.client import Client

    with Client() as client:
        worker = client.drain(name, draining=draining)
    if as_json:
        print_json(worker)
        return
    jobs = [slot.job_id for slot in worker.listed_slots if slot.job_id is not None]
    handed_back = f" It is handing back {', '.join(jobs)}." if draining and jobs else ""
    print(f"{worker.name} is {worker.status}.{handed_back}")


@app.command(rich_help_panel=SERVICE)
def workers(as_json: AsJson = False) -> None:
    """List workers and what their slots do.

    A slot runs a job, serves models, is free, or can't be used because its GPU has a problem.
    """
    from zeta.cli.output import print_list, size
    from zeta.cli.table import print_table
    from zeta.client import Client

    with Client() as client:
        listed = client.workers()
    if as_json:
        print_list(listed)
        return
    rows = [
        (
            worker.name,
            worker.status,
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
    heads = ("NAME", "STATUS", "HOST", "SLOT", "DEVICE", "MEMORY", "SANDBOX", "JOB", "LAST SEEN")
    print_table(heads, rows, none="No worker is connected; start one with `zeta worker`.")


def _served(slot: DeviceReport) -> str | None:
    """The models in a slot that answer requests."""
    return f"serves {', '.join(served.model for served in slot.served)}" if slot.served else None
