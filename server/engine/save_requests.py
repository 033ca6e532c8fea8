"""Determines which running jobs must save a checkpoint now, because a user requested it.

A request is due in every pass until the job has stored a checkpoint that names its number, so a lost one is repeated,
and an attempt that ends before it has saved leaves the request to the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from zeta_core.contract.wire.messages import SaveRequest


def due_save_requests(running: Sequence[Any]) -> Iterator[tuple[str, SaveRequest]]:
    """The requests to send now, with their workers. ``running`` contains rows of `stop_requests.RUNNING`."""
    for row in running:
        if row.num_save_requests > row.fulfilled_save_request:
            yield row.worker, SaveRequest(job_id=row.id, attempt=row.attempt, number=row.num_save_requests)
