"""How long a step takes outside forward, backward, clipping and the optimizer: data, schedule, events, saving."""

from __future__ import annotations

from benchmarks import loops
from benchmarks.answer import OURS, Answer, ratio_of_rounds
from benchmarks.work import Size


def measure(size: Size) -> Answer:
    by_loop = loops.measured(size)
    wall = {name: [1000 * watch.outside_wall for watch in rounds] for name, rounds in by_loop.items()}
    cpu = {name: [1000 * watch.outside_cpu for watch in rounds] for name, rounds in by_loop.items()}
    return Answer(
        question="Loop's time outside the maths, ours by a bare loop's",
        unit="ms a step",
        figures=wall,
        ratio=ratio_of_rounds(wall[OURS], wall[loops.BARE]),
        bar=1.3,
        better="at most",
        notes="6.8 M parameters, 8 x 256 tokens a step; processor time of the training's thread in `more`.",
        more={"cpu_ms": cpu, "cpu_ratio": ratio_of_rounds(cpu[OURS], cpu[loops.BARE])},
    )
