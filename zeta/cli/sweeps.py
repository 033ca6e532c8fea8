"""The commands that create and show sweeps: jobs with the same spec except for some settings."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from zeta.cli.app import JOBS, AsJson, app, completing
from zeta.cli.submit import Data, Lora, Model, Settings, SpecFile, read_fields

if TYPE_CHECKING:
    from zeta.client import Client
    from zeta_core.contract.job.sweep import Sweep, SweepJob, SweepResult

REFRESH_SECONDS = 2.0
FULL_NAMES_WIDTH = 80  # in a narrower terminal, the names of the fields are shortened
MIN_NAME, MAX_NAME = 8, 40
_HALVING_REASONS = ("waits_for_sweep", "eliminated")

Grid = Annotated[
    list[str] | None,
    typer.Option("--grid", metavar="FIELD=VALUE,VALUE", help="The values of a field, such as lora.r=8,16. Repeatable."),
]
NumRandom = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Create only N combinations, chosen at random.")
]
RandomSeed = Annotated[int | None, typer.Option(min=0, help="The seed of the random choice.")]
HalvingSteps = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="STEPS", help="Compare the jobs at this step, then at each doubling; the best continue."
    ),
]
HalvingFactor = Annotated[
    int | None,
    typer.Option(
        min=2,
        max=10,
        metavar="N",
        help="With --halving, compare at each N-fold of the step; one job in N continues.  [default: 2]",
    ),
]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Follow the sweep until all jobs have ended.")]


@app.command(rich_help_panel=JOBS)
def sweep(
    spec: SpecFile = None,
    grid: Grid = None,
    model: Model = None,
    data: Data = None,
    lora: Lora = False,
    settings: Settings = None,
    random: NumRandom = None,
    seed: RandomSeed = None,
    halving: HalvingSteps = None,
    halving_factor: HalvingFactor = None,
    follow: Follow = False,
    as_json: AsJson = False,
) -> None:
    """Submit a job for each combination of values. All jobs are created, or none.

    With --halving 100, each job is paused at step 100. Then the better half continues, the others are cancelled
    (eliminated), and the jobs that are left are compared at step 200, 400 and so on.
    """
    from zeta.cli.output import notice, print_json, print_text
    from zeta.client import Client
    from zeta.spec_file import read_grid
    from zeta_core.contract.errors import InvalidRequest
    from zeta_core.contract.job.halving import Halving

    if not grid:
        raise InvalidRequest("No grid was given; list the values of a field with --grid learning_rate=1e-4,3e-4.")
    if halving is None and halving_factor is not None:
        raise InvalidRequest("--halving-factor needs --halving STEPS.", param="--halving-factor")
    fields = read_fields(spec, model, data, lora, settings or [])
    with Client() as client:
        created = client.sweeps.create(
            fields,
            read_grid(grid),
            random=random,
            seed=seed,
            halving=None if halving is None else Halving(steps=halving, factor=halving_factor or 2),
            on_upload=partial(notice, as_json=as_json),
        )
        if as_json:
            print_json(created)
        else:
            hint = "" if follow else f" Show them: zeta sweeps {created.id}"
            print_text(f"{created.id} has {len(created.jobs)} jobs.{hint}")
        if follow:
            _follow(client, created.id, as_json=as_json)


@app.command(rich_help_panel=JOBS)
def sweeps(
    sweep_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="The id of a sweep.", autocompletion=completing("sweep"))
    ] = None,
    follow: Follow = False,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of sweeps.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List sweeps, or show the jobs of one.

    Sweeps are listed newest first. Losses are those of `zeta jobs`. The best job has the lowest loss on held-out data
    (EVAL), or the lowest LOSS if a job has no held-out data.
    """
    from zeta.cli.output import print_json, print_list
    from zeta.client import Client
    from zeta_core.contract.errors import InvalidRequest

    if sweep_id is None and follow:
        raise InvalidRequest("--follow needs the id of a sweep; `zeta sweeps` lists them.", param="--follow")
    with Client() as client:
        if sweep_id is None:
            listed = client.sweeps.list(limit=limit)
            print_list(listed) if as_json else _print_list(listed)
        elif follow:
            _follow(client, sweep_id, as_json=as_json)
        else:
            result = client.sweeps.get(sweep_id)
            print_json(result) if as_json else print("\n".join(result_lines(result)))


