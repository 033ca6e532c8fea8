"""Queues the checks of a worker, in an order that is fair between projects.

A project has at most one check in progress, so one process is always left for the others. The next check belongs
to the project whose last check began longest ago; the checks of a project keep their order.
"""

from __future__ import annotations

from collections import deque
from threading import Lock

from zeta_core.contract.wire.messages import CheckRequest

MAX_PER_PROJECT = 4  # further requests are rejected immediately, because they would time out
MAX_TOTAL = 64


class WaitingChecks:
    """The queue of one worker. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._waiting: dict[str, deque[CheckRequest]] = {}  # by project; the project that has waited longest is first
        self._running: dict[str, str] = {}  # check ids by project

    def add(self, request: CheckRequest) -> str | None:
        """Queue a check, unless it is queued or in progress. Returns the reason if there are too many."""
        with self._lock:
            waiting = self._waiting.get(request.project, deque())
            ids = {self._running.get(request.project), *(other.check_id for other in waiting)}
            if request.check_id in ids:
                return None
            if len(waiting) >= MAX_PER_PROJECT:
                return f"The worker already has {len(waiting)} checks of this project queued."
            if sum(map(len, self._waiting.values())) >= MAX_TOTAL:
                return f"The worker already has {MAX_TOTAL} checks queued."
            self._waiting.setdefault(request.project, deque()).append(request)
            return None

    def begin(self) -> CheckRequest | None:
        """The next check, which is in progress from now on; ``None`` if none may begin."""
        with self._lock:
            project = next((project for project in self._waiting if project not in self._running), None)
            if project is None:
                return None
            waiting = self._waiting.pop(project)
            request = waiting.popleft()
            if waiting:
                self._waiting[project] = waiting  # now the last one
            self._running[project] = request.check_id
            return request

    def end(self, request: CheckRequest) -> None:
        """The check is no longer in progress."""
        with self._lock:
            del self._running[request.project]

    def others_wait(self, project: str) -> bool:
        """Whether a check of another project could begin if one in progress ended."""
        with self._lock:
            return any(other != project and other not in self._running for other in self._waiting)

    @property
    def is_empty(self) -> bool:
        """Whether no check waits or is in progress."""
        with self._lock:
            return not self._waiting and not self._running

    @property
    def needs_another_process(self) -> bool:
        """Whether a check waits while another one is in progress, so a second process may be needed."""
        with self._lock:
            return bool(self._waiting) and bool(self._running)
