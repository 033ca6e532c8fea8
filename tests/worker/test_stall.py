"""When a training stands still: by its own pace, in phases where it must go on, in time that the worker was awake."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from worker.stall import MIN_STEPS, Watchdog

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


class Watched:
    """A watchdog with a clock that the test moves, asked ten times a second as the supervising loop does."""

    def __init__(self, *, factor: float = 10, floor_seconds: float = 30) -> None:
        self.now = 0.0
        self.watchdog = Watchdog(factor=factor, floor_seconds=floor_seconds, clock=lambda: self.now)

    def say(self, phase: str, step: int | None = None, *, jump_seconds: float = 0) -> None:
        said_at = BEGIN + timedelta(seconds=self.now + jump_seconds)
        line: dict[str, Any] = {"type": "progress", "phase": phase, "step": step, "created_at": said_at.isoformat()}
        self.watchdog.saw(line)

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
    assert watched.watchdog.pace == pytest.approx(0.01)
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


def test_the_first_steps_are_not_counted() -> None:
    watched = Watched(floor_seconds=5)
    watched.train(MIN_STEPS, seconds_per_step=0.1)
    assert not watched.wait(10_000)


def test_a_machine_that_slept_and_a_clock_that_jumped_stall_nobody() -> None:
    watched = Watched(floor_seconds=30)
    watched.train(20, seconds_per_step=0.1)
    watched.now += 10_000
    assert not watched.wait(20)
    for step, jump in ((21, 90_000), (22, -90_000), (23, 0)):
        watched.say("training", step, jump_seconds=jump)
    assert watched.watchdog.pace == pytest.approx(0.1)
