"""Time of a step outside forward, backward, clipping and the optimizer: data, schedule, events, saving."""

from __future__ import annotations

from benchmarks import loops
from benchmarks.result import ZETA, BenchmarkResult, ratio_of_rounds
from benchmarks.workload import Size


def measure(size: Size) -> BenchmarkResult:
    by_loop = loops.measure_loops(size)
    wall = {name: [1000 * stopwatch.outside_wall for stopwatch in rounds] for name, rounds in by_loop.items()}
    cpu = {name: [1000 * stopwatch.outside_cpu for stopwatch in rounds] for name, rounds in by_loop.items()}
    return BenchmarkResult(
        title="Time of a step outside the computation, relative to a bare loop",
        unit="ms per step",
        figures=wall,
        ratio=ratio_of_rounds(wall[ZETA], wall[loops.BARE]),
        target=1.3,
        target_is="maximum",
        notes="6.8 M parameters, 8 x 256 tokens per step; `details` has the training thread's CPU time.",
        details={"cpu_ms": cpu, "cpu_ratio": ratio_of_rounds(cpu[ZETA], cpu[loops.BARE])},
    )
