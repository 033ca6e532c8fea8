"""The orders of a list of jobs: a field, ascending, or descending with a minus before its name."""

from __future__ import annotations

from typing import Literal, get_args

SortField = Literal["created", "name", "status", "progress", "time_left", "loss", "eval_loss"]
SORT_FIELDS: tuple[SortField, ...] = get_args(SortField)
JobSort = Literal[
    "created", "name", "status", "progress", "time_left", "loss", "eval_loss",
    "-created", "-name", "-status", "-progress", "-time_left", "-loss", "-eval_loss",
]  # fmt: skip
JOB_SORTS: tuple[JobSort, ...] = get_args(JobSort)
NEWEST_FIRST: JobSort = "-created"
