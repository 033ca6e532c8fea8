"""When a training stands still: by its own pace, in phases where it must go on, in time that the worker was awake."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from worker.training.watchdog import MIN_STEPS, Watchdog

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


class Watched:
    """A watchdog with a clock that the test moves, asked ten times a second as the supervising loop does."""

    def __init__(self, *, factor: float = 10, floor_seconds: float = 30) -> None:
        self.now = 0.0
        self.idle_since = float("inf")
        self.watchdog = Watchdog(
            factor=factor,
            floor_seconds=floor_seconds,
            effort=lambda: min(self.now, self.idle_since),
            clock=lambda: self.now,
        )

    def say(self, phase: str, step: int | None = None, *, jump_seconds: float = 0, **more: float) -> None:
        said_at = BEGIN + timedelta(seconds=self.now + jump_seconds)
        line: dict[str, Any] = {"type": "progress", "phase": phase, "step": step, "created_at": said_at.isoformat()}
        self.watchdog.record_progress({**line, **more})

    def train(self, steps: int, *, seconds_per_step: float, first: int = 1) -> None:
        for step in range(first, first + steps):
            self.say("training", step)
            assert not self.wait(seconds_per_step)

    def wait(self, seconds: float) -> bool:
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            if self.watchdog.stalled_for() is not None:
                return True
        return False


def test_a_training_is_stalled_after_so_many_times_its_median_step() -> None:
    watched = Watched(factor=10, floor_seconds=1)
    watched.train(20, seconds_per_step=2)
    assert not watched.wait(17)
    assert watched.wait(2)
    watched.say("training", 21)
    assert not watched.wait(19)


def test_a_fast_training_gets_the_floor_and_a_slow_line_is_the_pace_of_its_steps() -> None:
    watched = Watched(factor=10, floor_seconds=30)
    for line in range(20):  # one line a second, of a hundred steps each
        watched.say("training", 100 * line)
        assert not watched.wait(1)
    assert watched.watchdog.expectation() == "where a step took 0.01 s"
    assert not watched.wait(28)
    assert watched.wait(2)


@pytest.mark.parametrize("phase", ["loading_data", "loading_model", "fetching", "evaluating"])
def test_other_phases_take_as_long_as_they_take(phase: str) -> None:
    watched = Watched(floor_seconds=5)
    watched.train(20, seconds_per_step=0.1)
    watched.say(phase)
    assert not watched.wait(10_000)
    watched.say("training", 21)
    assert watched.wait(6)


def test_a_save_may_take_longer_and_not_for_ever() -> None:
    watched = Watched(floor_seconds=5)
    watched.train(20, seconds_per_step=0.1)
    watched.say("saving", 20)
    assert not watched.wait(29)
    assert watched.wait(2)


def test_a_training_that_saves_after_every_line_has_a_pace_too() -> None:
    watched = Watched(floor_seconds=5)
    for step in (1, 20, 40):
        watched.say("training", step)
        watched.say("saving", step)
        assert not watched.wait(1)
    watched.say("training", 60)
    assert watched.wait(6)


def test_the_first_steps_and_the_first_evaluation_may_take_long_but_not_do_nothing() -> None:
    for phase in ("training", "evaluating"):
        watched = Watched(floor_seconds=30)
        watched.train(MIN_STEPS, seconds_per_step=0.1)
        watched.say(phase, MIN_STEPS)
        assert not watched.wait(1_000)
        watched.idle_since = watched.now
        assert not watched.wait(14)
        assert watched.wait(12)
        assert watched.watchdog.expectation() == "and its processes did nothing"


def test_loading_may_wait_for_others_and_do_nothing() -> None:
    watched = Watched(floor_seconds=5)
    watched.idle_since = 0.0
    watched.say("loading_data")
    assert not watched.wait(1_000)


def test_an_evaluation_is_measured_by_those_before_it_and_by_the_steps_around_it() -> None:
    watched = Watched(factor=10, floor_seconds=5)
    for step in (0, 20):
        watched.train(20, seconds_per_step=2, first=step)
        watched.say("evaluating", step + 20)
        assert not watched.wait(4)
        watched.say("evaluating", step + 20, eval_loss=1.0)
        assert not watched.wait(39), "the next step is waited for as well"
    watched.say("training", 41)
    watched.say("evaluating", 41)
    assert not watched.wait(39)
    assert watched.wait(2)
    assert watched.watchdog.expectation() == "where an evaluation took 4 s"


def test_a_machine_that_slept_and_a_clock_that_jumped_stall_nobody() -> None:
    watched = Watched(floor_seconds=30)
    watched.train(20, seconds_per_step=0.1)
    watched.now += 10_000
    assert not watched.wait(20)
    for step, jump in ((21, 90_000), (22, -90_000), (23, 0)):
        watched.say("training", step, jump_seconds=jump)
    assert watched.watchdog.expectation() == "where a step took 0.1 s"
