"""Tokens per second of an evaluation on the same held-out tokens, compared with `transformers.Trainer.evaluate`.

Both are timed from the call to its return, and take turns batch by batch. The time in which this project generates
text samples at each evaluation is excluded, because the other library generates none.
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

from benchmarks import loops, workload
from benchmarks.contestants import run_in_turns, wait_for_turn
from benchmarks.result import ZETA, BenchmarkResult, ratio_of_rounds
from benchmarks.workload import Size
from zeta_core.objective.evaluation import Evaluator
from zeta_core.objective.sampling import SampleWriter

BATCH_SIZE, SEQ_LEN, VOCABULARY = 8, 256, 384
TRAINER_EVALUATE = "Trainer.evaluate"


@dataclass
class EvaluationClock:
    """The seconds of one evaluation, without those in which it waited for its turn or generated samples."""

    seconds: float = 0.0
    _is_running: bool = False

    @contextmanager
    def running(self, model: nn.Module) -> Generator[None]:
        """Measure the time within the context. Other contestants run before each call of ``model``."""
        hook = model.register_forward_pre_hook(self._before_batch)
        self._is_running = True
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started
            self._is_running = False
            hook.remove()

    @contextmanager
    def paused(self) -> Generator[None]:
        """Exclude the time within the context."""
        self._is_running = False
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds -= time.perf_counter() - started
            self._is_running = True

    def _before_batch(self, *_: object) -> None:
        if self._is_running:
            self.seconds -= wait_for_turn()


@contextmanager
def timed(model: nn.Module) -> Generator[EvaluationClock]:
    """A clock that measures this project's evaluations within the context."""
    evaluate, write = Evaluator.evaluate, SampleWriter.write
    clock = EvaluationClock()

    @wraps(write)
    def unclocked_write(self: SampleWriter, *arguments: Any, **named: Any) -> Any:
        with clock.paused():
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


def run_zeta(size: Size, folder: Path, trained: Path, held_out: Path) -> float:
    model = workload.llama(size, vocab_size=VOCABULARY)
    with timed(model) as clock:
        workload.train_zeta(
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


def run_trainer(size: Size, folder: Path, held_out: Path, num_sequences: int) -> float:
    from transformers import Trainer

    rows = workload.Rows(workload.batches(held_out, seq_len=SEQ_LEN, batch_size=num_sequences, steps=1))
    arguments = workload.trainer_arguments(
        folder, batch_size=BATCH_SIZE, steps=2, per_device_eval_batch_size=BATCH_SIZE, prediction_loss_only=True
    )
    model: Any = workload.llama(size, vocab_size=VOCABULARY)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    clock = EvaluationClock()
    with clock.running(model):
        trainer.evaluate()
    return clock.seconds


def measure(size: Size) -> BenchmarkResult:
    num_sequences = size.of(192, 16)
    speed: dict[str, list[float]] = {ZETA: [], TRAINER_EVALUATE: []}
    for _ in range(size.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            trained = workload.token_file(folder, num_tokens=4 * BATCH_SIZE * SEQ_LEN, vocab_size=VOCABULARY)
            held_out = workload.token_file(folder, num_tokens=num_sequences * SEQ_LEN, vocab_size=VOCABULARY)
            seconds = run_in_turns(
                size,
                {
                    ZETA: partial(run_zeta, size, folder / "zeta", trained, held_out),
                    loops.TRAINER: partial(run_trainer, size, folder / "trainer", held_out, num_sequences),
                },
            )
            for name, process in ((ZETA, ZETA), (TRAINER_EVALUATE, loops.TRAINER)):
                speed[name].append(num_sequences * (SEQ_LEN - 1) / seconds[process])
    return BenchmarkResult(
        title="Evaluation of the same tokens, relative to Trainer.evaluate",
        unit="tokens/s",
        figures=speed,
        ratio=ratio_of_rounds(speed[ZETA], speed[TRAINER_EVALUATE]),
        target=1.05,
        target_is="minimum",
        notes=f"6 M parameters, {num_sequences} sequences of {SEQ_LEN} tokens, {BATCH_SIZE} at a time.",
    )
