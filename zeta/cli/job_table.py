"""The table of `zeta jobs`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from zeta.cli.job_display import data_cell, eval_cell, loss_cell, model_cell, progress_cell, status_cell
from zeta.cli.table import Column, print_table
from zeta_core.contract.job.job import Job


def print_jobs(jobs: Sequence[Job], file_names: Mapping[str, str]) -> None:
    """Print a row for each job, in their order; ``file_names`` maps the ids of uploaded files to their names."""
    is_mixed = any(job.kind != "training" for job in jobs)
    rows = [
        (
            job.id,
            job.kind if is_mixed else None,
            status_cell(job),
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
        Column("KIND", drop_order=2),
        Column("STATUS"),
        Column("MODEL", min_width=8),
        Column("DATA", min_width=8),
        Column("NAME", min_width=8, drop_order=1),
        Column("STEP", drop_order=2),
        Column("LOSS", drop_order=5),
        Column("EVAL", drop_order=4),
        Column("CREATED", drop_order=3),
    )
    print_table(columns, rows, none="No jobs found.")
