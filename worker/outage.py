"""Keeps a worker's threads and steps running: every exception is treated as an outage, logged once and retried.

Guarantees: no exception, not even `SystemExit` from a library, ends a `Loop` before it is stopped. An outage is logged
once when it begins (with a traceback unless it is an expected type) and once when it ends.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

from zeta_core.contract.redis_access import RedisUnavailable

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.25, 2.0
ORDINARY = (RedisUnavailable, OSError)  # expected types, whose message is sufficient

logger = logging.getLogger(__name__)


class Outage:
    """Logs the beginning and the end of an outage of one component."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._logged: set[str] = set()  # error types already logged in the current outage

    def began(self, error: BaseException, *, with_traceback: bool = False) -> None:
        kind = type(error).__qualname__
        if kind not in self._logged:
            logger.warning(
                "%s: %s. Retrying until it succeeds.",
                self._what,
                str(error).rstrip(".") or kind,
                exc_info=error if with_traceback else None,
                extra={"action": "outage"},
            )
        self._logged.add(kind)

    def ended(self) -> None:
        if self._logged:
            logger.info("%s: recovered.", self._what, extra={"action": "outage_over"})
        self._logged.clear()

    @contextmanager
    def survived(self) -> Generator[None]:
        """Treat any exception in the block as an outage, which ends with the next successful block."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - other components must continue
            self.began(error, with_traceback=not isinstance(error, ORDINARY))
        else:
            self.ended()


class Loop:
    """A thread that repeats ``one_pass`` until it is stopped. An exception is an outage, and the pass is retried."""

    def __init__(self, name: str, what: str, one_pass: Callable[[], None]) -> None:
        """``what`` describes an outage of the loop, such as "Redis cannot be read"."""
        self.stopped = threading.Event()
        self.outage = Outage(what)
        self._one_pass = one_pass
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_seconds: float) -> None:
        """Stop after the current pass, and wait for that."""
        self.stopped.set()
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while not self.stopped.is_set():
            try:
                self._one_pass()
            except BaseException as error:  # noqa: BLE001 - Celery also raises SystemExit
                self.outage.began(error, with_traceback=not isinstance(error, ORDINARY))
                self.stopped.wait(self._pause_seconds)
                self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)
            else:
                self.outage.ended()
                self._pause_seconds = FIRST_PAUSE_SECONDS
