"""What keeps a worker's threads and steps alive: every exception is an outage, logged once and tried again.

Guarantees: no exception, `SystemExit` from a library included, ends a `Loop` before it is stopped; an outage is logged
when it begins, with its traceback where it is not an ordinary one, and when it is over, and not in between.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

from zeta_core.contract.redis_access import RedisUnavailable

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.25, 2.0
ORDINARY = (RedisUnavailable, OSError)  # these explain themselves

logger = logging.getLogger(__name__)


class Outage:
    """Logs the beginning and the end of an outage of one part, and nothing in between."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._logged: set[str] = set()  # kinds of errors of the present outage

    def began(self, error: BaseException, *, with_traceback: bool = False) -> None:
        kind = type(error).__qualname__
        if kind not in self._logged:
            logger.warning(
                "%s: %s. Trying again until it works.",
                self._what,
                str(error).rstrip(".") or kind,
                exc_info=error if with_traceback else None,
                extra={"action": "outage"},
            )
        self._logged.add(kind)

    def ended(self) -> None:
        if self._logged:
            logger.info("%s: it works again.", self._what, extra={"action": "outage_over"})
        self._logged.clear()

    @contextmanager
    def survived(self) -> Generator[None]:
        """Turn any exception of the block into an outage, which the next block without one ends."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it was, its neighbours go on
            self.began(error, with_traceback=not isinstance(error, ORDINARY))
        else:
            self.ended()


class Loop:
    """A thread that repeats ``one_pass`` until it is stopped; what it raises is an outage, and it is repeated later."""

    def __init__(self, name: str, what: str, one_pass: Callable[[], None]) -> None:
        """``what``: the sentence about its outages, such as "Redis cannot be read"."""
        self.stopped = threading.Event()
        self.outage = Outage(what)
        self._one_pass = one_pass
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_seconds: float) -> None:
        """Tell it to end after its pass, and wait for that."""
        self.stopped.set()
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while not self.stopped.is_set():
            try:
                self._one_pass()
            except BaseException as error:  # noqa: BLE001 - Celery ends its workers by SystemExit, too
                self.outage.began(error, with_traceback=not isinstance(error, ORDINARY))
                self.stopped.wait(self._pause_seconds)
                self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)
            else:
                self.outage.ended()
                self._pause_seconds = FIRST_PAUSE_SECONDS
