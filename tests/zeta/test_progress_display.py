"""The progress line of a followed job, for all widths and all kinds of progress."""

from typing import Any

import pytest
from rich.cells import cell_len

from zeta.cli.progress_display import ProgressDisplay
from zeta.cli.sparkline import LEVELS, LossHistory, sparkline

TRAINING: dict[str, Any] = {
    "phase": "training",
    "step": 730,
    "total_steps": 1000,
    "loss": 2.34567,
    "tokens_per_second": 12345.6,
    "eta_seconds": 3725.0,
}


def display(*progress: dict[str, Any]) -> ProgressDisplay:
    shown = ProgressDisplay()
    for fields in progress:
        shown.update(fields)
    return shown


@pytest.mark.parametrize("ascii_only", [False, True])
def test_the_line_fits_every_width_and_shows_the_step_first(ascii_only: bool) -> None:
    shown = display(*({**TRAINING, "step": step, "loss": 1000 / step} for step in range(1, 731)))
    for width in range(20, 201):
        line = shown.render(width, ascii_only=ascii_only).plain
        assert cell_len(line) <= width
        assert "730/1000" in line
        assert line.isascii() or not ascii_only
    assert shown.render(40).plain == "730/1000  loss 1.3699  1 h 2 min left"
    wide = shown.render(200).plain
    assert all(part in wide for part in ("training", "━", "█", "loss 1.3699", "12,346 tokens/s", "1 h 2 min left"))


def test_the_bar_covers_the_completed_share() -> None:
    bar = display({**TRAINING, "step": 500}).render(200).plain.split("  ")[1]
    assert bar == "━" * 20 + "─" * 20
    reading = display({"phase": "loading_data", "share": 0.25}).render(80).plain.split("  ")
    assert reading == ["loading data", "━" * 10 + "─" * 30, "25%"]


def test_a_job_that_waits_or_counts_no_steps_has_no_bar() -> None:
    assert display().render(80).plain == "waiting"
    assert display({"phase": "loading_model"}).render(80).plain == "loading model"


def test_a_phase_without_figures_keeps_the_previous_ones() -> None:
    saving = display(TRAINING, {"phase": "saving"}).render(200).plain
    assert saving.startswith("saving")
    assert "730/1000" in saving
    assert "loss 2.3457" in saving


def test_a_sparkline_shows_means_of_equal_shares_from_low_to_high() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8) == LEVELS[::-1]
    assert sparkline([4, 4, 0, 0], 2) == "█▁"
    assert sparkline([1, 1, 1], 8) == "▁▁▁"
    assert sparkline([1.0, float("nan"), 2.0, float("inf")], 8) == "▁█"
    assert sparkline([], 8) == sparkline([1], 0) == ""


def test_the_steps_of_a_resumed_attempt_replace_those_after_its_checkpoint() -> None:
    history = LossHistory()
    for step, loss in ((1, 1.0), (2, 5.0), (3, 9.0), (2, 2.0)):
        history.add(step, loss)
    assert history.sparkline(8) == "▁█", "the losses 1 and 2"


def test_the_history_of_a_long_job_stays_small() -> None:
    history = LossHistory()
    for step in range(100_000):
        history.add(step, float(-step))
    assert history.sparkline(8) == LEVELS[::-1]
    assert len(history) <= LossHistory.MAX_POINTS