def _follow(client: Client, sweep_id: str, *, as_json: bool) -> None:
    """Update the table in a terminal until all jobs have ended; elsewhere, print it at the end."""
    from contextlib import nullcontext
    from threading import Event

    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from zeta.cli.output import print_json
    from zeta_core.contract.job.status import ENDED

    console = Console(highlight=False)
    is_live = sys.stdout.isatty() and not as_json and not console.is_dumb_terminal
    result = client.sweeps.get(sweep_id)
    with Live(console=console, auto_refresh=False) if is_live else nullcontext() as live:
        while True:
            if live is not None:
                text = "\n".join(result_lines(result, width=console.width))
                live.update(Text(text, no_wrap=True, overflow="crop"), refresh=True)
            if all(job.status in ENDED for job in result.jobs):
                break
            Event().wait(REFRESH_SECONDS)
            result = client.sweeps.get(sweep_id)
    if as_json:
        print_json(result)
    elif not is_live:
        print("\n".join(result_lines(result)))


def result_lines(result: SweepResult, width: int | None = None) -> list[str]:
    """The table of a sweep's jobs, the best job marked, and the next command."""
    import json

    from zeta.cli.output import terminal_size
    from zeta.cli.table import Column, table_lines
    from zeta.cli.wrapping import wrapped

    width = width or terminal_size().columns
    shortest = MAX_NAME if width >= FULL_NAMES_WIDTH else MIN_NAME  # of the name of a field
    columns = [
        Column("JOB"),
        *(
            Column(name.upper(), min_width=min(len(name), shortest), drop_order=min(number, 1))
            for number, name in enumerate(result.fields)
        ),
        Column("STATUS", drop_order=4),
        Column("STEP", drop_order=5),
        Column("LOSS", drop_order=6),
        Column("EVAL", drop_order=2),
        Column("", drop_order=3),
    ]
    rows = [
        (
            job.id,
            *(value if isinstance(value, str) else json.dumps(value) for value in job.settings.values()),
            _status_cell(job),
            None if job.step is None else f"{job.step}/{job.total_steps}" if job.total_steps else str(job.step),
            None if job.loss is None else f"{job.loss:.4f}",
            None if job.eval_loss is None else f"{job.eval_loss:.4f}",
            "best" if job.id == result.best else "",
        )
        for job in result.jobs
    ]
    if not rows:
        return [f"All jobs of {result.id} have been deleted."]
    lines = table_lines(columns, rows, width)
    if result.next_comparison_step is not None:
        lines.append(f"The jobs are compared at step {result.next_comparison_step}.")
    if result.best is not None:
        name = "held-out loss" if result.metric == "eval_loss" else "loss"
        text = f"{result.best} has the lowest {name}. Download it: zeta download {result.best}"
        lines += wrapped(text, width).split("\n") if sys.stdout.isatty() else [text]
    return lines


def _status_cell(job: SweepJob) -> str:
    """The status, and whether the job waits for a comparison or was eliminated by one."""
    return f"{job.status} ({job.status_reason})" if job.status_reason in _HALVING_REASONS else str(job.status)


def _print_list(listed: list[Sweep]) -> None:
    from zeta.cli.table import Column, print_table

    rows = [
        (
            sweep.id,
            ", ".join(sweep.fields),
            ", ".join(f"{count} {status}" for status, count in sweep.num_jobs.items()) or "no jobs",
            sweep.created_at,
        )
        for sweep in listed
    ]
    columns = (
        Column("ID"),
        Column("FIELDS", min_width=8, drop_order=2),
        Column("JOBS", min_width=12, drop_order=1),
        Column("CREATED", drop_order=3),
    )
    print_table(columns, rows, none="No sweeps found.")
