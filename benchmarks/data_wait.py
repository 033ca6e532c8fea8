"""The share of time that training waits for data, from the progress events of a run."""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

from benchmarks import loops, workload
from benchmarks.contestants import run_isolated
from benchmarks.result import ZETA, BenchmarkResult
from benchmarks.stopwatch import Stopwatch
from benchmarks.workload import Size
from zeta_core.contract.job.events import JOURNAL_LINE, ProgressLine


def one_round(size: Size, folder: Path) -> float:
    """The mean of the shares that a run reports after its first step."""
    loops.run_zeta(loops.task(size, folder, 2 * size.steps), workload.llama(size), Stopwatch(skip=0))
    with (folder / "zeta" / "events.jsonl").open() as journal:
        lines = [JOURNAL_LINE.validate_python(json.loads(text)) for text in journal]
    progress = [line for line in lines if isinstance(line, ProgressLine) and line.data_wait_share is not None]
    return statistics.mean(line.data_wait_share or 0.0 for line in progress[1:])


def measure(size: Size) -> BenchmarkResult:
    shares: list[float] = []
    for _ in range(max(1, size.rounds // 2)):
        with tempfile.TemporaryDirectory() as name:
            shares.append(run_isolated(ZETA, size, one_round, size, Path(name)))
    return BenchmarkResult(
        title="Share of the time that the run waits for data",
        unit="share",
        figures={ZETA: shares},
        ratio=statistics.median(shares),
        target=0.01,
        target_is="maximum",
        notes="6.8 M parameters, 8 x 256 tokens per step. The ratio is the share itself.",
    )
