"""Determines which running jobs must save a checkpoint now, because a user requested it.

A request is due in every pass until the job has stored a checkpoint that names its number, so a lost one is repeated,
and an attempt that ends before it has saved leaves the request to the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from server.engine.stop_requests import Nodes
from zeta_core.contract.wire.messages import SaveRequest


def due_save_requests(running: Sequence[Any], nodes: Nodes) -> Iterator[tuple[str, SaveRequest]]:
    """The requests to send now, with their workers. ``running`` contains rows of `stop_requests.RUNNING`."""
    for row in running:
        if row.num_save_requests > row.fulfilled_save_request:
            request = SaveRequest(job_id=row.id, attempt=row.attempt, number=row.num_save_requests)
            for worker in nodes.get((row.id, row.attempt), (row.worker,)):
                yield worker, request
