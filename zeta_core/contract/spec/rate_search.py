"""``learning_rate: "find"``: how much a search may cost, and what it tells of itself in a ``log`` event."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Find = Literal["find"]
FIND: Find = "find"

MOST_UPDATES = 100
FEWEST_UPDATES = 20  # fewer are too coarse a look at several powers of ten
LARGEST_SHARE = 0.1  # of the run's steps
FOUND_AT_THE_START = (
    f"It is found by a test before the first step: up to {MOST_UPDATES} updates of a copy of the model, and at most "
    f"{LARGEST_SHARE:.0%} of the run's steps, come on top of the training."
)
SHORTEST_RUN = round(FEWEST_UPDATES / LARGEST_SHARE)  # steps


def num_updates(total_steps: int) -> int:
    """The updates of a search for a run of so many steps; 0 where the run is shorter than `SHORTEST_RUN`."""
    return 0 if total_steps < SHORTEST_RUN else min(MOST_UPDATES, int(LARGEST_SHARE * total_steps))


class RateSearch(BaseModel):
    """A learning-rate range test, update by update, and the ``learning_rate`` that was chosen from it.

    ``losses`` are the mean losses of global batches, each computed after an update with the rate of ``rates`` at its
    place; ``losses_at_start`` are those of the same batches by the model before the first update. ``diverged``: the
    test ended early, because the loss was worse than at the start or not finite. ``share`` (0 to 1) is that of the
    run's steps which the updates come to; ``seconds`` is all that the search took.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    learning_rate: float
    rates: list[float]
    losses: list[float]
    losses_at_start: list[float]
    diverged: bool
    share: float
    seconds: float
