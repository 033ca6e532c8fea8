"""Waiting for something to become true, which is the only way a test waits."""

import time
from collections.abc import Callable
from typing import TypeVar

Answer = TypeVar("Answer")
POLL_SECONDS = 0.02
LOADED_FACTOR = 4  # a limit is what a quiet machine needs; one that also does other work gets more


def wait_until(predicate: Callable[[], Answer], timeout_seconds: float, what: str) -> Answer:
    """Ask again and again until the answer is true, and return that answer.

    ``what`` completes the sentence "waited for ...". An exception of the predicate passes through at once. Raises
    `AssertionError` with the last answer after `LOADED_FACTOR` times ``timeout_seconds``; the predicate is always asked
    once more at the end.
    """
    limit = LOADED_FACTOR * timeout_seconds
    deadline = time.monotonic() + limit
    while True:
        is_last = time.monotonic() >= deadline
        answer = predicate()
        if answer:
            return answer
        if is_last:
            raise AssertionError(f"waited {limit:g} s for {what}; the last answer was {answer!r}")
        time.sleep(POLL_SECONDS)  # noqa: TID251 - the one place where tests sleep
