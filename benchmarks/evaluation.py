"""Tokens a second of an evaluation on the same held-out tokens: ours, and `transformers.Trainer.evaluate`.

Both are timed whole, from the call to its end, and take turns batch by batch. The lines of text that ours lets the
model write at each evaluation are not in it: the peer writes none.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks import loops, work
from benchmarks.answer import OURS, Answer, ratio_of_rounds
from benchmarks.contestants import let_the_others_go, side_by_side
from benchmarks.work import Size
from zeta_core.objective.evaluation import Evaluator
from zeta_core.objective.sampling import SampleWriter

BATCH_SIZE, SEQ_LEN, VOCABULARY = 8, 256, 384
PEER = "Trainer.evaluate"


@dataclass
class Clock:
    """The seconds of one evaluation, less those in which it waited for its turn, or wrote samples."""

    seconds: float = 0.0
    _runs: bool = False

    @contextmanager
    def running(self, model: nn.Module) -> Generator[None]:
        """Before each call of ``model`` within it the others have theirs."""
        hook = model.register_forward_pre_hook(self._before_batch)
        self._runs = True
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started
            self._runs = False
            hook.remove()

    @contextmanager
    def standing(self) -> Generator[None]:
        """Within it time does not count."""
        self._runs = False
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds -= time.perf_counter() - started
            self._runs = True

    def _before_batch(self, *_: object) -> None:
        if self._runs:
            self.seconds -= let_the_others_go()


@contextmanager
def timed(model: nn.Module) -> Generator[Clock]:
    """A clock of the evaluations of ours within it."""
    evaluate, write = Evaluator.evaluate, SampleWriter.write
    clock = Clock()

    @wraps(write)
    def unclocked_write(self: SampleWriter, *arguments: Any, **named: Any) -> Any:
        with clock.standing():
            return write(self, *arguments, **named)

    @wraps(evaluate)
    def clocked_evaluate(self: Evaluator, *arguments: Any, **named: Any) -> Any:
        with clock.running(model):
            return evaluate(self, *arguments, **named)

    Evaluator.evaluate, SampleWriter.write = clocked_evaluate, unclocked_write
    try:
        yield clock
    finally:
        Evaluator.evaluate, SampleWriter.write = evaluate, write


def ours(size: Size, folder: Path, trained: Path, held_out: Path) -> float:
    model = work.llama(size, vocab_size=VOCABULARY)
    with timed(model) as clock:
        work.train_ours(
            model,
            folder,
            dataset=trained,
            eval_dataset={"path": str(held_out)},
            eval_steps=2,
            max_steps=2,
            seq_len=SEQ_LEN,
            batch_size=BATCH_SIZE,
        )
    return clock.seconds


def peer(size: Size, folder: Path, held_out: Path, num_sequences: int) -> float:
    from transformers import Trainer

    rows = work.Rows(work.batches(held_out, seq_len=SEQ_LEN, batch_size=num_sequences, steps=1))
    arguments = work.trainer_arguments(
        folder, batch_size=BATCH_SIZE, steps=2, per_device_eval_batch_size=BATCH_SIZE, prediction_loss_only=True
    )
    model: Any = work.llama(size, vocab_size=VOCABULARY)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    clock = Clock()
    with clock.running(model):
        trainer.evaluate()
    return clock.seconds


def measure(size: Size) -> Answer:
    num_sequences = size.of(192, 16)
    speed: dict[str, list[float]] = {OURS: [], PEER: []}
    for _ in range(size.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            trained = work.token_file(folder, num_tokens=4 * BATCH_SIZE * SEQ_LEN, vocabulary=VOCABULARY)
            held_out = work.token_file(folder, num_tokens=num_sequences * SEQ_LEN, vocabulary=VOCABULARY)
            seconds = side_by_side(
                size,
                {
                    OURS: partial(ours, size, folder / "ours", trained, held_out),
                    loops.TRAINER: partial(peer, size, folder / "peer", held_out, num_sequences),
                },
            )
            for name, process in ((OURS, OURS), (PEER, loops.TRAINER)):
                speed[name].append(num_sequences * (SEQ_LEN - 1) / seconds[process])
    return Answer(
        question="Evaluation of the same tokens, ours by Trainer.evaluate's",
        unit="tokens/s",
        figures=speed,
        ratio=ratio_of_rounds(speed[OURS], speed[PEER]),
        bar=1.0,
        better="at least",
        notes=f"6 M parameters, {num_sequences} sequences of {SEQ_LEN} tokens, {BATCH_SIZE} at a time.",
    )
