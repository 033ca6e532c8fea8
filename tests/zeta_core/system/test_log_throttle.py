"""Repeated log messages are limited to one per minute and source."""

import logging

import pytest

from zeta_core.system import log_throttle
from zeta_core.system.log_throttle import LogThrottle

logger = logging.getLogger("tests.log_throttle")


def test_each_source_logs_once_and_counts_the_omitted_messages(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    throttle = LogThrottle(logger, action="dropped")
    for number in range(3):
        throttle.log("a stream", logging.WARNING, f"Removed entry {number}")
    throttle.log("a queue", logging.ERROR, "Removed an entry")
    assert [record.getMessage() for record in caplog.records] == ["Removed entry 0", "Removed an entry"]
    assert {record.__dict__["action"] for record in caplog.records} == {"dropped"}

    monkeypatch.setattr(log_throttle, "LOG_SECONDS", 0.0)
    throttle.log("a stream", logging.WARNING, "Removed entry 3")
    throttle.log("a stream", logging.WARNING, "Removed entry 4")
    assert [record.getMessage() for record in caplog.records[2:]] == [
        "Removed entry 3 (2 more since the last report)",
        "Removed entry 4",
    ]


def test_the_traceback_of_an_error_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    error = ValueError("a defect")
    LogThrottle(logger, action="dropped").log("here", logging.ERROR, "Failed", error)
    assert caplog.records[0].exc_info is not None
    assert caplog.records[0].exc_info[1] is error
