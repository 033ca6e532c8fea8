"""Keeps a worker's threads and steps running: every exception is treated as an outage, logged once and retried.

Guarantees: no exception, not even `SystemExit` from a library, ends a `RetryingThread` before it is stopped. An outage
is logged once when it begins (with a traceback unless it is an expected type) and once when it ends; until then, the
heartbeat reports it. If a defect or a hanging pass persists, retrying would not help: `ProcessGuard` then exits the
process, so that its supervisor starts a new one, which adopts the runs.
"""

from __future__ import annotations

import faulthandler
import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from zeta_core.contract.job.events import utc_now
from zeta_core.system.outage import GIVE_UP_SECONDS, OngoingFailure, error_text, give_up
from zeta_core.system.redis_access import RedisUnavailable

FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.25, 2.0
EXPECTED_ERRORS = (RedisUnavailable, OSError)  # expected types, whose message is sufficient

logger = logging.getLogger(__name__)


class Outage:
    """Logs the beginning and the end of an outage of one component; ``trouble`` is set in between."""

    def __init__(self, what: str, *, name: str = "") -> None:
        """``what`` describes the outage in the log; ``name`` is the component's name in the heartbeat."""
        self.name = name
        self.trouble: OngoingFailure | None = None
        self.defect_since: float | None = None  # monotonic; set while failures are not of an expected type
        self._what = what
        self._logged: set[str] = set()  # error types already logged in the current outage

    def begin(self, error: BaseException, *, is_expected: bool | None = None) -> None:
        """``is_expected`` overrides whether the error's message is sufficient, without a traceback."""
        is_expected = isinstance(error, EXPECTED_ERRORS) if is_expected is None else is_expected
        if is_expected:
            self.defect_since = None
        elif self.defect_since is None:
            self.defect_since = time.monotonic()
        kind = type(error).__qualname__
        # Other errors may contain anything, and /readyz is public.
        reason = error_text(error) if is_expected else f"{kind} (see the worker's log)"
        self.trouble = OngoingFailure(self.trouble.since if self.trouble else utc_now(), reason)
        if kind not in self._logged:
            logger.warning(
                "%s: %s. Retrying until it succeeds.",
                self._what,
                error_text(error),
                exc_info=None if is_expected else error,
                extra={"action": "outage"},
            )
        self._logged.add(kind)

    def end(self) -> None:
        self.defect_since = None
        if self.trouble is not None:
            logger.info("%s: recovered.", self._what, extra={"action": "outage_over"})
        self.trouble = None
        self._logged.clear()

    @contextmanager
    def catching_errors(self) -> Generator[None]:
        """Treat any exception in the block as an outage, which ends with the next successful block."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - other components must continue
            self.begin(error)
        else:
            self.end()


class RetryingThread:
    """A thread that repeats ``one_pass`` until it is stopped. An exception is an outage, and the pass is retried."""

    def __init__(self, name: str, what: str, one_pass: Callable[[], None]) -> None:
        """``what`` describes an outage of the thread, such as "Redis cannot be read"."""
        self.stopped = threading.Event()
        self.outage = Outage(what, name=name)
        self.name = name
        self.progress = 0  # grows unless the thread hangs
        self._one_pass = one_pass
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_seconds: float) -> None:
        """Stop after the current pass, and wait for that."""
        self.stopped.set()
        self._thread.join(timeout_seconds)

    def mark_progress(self) -> None:
        """Show that the thread isn't hanging; a pass that may take minutes calls this from time to time."""
        self.progress += 1

    def _run(self) -> None:
        while not self.stopped.is_set():
            self.mark_progress()
            try:
                self._one_pass()
            except BaseException as error:  # noqa: BLE001 - Celery also raises SystemExit
                self.outage.begin(error)
                self.stopped.wait(self._pause_seconds)
                self._pause_seconds = min(2 * self._pause_seconds, MAX_PAUSE_SECONDS)
            else:
                self.outage.end()
                self._pause_seconds = FIRST_PAUSE_SECONDS


def log_failure(work: Future[Any], message: str) -> None:
    """Log the failure of work that nobody waits for; ``message`` describes the work that failed."""

    def report(done: Future[Any]) -> None:
        error = None if done.cancelled() else done.exception()
        if error is not None:
            logger.warning(
                "%s: %s.",
                message,
                error_text(error),
                exc_info=None if isinstance(error, EXPECTED_ERRORS) else error,
                extra={"action": "background"},
            )

    work.add_done_callback(report)


@dataclass(frozen=True)
class GuardLimits:
    give_up_seconds: float = GIVE_UP_SECONDS  # of failing because of a defect
    hang_seconds: float = 300.0  # far above the time of any pass
    tick_seconds: float = 1.0


class ProcessGuard:
    """Exits the process if a thread or step keeps failing because of a defect, or if it hangs.

    Time is counted in ticks of the guard's own thread, because a process that was frozen (SIGSTOP, a paused container)
    must not be ended when it continues.
    """

    def __init__(
        self,
        threads: Sequence[RetryingThread],
        steps: Sequence[Outage],
        main_progress: Callable[[], int],
        limits: GuardLimits,
    ) -> None:
        """``steps`` are those of the main thread, and ``main_progress`` grows unless that thread hangs."""
        self._threads, self._steps, self._main_progress = threads, steps, main_progress
        self._limits = limits
        self._seen: dict[str, float] = {}  # the value at the last tick
        self._num_ticks: dict[str, int] = {}  # how many ticks the value has not changed
        self._thread = RetryingThread("guard", "The worker's state can't be checked", self._one_pass)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._thread.stop(2 * self._limits.tick_seconds)

    def _one_pass(self) -> None:
        self._thread.stopped.wait(self._limits.tick_seconds)
        running = [thread for thread in self._threads if not thread.stopped.is_set()]
        for outage in (*self._steps, *(thread.outage for thread in running)):
            if self._unchanged_seconds(f"{outage.name} fails", outage.defect_since) >= self._limits.give_up_seconds:
                give_up(f"{outage.name} has been failing for {self._limits.give_up_seconds:g} s: {outage.trouble}.")
        progress = {"main": self._main_progress(), **{thread.name: thread.progress for thread in running}}
        for name, value in progress.items():
            if self._unchanged_seconds(f"{name} hangs", value) >= self._limits.hang_seconds:
                faulthandler.dump_traceback(all_threads=True)
                give_up(f"The thread {name} has been hanging for {self._limits.hang_seconds:g} s; see its stack above.")

    def _unchanged_seconds(self, key: str, value: float | None) -> float:
        """For how long the value has been the same; 0 for ``None``."""
        if value is None:
            self._seen.pop(key, None)
            return 0.0
        self._num_ticks[key] = self._num_ticks[key] + 1 if self._seen.get(key) == value else 0
        self._seen[key] = value
        return self._num_ticks[key] * self._limits.tick_seconds
