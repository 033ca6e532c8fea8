"""Tokens a second of an evaluation on the same held-out tokens: ours, and `transformers.Trainer.evaluate`.

The lines of text that ours lets the model write at each evaluation are not in it: the peer writes none.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from benchmarks import loops, work
from benchmarks.answer import OURS, Answer, ratio_of_rounds
from benchmarks.contestants import turn_of
from benchmarks.work import Size
from zeta_core.objective.evaluation import Evaluator
from zeta_core.objective.sampling import Samples

BATCH_SIZE, SEQ_LEN, VOCABULARY = 8, 256, 384
PEER = "Trainer.evaluate"


@contextmanager
def timed() -> Generator[list[float]]:
    """The seconds of each evaluation of ours within it, the writing of samples taken off."""
    evaluate, write = Evaluator.evaluate, Samples.write
    seconds: list[float] = []
    writing = [0.0]

    @wraps(write)
    def timed_write(self: Samples, *arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return write(self, *arguments, **named)
        finally:
            writing[0] += time.perf_counter() - started

    @wraps(evaluate)
    def timed_evaluate(self: Evaluator, *arguments: Any, **named: Any) -> Any:
        writing[0] = 0.0
        started = time.perf_counter()
        answer = evaluate(self, *arguments, **named)
        seconds.append(time.perf_counter() - started - writing[0])
        return answer

    Evaluator.evaluate, Samples.write = timed_evaluate, timed_write
    try:
        yield seconds
    finally:
        Evaluator.evaluate, Samples.write = evaluate, write


def ours(size: Size, folder: Path, trained: Path, held_out: Path) -> float:
    with timed() as seconds:
        work.train_ours(
            work.llama(size, vocab_size=VOCABULARY),
            folder,
            dataset=trained,
            eval_dataset={"path": str(held_out)},
            eval_steps=2,
            max_steps=2,
            seq_len=SEQ_LEN,
            batch_size=BATCH_SIZE,
        )
    [only] = seconds
    return only


def peer(size: Size, folder: Path, held_out: Path, num_sequences: int) -> float:
    from transformers import Trainer

    rows = work.Rows(work.batches(held_out, seq_len=SEQ_LEN, batch_size=num_sequences, steps=1))
    arguments = work.trainer_arguments(
        folder, batch_size=BATCH_SIZE, steps=2, per_device_eval_batch_size=BATCH_SIZE, prediction_loss_only=True
    )
    model: Any = work.llama(size, vocab_size=VOCABULARY)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    started = time.perf_counter()
    trainer.evaluate()
    return time.perf_counter() - started


def measure(size: Size) -> Answer:
    num_sequences = size.of(96, 16)
    speed: dict[str, list[float]] = {OURS: [], PEER: []}
    for turn in range(size.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            trained = work.token_file(folder, num_tokens=4 * BATCH_SIZE * SEQ_LEN, vocabulary=VOCABULARY)
            held_out = work.token_file(folder, num_tokens=num_sequences * SEQ_LEN, vocabulary=VOCABULARY)
            for contestant in (OURS, PEER)[:: 1 if turn % 2 == 0 else -1]:
                if contestant == OURS:
                    seconds = turn_of(OURS, size, ours, size, folder / "ours", trained, held_out)
                else:
                    seconds = turn_of(loops.TRAINER, size, peer, size, folder / "peer", held_out, num_sequences)
                speed[contestant].append(num_sequences * (SEQ_LEN - 1) / seconds)
    return Answer(
        question="Evaluation of the same tokens, ours by Trainer.evaluate's",
        unit="tokens/s",
        figures=speed,
        ratio=ratio_of_rounds(speed[OURS], speed[PEER]),
        bar=1.0,
        better="at least",
        notes=f"6 M parameters, {num_sequences} sequences of {SEQ_LEN} tokens, {BATCH_SIZE} at a time.",
    )
