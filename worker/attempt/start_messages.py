"""The messages that an attempt repeats before its run starts, until the server answers or decides.

They are its claim and, with several workers, the report that its node is prepared.
"""

from __future__ import annotations

import time
from concurrent.futures import Executor, Future

from pydantic import BaseModel

from worker.machine.network import ReservedPort, reserve_port
from worker.settings import WorkerSettings
from zeta_core.contract.wire.messages import Claim, Prepared

REPEAT_SECONDS = 1.0
CLAIM_GIVE_UP_SECONDS = 60.0


class ClaimRequests:
    """Repeats an attempt's claim until it is answered."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self._started_at = time.monotonic()
        self._sent_at = float("-inf")

    @property
    def has_timed_out(self) -> bool:
        return time.monotonic() - self._started_at > CLAIM_GIVE_UP_SECONDS

    def due(self) -> list[BaseModel]:
        """The claim, if it must be sent now."""
        now = time.monotonic()
        if now - self._sent_at < REPEAT_SECONDS:
            return []
        self._sent_at = now
        return [self.claim]


class NodeStart:
    """Repeats the message `Prepared` until all nodes of the attempt are prepared and it starts.

    A thread of ``executor`` reserves the port for the rendezvous of the nodes.
    """

    def __init__(self, executor: Executor, settings: WorkerSettings, claim: Claim, node_rank: int) -> None:
        """``claim`` is the granted claim of the attempt."""
        self._claim = claim
        self._node_rank = node_rank
        self._reservation = executor.submit(reserve_port, settings)
        self._sent_at = float("-inf")

    def error(self) -> BaseException | None:
        """Why no port could be reserved, if that has failed."""
        return self._reservation.exception() if self._reservation.done() else None

    def due(self) -> list[BaseModel]:
        """The message, if it must be sent now."""
        now = time.monotonic()
        if not self._reservation.done() or now - self._sent_at < REPEAT_SECONDS:
            return []
        self._sent_at = now
        port = self._reservation.result()
        claim = self._claim
        return [
            Prepared(
                job_id=claim.job_id,
                attempt=claim.attempt,
                worker=claim.worker,
                incarnation=claim.incarnation,
                node_rank=self._node_rank,
                address=port.address,
                port=port.port,
            )
        ]

    def release_port(self) -> None:
        """Release the port: for the run, which binds it next, or because the attempt does not start."""
        self._reservation.add_done_callback(_release)


def _release(reservation: Future[ReservedPort]) -> None:
    if not reservation.cancelled() and reservation.exception() is None:
        reservation.result().release()
