"""The table of `zeta jobs`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from zeta.cli.job_display import data_cell, eval_cell, loss_cell, model_cell, progress_cell, status_cell
from zeta.cli.output import terminal_size
from zeta.cli.table import Column, print_table
from zeta_core.contract.job.job import Job

REASON_WIDTH = 100  # a narrower table has no space for the reasons of waits and failures; `zeta job` shows them


def print_jobs(jobs: Sequence[Job], file_names: Mapping[str, str]) -> None:
    """Print a row for each job, in their order; ``file_names`` maps the ids of uploaded files to their names."""
    is_mixed = any(job.kind != "training" for job in jobs)
    is_wide = terminal_size().columns >= REASON_WIDTH
    rows = [
        (
            job.id,
            job.kind if is_mixed else None,
            status_cell(job) if is_wide else job.status,
            model_cell(job, file_names),
            data_cell(job, file_names),
            job.entity_name,
            progress_cell(job),
            loss_cell(job),
            eval_cell(job),
            job.created_at,
        )
        for job in jobs
    ]
    columns = (
        Column("ID"),
        Column("KIND", drop_order=5),
        Column("STATUS"),
        Column("MODEL", min_width=8, drop_order=1),
        Column("DATA", min_width=8, drop_order=2),
        Column("NAME", min_width=8, drop_order=3),
        Column("STEP", drop_order=4),
        Column("LOSS", drop_order=8),
        Column("EVAL", drop_order=7),
        Column("CREATED", drop_order=6),
    )
    print_table(columns, rows, none="No jobs found.")
