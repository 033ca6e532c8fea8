"""Requests to stop a run: SIGTERM counts even if the stop file cannot be written or read."""

import signal
from pathlib import Path

from zeta_core.process.stop import Stop
from zeta_core.process.worker_monitor import WorkerMonitor


def test_a_signal_counts_while_the_stop_file_is_incomplete(tmp_path: Path) -> None:
    file = tmp_path / "stop"
    stop = Stop(file, WorkerMonitor(tmp_path / "alive"))
    stop.exits_on_signal = False
    file.touch()  # as a full disk leaves it
    assert stop() is None
    stop.on_signal(signal.SIGTERM, None)
    assert stop() == "hand_back"
    file.write_text('{"action": "cancel"}')
    assert stop() == "cancel"


def test_a_signal_is_recorded_although_the_stop_file_cannot_be_written(tmp_path: Path) -> None:
    stop = Stop(tmp_path / "missing" / "stop", WorkerMonitor(tmp_path / "alive"))
    stop.exits_on_signal, stop.write_on_signal = False, True
    stop.on_signal(signal.SIGTERM, None)
    assert stop() == "hand_back"
