"""Tests of stall detection: by step time, by phase, and by the time that the worker itself experienced."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from worker.run.watchdog import MIN_STEPS, Watchdog

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


class SimulatedWatchdog:
    """A watchdog with a simulated clock, checked ten times a second as in the supervising loop."""

    def __init__(self, *, factor: float = 10, floor_seconds: float = 30) -> None:
        self.now = 0.0
        self.idle_since = float("inf")
        self.watchdog = Watchdog(
            factor=factor,
            floor_seconds=floor_seconds,
            effort=lambda: min(self.now, self.idle_since),
            clock=lambda: self.now,
        )

    def report(self, phase: str, step: int | None = None, *, jump_seconds: float = 0, **more: float) -> None:
        reported_at = BEGIN + timedelta(seconds=self.now + jump_seconds)
        line: dict[str, Any] = {"type": "progress", "phase": phase, "step": step, "created_at": reported_at.isoformat()}
        self.watchdog.record_progress({**line, **more})

    def train(self, steps: int, *, seconds_per_step: float, first: int = 1) -> None:
        for step in range(first, first + steps):
            self.report("training", step)
            assert not self.wait(seconds_per_step)

    def wait(self, seconds: float) -> bool:
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            if self.watchdog.stalled_for() is not None:
                return True
        return False


def test_a_run_stalls_after_a_multiple_of_its_median_step_time() -> None:
    watched = SimulatedWatchdog(factor=10, floor_seconds=1)
    watched.train(20, seconds_per_step=2)
    assert not watched.wait(17)
    assert watched.wait(2)
    watched.report("training", 21)
    assert not watched.wait(19)


def test_a_fast_run_gets_the_minimum_time_and_a_line_may_cover_many_steps() -> None:
    watched = SimulatedWatchdog(factor=10, floor_seconds=30)
    for line in range(20):  # one line per second, each covering a hundred steps
        watched.report("training", 100 * line)
        assert not watched.wait(1)
    assert watched.watchdog.expectation() == "where a step took 0.01 s"
    assert not watched.wait(28)
    assert watched.wait(2)


@pytest.mark.parametrize("phase", ["loading_data", "loading_model", "fetching", "evaluating"])
def test_other_phases_have_no_time_limit(phase: str) -> None:
    watched = SimulatedWatchdog(floor_seconds=5)
    watched.train(20, seconds_per_step=0.1)
    watched.report(phase)
    assert not watched.wait(10_000)
    watched.report("training", 21)
    assert watched.wait(6)


def test_a_save_may_take_longer_but_not_forever() -> None:
    watched = SimulatedWatchdog(floor_seconds=5)
    watched.train(20, seconds_per_step=0.1)
    watched.report("saving", 20)
    assert not watched.wait(29)
    assert watched.wait(2)


def test_a_run_that_saves_after_every_line_also_has_a_step_time() -> None:
    watched = SimulatedWatchdog(floor_seconds=5)
    for step in (1, 20, 40):
        watched.report("training", step)
        watched.report("saving", step)
        assert not watched.wait(1)
    watched.report("training", 60)
    assert watched.wait(6)


def test_the_first_steps_and_evaluation_may_take_long_unless_idle() -> None:
    for phase in ("training", "evaluating"):
        watched = SimulatedWatchdog(floor_seconds=30)
        watched.train(MIN_STEPS, seconds_per_step=0.1)
        watched.report(phase, MIN_STEPS)
        assert not watched.wait(1_000)
        watched.idle_since = watched.now
        assert not watched.wait(14)
        assert watched.wait(12)
        assert watched.watchdog.expectation() == "and its processes were idle"


def test_loading_may_be_idle() -> None:
    watched = SimulatedWatchdog(floor_seconds=5)
    watched.idle_since = 0.0
    watched.report("loading_data")
    assert not watched.wait(1_000)


def test_an_evaluation_may_take_a_multiple_of_earlier_evaluations_and_steps() -> None:
    watched = SimulatedWatchdog(factor=10, floor_seconds=5)
    for step in (0, 20):
        watched.train(20, seconds_per_step=2, first=step)
        watched.report("evaluating", step + 20)
        assert not watched.wait(4)
        watched.report("evaluating", step + 20, eval_loss=1.0)
        assert not watched.wait(39), "an evaluation may also take the time of the next step"
    watched.report("training", 41)
    watched.report("evaluating", 41)
    assert not watched.wait(39)
    assert watched.wait(2)
    assert watched.watchdog.expectation() == "where an evaluation took 4 s"


def test_a_suspended_machine_and_a_clock_change_cause_no_stall() -> None:
    watched = SimulatedWatchdog(floor_seconds=30)
    watched.train(20, seconds_per_step=0.1)
    watched.now += 10_000
    assert not watched.wait(20)
    for step, jump in ((21, 90_000), (22, -90_000), (23, 0)):
        watched.report("training", step, jump_seconds=jump)
    assert watched.watchdog.expectation() == "where a step took 0.1 s"
