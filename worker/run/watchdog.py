"""Detects a run that makes no progress, from its journal and from the activity of its processes.

A run has stalled if it reports no progress for ``factor`` times the expected time, and for at least
``floor_seconds``. The expected time is the median time of a step, once this attempt has reported `MIN_STEPS`; a save
gets `PATIENCE` times that, and an evaluation the time of the longest earlier one. As long as the expected time is
unknown (during the first steps, in which a model may be compiled, and the first evaluation), a run has stalled
only if it is idle: for half of ``floor_seconds``, its processes together used less than `IDLE_SHARE` of a core and
hardly read or wrote. Loading is exempt: it may wait for a network or another job, the libraries have timeouts of their
own, and processing data has CPU time limits. Only time that this process itself experienced counts, so a suspended
machine causes no stall.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from statistics import median
from typing import Any

import psutil

MIN_STEPS = 5
NUM_PACES = 101
PATIENCE = {"training": 1, "saving": 6}
WATCHED = ("training", "saving", "evaluating")
MAX_TICK_SECONDS = 1.0
SAVE_SECONDS = 600.0  # a large model on a slow disk
IDLE_SHARE = 0.05
EFFORT_SECONDS = 10.0  # between two measurements of what the processes do
BYTES_OF_A_SECOND = 2**20  # as many bytes read or written count as a second of work


class Watchdog:
    """Receives every progress line, and is checked in every round of the supervising loop."""

    def __init__(
        self,
        *,
        factor: float,
        floor_seconds: float,
        effort: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``effort`` returns the work that the processes have done, in seconds (`measure_effort`)."""
        self._factor = factor
        self._floor_seconds = floor_seconds
        self._effort = effort
        self._clock = clock
        self._paces: deque[float] = deque(maxlen=NUM_PACES)  # seconds per step
        self._num_steps = 0  # number of steps whose pace is known
        self._before: tuple[int, datetime] | None = None
        self._evaluates_since: datetime | None = None
        self._longest_evaluation: float | None = None  # seconds
        self._phase = ""
        self._idle_seconds = 0.0
        self._idle_since: tuple[float, float] | None = None  # idle seconds and effort when the processes became idle
        self._next_effort = 0.0  # in idle seconds
        self._looked_at = clock()

    def record_progress(self, line: Mapping[str, Any]) -> None:
        """Record a progress line. Its pace is that of the writer's clock; if that clock jumps, one value is wrong."""
        self._phase = str(line.get("phase"))
        self._idle_seconds, self._idle_since = 0.0, None
        step, reported_at = line.get("step"), _time(line.get("created_at"))
        self._time_evaluation(line, reported_at)
        if self._phase == "saving":
            return  # a save runs during the next steps and may slow them down
        if self._phase != "training" or not isinstance(step, int) or reported_at is None:
            self._before = None
            return
        if self._before is not None and step > self._before[0]:
            steps = step - self._before[0]
            self._num_steps += steps
            self._paces.append(max(0.0, (reported_at - self._before[1]).total_seconds()) / steps)
        self._before = (step, reported_at)

    def stalled_for(self) -> float | None:
        """For how many seconds the run has made no progress, if that is too long."""
        now = self._clock()
        self._idle_seconds += min(now - self._looked_at, MAX_TICK_SECONDS)
        self._looked_at = now
        if self._phase not in WATCHED:
            return None
        usual = self._usual_seconds
        if usual is None:
            stalled = self._idle_seconds > self._floor_seconds and self._is_idle()
        else:
            patience = PATIENCE.get(self._phase, 1)
            stalled = self._idle_seconds > patience * max(self._floor_seconds, self._factor * usual)
        return self._idle_seconds if stalled else None

    @property
    def needs_seconds(self) -> float:
        """How long a run may take until it checks for a stop request: its current step or save."""
        step = 2 * median(self._paces) if self._paces else 0.0
        return step + (SAVE_SECONDS if self._phase == "saving" else 0.0)

    def expectation(self) -> str:
        """The expected time, as the end of a sentence."""
        if self._usual_seconds is None:
            return "and its processes were idle"
        what = "an evaluation" if self._phase == "evaluating" else "a step"
        return f"where {what} took {self._usual_seconds:.2g} s"

    @property
    def _usual_seconds(self) -> float | None:
        """The expected time until the next line, if known: the median step, or the longest earlier evaluation."""
        if self._num_steps < MIN_STEPS:
            return None
        pace = median(self._paces)
        if self._phase != "evaluating":
            return pace
        return None if self._longest_evaluation is None else max(pace, self._longest_evaluation)

    def _time_evaluation(self, line: Mapping[str, Any], reported_at: datetime | None) -> None:
        """Measure evaluations: each reports its beginning, and its loss at its end."""
        if self._phase != "evaluating" or reported_at is None:
            self._evaluates_since = None
        elif line.get("eval_loss") is None:
            self._evaluates_since = reported_at
        elif self._evaluates_since is not None:
            took = (reported_at - self._evaluates_since).total_seconds()
            self._longest_evaluation = max(0.0, took, self._longest_evaluation or 0.0)

    def _is_idle(self) -> bool:
        """Whether the processes have been idle for half of the floor; they are measured at intervals."""
        if self._idle_since is not None and self._idle_seconds < self._next_effort:
            return False
        self._next_effort = self._idle_seconds + min(EFFORT_SECONDS, self._floor_seconds / 4)
        effort = self._effort()
        if self._idle_since is None:
            self._idle_since = (self._idle_seconds, effort)
            return False
        seconds = self._idle_seconds - self._idle_since[0]
        if effort - self._idle_since[1] > IDLE_SHARE * seconds:
            self._idle_since = (self._idle_seconds, effort)
            return False
        return seconds >= self._floor_seconds / 2


def measure_effort(processes: Iterable[psutil.Process]) -> float:
    """The work that these processes have done so far: seconds of a core, and one for `BYTES_OF_A_SECOND` moved."""
    done = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
            done += times.user + times.system
            if sys.platform == "linux":
                moved = process.io_counters()
                done += (moved.read_chars + moved.write_chars) / BYTES_OF_A_SECOND
        except psutil.Error:
            continue  # it has just exited
    return done


def _time(value: object) -> datetime | None:
    try:
        return datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None
