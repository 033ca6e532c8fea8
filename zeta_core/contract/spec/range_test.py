"""``learning_rate: "find"``: the limits of a range test, and its report in a ``log`` event."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Find = Literal["find"]
FIND: Find = "find"

MAX_UPDATES = 100
MIN_UPDATES = 20  # fewer would sample several powers of ten too coarsely
MAX_SHARE = 0.1  # of the run's steps
RATE_UNKNOWN = (
    f"Unknown until a range test before the first step: up to {MAX_UPDATES} updates of a copy of the model, at most "
    f"{MAX_SHARE:.0%} of the run's steps, in addition to the training itself."
)
MIN_RUN_STEPS = round(MIN_UPDATES / MAX_SHARE)


def num_updates(total_steps: int) -> int:
    """The number of updates of a range test; 0 if the run is shorter than `MIN_RUN_STEPS`."""
    return 0 if total_steps < MIN_RUN_STEPS else min(MAX_UPDATES, int(MAX_SHARE * total_steps))


class RangeTest(BaseModel):
    """A learning-rate range test: the rate and loss of each update, and the ``learning_rate`` chosen from them.

    ``losses`` are the mean losses of global batches, each computed after an update with the rate at the same index in
    ``rates``. ``losses_at_start`` are the losses of the same batches before the first update. ``diverged``: the test
    ended early, because the loss was worse than at the start or not finite. ``share`` (0 to 1) is the number of updates
    relative to the steps of the run. ``seconds`` is the duration of the whole test.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    learning_rate: float
    rates: list[float]
    losses: list[float]
    losses_at_start: list[float]
    diverged: bool
    share: float
    seconds: float
