"""`zeta top`: the unfinished jobs and all devices, updated in place in a terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from threading import Event
from typing import TYPE_CHECKING, Annotated

import typer

from zeta.cli.app import SERVICE, AsJson, app

if TYPE_CHECKING:
    from zeta.client import Client
    from zeta_core.contract.job.job import Job
    from zeta_core.contract.job.responses import Worker

MAX_JOBS = 200  # that are requested for each status


@dataclass(frozen=True)
class Activity:
    """What the service does now: its running jobs, its queued jobs (the next one first), and its workers."""

    running: Sequence[Job]
    queued: Sequence[Job]
    workers: Sequence[Worker]

    @classmethod
    def load(cls, client: Client) -> Activity:
        running = client.jobs(status="running", limit=MAX_JOBS)
        queued = client.jobs(status="queued", limit=MAX_JOBS)
        return cls(running, sorted(queued, key=lambda job: job.queue_position or MAX_JOBS), client.workers())

    @property
    def jobs(self) -> list[Job]:
        return [*self.running, *self.queued]


@app.command(rich_help_panel=SERVICE)
def top(
    interval: Annotated[
        float, typer.Option(min=0.2, max=3600, metavar="SECONDS", help="The time between two updates.")
    ] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Show running and queued jobs, and devices.

    They are updated until Ctrl-C. Without a terminal, they are printed once. With --json, the list of jobs and the list
    of workers are printed once.
    """
    from zeta.cli.output import print_list, terminal_size
    from zeta.client import Client

    with Client() as client:
        if not as_json and sys.stdout.isatty():
            _show_live(client, interval)
            return
        activity = Activity.load(client)
    if as_json:
        print_list(activity.jobs)
        print_list(activity.workers)
    else:
        print("\n".join(activity_lines(activity, terminal_size().columns, height=sys.maxsize)))


def _show_live(client: Client, interval: float) -> None:
    """Update the screen until Ctrl-C. While the server does not respond, the last state stays, with the reason."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from zeta_core.contract.errors import Unavailable

    def screen(activity: Activity, problem: str | None) -> Text:
        size = console.size
        title = f"{client.base_url}  {datetime.now():%H:%M:%S}  Ctrl-C ends this view"  # noqa: DTZ005 - local time
        head = [(problem or title)[: size.width], ""]
        return Text("\n".join([*head, *activity_lines(activity, size.width, size.height - len(head))]), no_wrap=True)

    # A command that a script starts with `&` ignores SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    activity = Activity.load(client)
    console = Console(highlight=False)
    stopped = Event()
    try:
        with Live(screen(activity, None), console=console, screen=True, auto_refresh=False) as live:
            while not stopped.wait(interval):
                problem: str | None = None
                try:
                    activity = Activity.load(client)
                except Unavailable as error:
                    problem = error.message
                live.update(screen(activity, problem), refresh=True)
    except KeyboardInterrupt:
        return


def activity_lines(activity: Activity, width: int, height: int) -> list[str]:
    """The tables of the devices and of the jobs; jobs that do not fit are counted in the last line."""
    lines = [*_device_lines(activity, width), ""]
    jobs = _job_lines(activity, width)
    num_shown = max(2, height - len(lines) - 1)  # at least the heading and one job
    lines += jobs[:num_shown]
    if len(jobs) > num_shown:
        lines.append(f"… and {len(jobs) - num_shown} more jobs")
    return [line[:width] for line in lines]


def _device_lines(activity: Activity, width: int) -> list[str]:
    from zeta.cli.output import size
    from zeta.cli.table import Column, table_lines

    if not activity.workers:
        return ["No worker is connected; start one with `zeta worker`."]
    columns = (
        Column("WORKER", min_width=6),
        Column("STATUS", drop_order=1),
        Column("SLOT", drop_order=2),
        Column("DEVICE", min_width=6, drop_order=3),
        Column("MEMORY", drop_order=4),
        Column("JOB"),
    )
    rows = [
        (worker.name, worker.status, slot.slot, slot.name, size(slot.memory_bytes), slot.job_id)
        for worker in activity.workers
        for slot in worker.listed_slots
    ]
    return table_lines(columns, rows, width)


def _job_lines(activity: Activity, width: int) -> list[str]:
    from zeta.cli.job_display import loss_cell, progress_cell
    from zeta.cli.output import duration
    from zeta.cli.table import Column, table_lines

    if not activity.jobs:
        return ["No job is running or queued."]
    columns = (
        Column("ID"),
        Column("STATUS"),
        Column("STEP", drop_order=1),
        Column("LOSS", drop_order=3),
        Column("TOKENS/S", drop_order=6),
        Column("LEFT", drop_order=2),
        Column("NAME", min_width=6, drop_order=5),
        Column("MEMORY", drop_order=8),
        Column("WORKER", min_width=6, drop_order=7),
        Column("WAITS FOR", drop_order=4),
    )
    rows = [
        (
            job.id,
            job.status,
            progress_cell(job),
            loss_cell(job),
            _number(job, "tokens_per_second", lambda value: f"{value:,.0f}"),
            _number(job, "eta_seconds", duration),
            job.entity_name,
            _peak_memory(job),
            job.worker,
            None if job.waiting_reason is None else job.waiting_reason.code,
        )
        for job in activity.jobs
    ]
    return table_lines(columns, rows, width)


def _number(job: Job, name: str, text: Callable[[float], str]) -> str | None:
    value = (job.progress or {}).get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or job.status != "running":
        return None
    return text(value)


def _peak_memory(job: Job) -> str | None:
    """The peak memory of the job's devices."""
    from zeta.cli.output import size

    memory = (job.progress or {}).get("memory")
    if not isinstance(memory, dict) or job.status != "running":
        return None
    return size(sum(value for value in memory.values() if isinstance(value, int)))
