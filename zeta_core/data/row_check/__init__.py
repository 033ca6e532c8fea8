"""Checking the rows of sources before a run, in seconds: `check` starts and caches checks, `row_pass` does one."""

from zeta_core.data.row_check.check import check_dataset, check_rows
from zeta_core.data.row_check.row_pass import CheckedRows

__all__ = ["CheckedRows", "check_dataset", "check_rows"]
