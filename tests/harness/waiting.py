"""Waiting for a condition, instead of sleeping."""

import time
from collections.abc import Callable
from typing import TypeVar

Answer = TypeVar("Answer")
POLL_SECONDS = 0.02
LOADED_FACTOR = 4  # time limits are for an idle machine; a busy one needs more


def wait_until(predicate: Callable[[], Answer], timeout_seconds: float, what: str) -> Answer:
    """Call the predicate until its result is true, and return the result.

    ``what`` completes the sentence "waited for ...". Exceptions of the predicate are not caught. Raises
    `AssertionError` with the last result after `LOADED_FACTOR` times ``timeout_seconds``, and after a final call.
    """
    limit = LOADED_FACTOR * timeout_seconds
    deadline = time.monotonic() + limit
    while True:
        is_last = time.monotonic() >= deadline
        value = predicate()
        if value:
            return value
        if is_last:
            raise AssertionError(f"waited {limit:g} s for {what}; the last value was {value!r}")
        time.sleep(POLL_SECONDS)  # noqa: TID251 - the one place where tests sleep
