"""Tokens a second on identical work: same model, batches, optimizer and number of tokens."""

from __future__ import annotations

from benchmarks import loops
from benchmarks.answer import OURS, Answer, ratio_of_rounds
from benchmarks.work import Size


def measure(size: Size) -> Answer:
    tokens = loops.tokens_per_step(size)
    watches = loops.measured(size)
    speed = {name: [tokens / watch.seconds_per_step for watch in rounds] for name, rounds in watches.items()}
    return Answer(
        question="Identical work, ours by transformers.Trainer's",
        unit="tokens/s",
        figures=speed,
        ratio=ratio_of_rounds(loops.seconds_of_turns(watches[loops.TRAINER]), loops.seconds_of_turns(watches[OURS])),
        bar=1.0,
        better="at least",
        notes="Median step of each round, ratio of the steps of one turn; 6.8 M parameters, 8 x 256 tokens a step.",
    )
