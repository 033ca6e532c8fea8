"""Tokens per second on identical work: the same model, batches, optimizer and number of tokens."""

from __future__ import annotations

from benchmarks import loops
from benchmarks.result import ZETA, BenchmarkResult, ratio_of_rounds
from benchmarks.workload import Size


def measure(size: Size) -> BenchmarkResult:
    tokens = loops.tokens_per_step(size)
    stopwatches = loops.measure_loops(size)
    speed = {
        name: [tokens / stopwatch.seconds_per_step for stopwatch in rounds] for name, rounds in stopwatches.items()
    }
    return BenchmarkResult(
        title="Identical work, relative to transformers.Trainer",
        unit="tokens/s",
        figures=speed,
        ratio=ratio_of_rounds(
            loops.seconds_of_steps(stopwatches[loops.TRAINER]), loops.seconds_of_steps(stopwatches[ZETA])
        ),
        target=1.0,
        target_is="minimum",
        notes="Figures: median step of each round. Ratio: single steps. 6.8 M parameters, 8 x 256 tokens per step.",
    )
