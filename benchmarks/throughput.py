"""Tokens a second on identical work: same model, batches, optimizer and number of tokens."""

from __future__ import annotations

from benchmarks import loops
from benchmarks.answer import OURS, Answer, ratio_of_rounds
from benchmarks.work import Size


def measure(size: Size) -> Answer:
    tokens = loops.BATCH_SIZE * loops.SEQ_LEN
    speed = {
        name: [tokens / watch.seconds_per_step for watch in rounds] for name, rounds in loops.measured(size).items()
    }
    return Answer(
        question="Identical work, ours by transformers.Trainer's",
        unit="tokens/s",
        figures=speed,
        ratio=ratio_of_rounds(speed[OURS], speed[loops.TRAINER]),
        bar=1.0,
        better="at least",
        notes="Median step of each round; 6.8 M parameters, 8 x 256 tokens a step.",
    )
