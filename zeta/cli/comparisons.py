"""The commands that compare jobs: plot, diff, compare."""

from __future__ import annotations

from typing import Annotated

import typer

from zeta.cli.app import JOBS, AsJson, JobId, app, completing

MAX_PLOTTED = 8  # jobs in one chart


@app.command(rich_help_panel=JOBS)
def plot(
    jobs: Annotated[
        list[str],
        typer.Argument(
            metavar="ID...",
            help="Job ids, the beginnings of ids, or @last for the newest job.",
            autocompletion=completing("job"),
        ),
    ],
    metric: Annotated[str, typer.Option(help="The metric to plot, such as loss, eval_loss or grad_norm.")] = "loss",
    x_axis: Annotated[str, typer.Option("--x", help="The horizontal axis: step, tokens or epoch.")] = "step",
    log_scale: Annotated[bool, typer.Option("--log", help="Use a logarithmic vertical axis.")] = False,
    as_json: AsJson = False,
) -> None:
    """Plot a metric of one or more jobs in the terminal.

    With --json, the curves of each job are printed on one line.
    """
    from zeta.cli.chart import X_AXES, Curve, draw_chart
    from zeta.cli.output import print_json
    from zeta.client import Client
    from zeta.job_ids import resolve_job_id
    from zeta_core.contract.errors import InvalidRequest
    from zeta_core.contract.job.responses import Curves

    metrics = [name for name in Curves.model_fields if name not in ("object", "step")]
    if metric not in metrics:
        raise InvalidRequest(
            f"--metric {metric!r} does not exist; choose one of {', '.join(metrics)}.", param="--metric"
        )
    if x_axis not in X_AXES:
        raise InvalidRequest(f"--x is {x_axis!r}; choose one of {', '.join(X_AXES)}.", param="--x")
    if len(jobs) > MAX_PLOTTED:
        raise InvalidRequest(f"{len(jobs)} jobs are too many for one chart; name at most {MAX_PLOTTED}.")
    with Client() as client:
        ids = list(dict.fromkeys(resolve_job_id(client, job_id) for job_id in jobs))
        found = [(client.job(job_id), client.metrics(job_id)) for job_id in ids]
    if as_json:
        for job, curves in found:
            print_json({"job": job.id, **curves.model_dump(mode="json")})
        return
    draw_chart([Curve.of(job, curves, metric, x_axis) for job, curves in found], metric, x_axis, log_scale=log_scale)


@app.command(rich_help_panel=JOBS)
def diff(first: JobId, second: JobId, as_json: AsJson = False) -> None:
    """List settings in which two jobs differ.

    They include defaults that the runs decided.
    """
    from zeta.cli.output import print_json, print_text
    from zeta.cli.table import Column, print_table
    from zeta.client import Client
    from zeta.job_ids import resolve_job_id
    from zeta_core.contract.spec.differences import differing_settings

    with Client() as client:
        jobs = [client.job(resolve_job_id(client, job_id)) for job_id in (first, second)]
    differences = differing_settings(jobs[0].resolved_spec, jobs[1].resolved_spec)
    if as_json:
        print_json(
            {"jobs": [job.id for job in jobs], "settings": {name: list(pair) for name, pair in differences.items()}}
        )
        return
    rows = [(name, *(_setting(value) for value in pair)) for name, pair in differences.items()]
    if not rows:
        print(f"{jobs[0].id} and {jobs[1].id} have the same settings.")
        return
    for letter, job in zip("AB", jobs, strict=True):
        print_text(f"{letter}  {job.id}  {job.entity_name or ''}".rstrip())
    columns = (Column("SETTING", min_width=12), Column("A", min_width=8), Column("B", min_width=8))
    print_table(columns, rows, none="")


@app.command(rich_help_panel=JOBS)
def compare(first: JobId, second: JobId, as_json: AsJson = False) -> None:
    """Compare two jobs by their held-out losses.

    Both must have been evaluated on the same documents. The interval contains the differences that are plausible with
    other documents of the same kind (95 %, a paired bootstrap over the documents). If it contains 0, the jobs can't be
    distinguished.
    """
    from zeta.cli.output import print_json, print_text
    from zeta.cli.table import Column, print_table
    from zeta.client import Client
    from zeta.job_ids import resolve_job_id

    with Client() as client:
        a, b = (client.job(resolve_job_id(client, job_id)) for job_id in (first, second))
        found = client.compare(a.id, b.id)
    if as_json:
        print_json({"jobs": [a.id, b.id], **found.model_dump(mode="json")})
        return
    rows = [("A", a.id, a.entity_name, f"{found.loss_a:.4f}"), ("B", b.id, b.entity_name, f"{found.loss_b:.4f}")]
    columns = (
        Column(""),
        Column("JOB", min_width=16),
        Column("NAME", min_width=8, drop_order=1),
        Column("HELD-OUT LOSS"),
    )
    print_table(columns, rows, none="")
    interval = f"95 % interval {found.low:+.4f} to {found.high:+.4f}"
    print_text(f"A - B = {found.difference:+.4f} ({interval}, {found.num_documents} documents)")
    if found.better is None:
        print_text("The jobs are not distinguishable on these documents.")
    else:
        print_text(f"{found.better.upper()} is better: {a.id if found.better == 'a' else b.id}")


def _setting(value: object) -> str | None:
    """A value as it is written in a spec; ``None`` if it is not set."""
    import json

    return None if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
