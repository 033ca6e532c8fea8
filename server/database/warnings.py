"""What a job warns of: its newest warnings stand in its row, beside the events that told them."""

from __future__ import annotations

from server.database.tables import JobRow
from zeta_core.contract.events import WarningLine

MAX_WARNINGS = 100


def warn(job: JobRow, line: WarningLine) -> None:
    """Add a warning to ``job``, whose row the caller holds locked; of more than `MAX_WARNINGS` the oldest goes."""
    told = line.model_dump(mode="json", exclude={"type"}, exclude_none=True)
    job.warnings = [*job.warnings, told][-MAX_WARNINGS:]
