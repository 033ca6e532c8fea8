"""Progress lines have the learning rate of their step, and a recent loss over a fixed window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.zeta_core.models import plain
from tests.zeta_core.runs import RecordedLines, train
from zeta_core.contract.job.events import LOSS_WINDOW_STEPS, ProgressLine
from zeta_core.contract.job.status import StopAction


def rates(lines: RecordedLines) -> dict[int, float]:
    """The learning rate of each step, from the progress lines and the single steps in them."""
    found: dict[int, float] = {}
    for line in lines.all:
        if isinstance(line, ProgressLine) and line.phase == "training":
            for figures in (*(line.steps or ()), *([line] if line.step is not None else [])):
                assert figures.step is not None
                assert figures.learning_rate is not None
                found[figures.step] = figures.learning_rate
    return found


def test_each_step_reports_the_rate_of_its_update_also_after_a_resume(tmp_path: Path) -> None:
    options: dict[str, Any] = {"warmup_steps": 4, "lr_scheduler": "linear", "learning_rate": 0.08, "cache": tmp_path}
    stops: list[StopAction | None] = [None, None, "pause"]
    _, first = train(plain(), tmp_path / "out", max_steps=8, stop=iter(stops).__next__, **options)
    _, second = train(plain(), tmp_path / "out", max_steps=8, resume=True, **options)
    expected = [0.02, 0.04, 0.06, 0.08, 0.08, 0.06, 0.04, 0.02]
    assert len(rates(first)) == 3
    found = rates(first) | rates(second)
    assert [found[step] for step in sorted(found)] == pytest.approx(expected)


def test_the_recent_loss_is_the_mean_over_a_fixed_number_of_steps(tmp_path: Path) -> None:
    _, lines = train(plain(), tmp_path / "out", cache=tmp_path, max_steps=LOSS_WINDOW_STEPS + 12, pack=True)
    steps = [line for line in lines.all if isinstance(line, ProgressLine) and line.phase == "training" and line.step]
    last = steps[-1]
    assert last.step == LOSS_WINDOW_STEPS + 12
    window = [each.loss for line in steps for each in (line.steps or ()) if each.step > 12]
    assert len(window) >= LOSS_WINDOW_STEPS - 2, "a line of a single step has no list"
    expected = sum(loss or 0.0 for loss in window) / len(window)
    assert last.recent_loss == pytest.approx(expected, rel=5e-3)
