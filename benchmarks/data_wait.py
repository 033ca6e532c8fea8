"""The share of a training's time in which it waits for its data, as its own progress events tell it."""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

from benchmarks import loops, work
from benchmarks.answer import OURS, Answer
from benchmarks.contestants import turn_of
from benchmarks.stopwatch import Stopwatch
from benchmarks.work import Size
from zeta_core.contract.job.events import JOURNAL_LINE, ProgressLine


def one_round(size: Size, folder: Path) -> float:
    """The mean of the shares that a run tells after its first step."""
    loops.ours(loops.task(size, folder, 2 * size.steps), work.llama(size), Stopwatch(skip=0))
    with (folder / "ours" / "events.jsonl").open() as journal:
        lines = [JOURNAL_LINE.validate_python(json.loads(text)) for text in journal]
    told = [line for line in lines if isinstance(line, ProgressLine) and line.data_wait_share is not None]
    return statistics.mean(line.data_wait_share or 0.0 for line in told[1:])


def measure(size: Size) -> Answer:
    shares: list[float] = []
    for _ in range(max(1, size.rounds // 2)):
        with tempfile.TemporaryDirectory() as name:
            shares.append(turn_of(OURS, size, one_round, size, Path(name)))
    return Answer(
        question="Share of the time that training waits for data",
        unit="share",
        figures={OURS: shares},
        ratio=statistics.median(shares),
        bar=0.01,
        better="at most",
        notes="6.8 M parameters, 8 x 256 tokens a step; the share itself stands where others have a ratio.",
    )
