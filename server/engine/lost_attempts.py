"""Detects attempts that their worker has lost, or that are lost with their worker.

An attempt is lost when its live worker no longer lists it (the worker was restarted without finding the run, or gave
up), when its worker has been silent for the lease while Redis was reachable, or when its worker's secret was revoked.
Only a worker process that runs in the same folder knows whether an attempt is gone. A worker with the same name in
another folder (another disk or machine) may have replaced one whose run still continues, so in that case only the lease
counts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import NamedTuple

from server.engine.known_workers import KnownWorkers
from server.engine.worker_secrets import WorkerSecrets
from zeta_core.contract.wire.messages import parse_folder_id

# A worker lists an attempt once it has the dispatch, but up to two heartbeats (2 s apart) may still be in transit.
UNLISTED_SECONDS = 5.0


class ClaimedAttempt(NamedTuple):
    """An attempt, or one node of it, that a process of this worker has claimed."""

    job_id: str
    attempt: int
    worker: str
    incarnation: str


class LostAttempts:
    def __init__(self, workers: KnownWorkers, secrets: WorkerSecrets, *, lease_seconds: float) -> None:
        self._workers = workers
        self._secrets = secrets
        self._lease_seconds = lease_seconds
        self._unlisted_since: dict[ClaimedAttempt, float] = {}  # monotonic

    def find(self, claimed: Iterable[ClaimedAttempt]) -> dict[ClaimedAttempt, str]:
        """Those that are lost, with the reason as a sentence. Call it in every pass with all claimed attempts."""
        now = time.monotonic()
        unlisted: dict[ClaimedAttempt, float] = {}
        lost: dict[ClaimedAttempt, str] = {}
        for each in claimed:
            folder = parse_folder_id(each.incarnation)
            silent = self._workers.silent_seconds(each.worker, folder)
            if self._secrets.is_revoked(each.worker):
                lost[each] = f"Worker {each.worker} was revoked."
            elif silent > self._lease_seconds:
                lost[each] = f"Lost contact with worker {each.worker} {silent:.0f} s ago."
            elif self._would_list(each.worker, folder) and not self._lists(each):
                unlisted[each] = self._unlisted_since.get(each, now)
                if now - unlisted[each] > UNLISTED_SECONDS:
                    lost[each] = f"Worker {each.worker} no longer runs this attempt."
        self._unlisted_since = unlisted
        return lost

    def _would_list(self, worker: str, folder: str | None) -> bool:
        """Whether the worker is alive and runs in this folder, so that it would list the attempt."""
        beat = self._workers.get(worker) if self._workers.is_alive(worker) else None
        return beat is not None and (folder is None or parse_folder_id(beat.incarnation) in (folder, None))

    def _lists(self, claimed: ClaimedAttempt) -> bool:
        beat = self._workers.get(claimed.worker)
        key = (claimed.job_id, claimed.attempt)
        return beat is not None and any((slot.job_id, slot.attempt) == key for slot in beat.all_slots)
