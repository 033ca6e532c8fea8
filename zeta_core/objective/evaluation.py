"""Evaluation: computing the loss on documents that are not trained on, without side effects.

Guarantees: every target is counted once. The loss does not depend on the number of processes, except for the order of
summation. Dropout is off. Random states and the model's modes are restored, so a run with evaluations ends with
bit-identical weights to one without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from zeta_core.checkpoint.random_state import get_random_state, restore_random_state
from zeta_core.checkpoint.training_state import TrainingProgress, perplexity
from zeta_core.contract.job.comparison import DocumentLosses
from zeta_core.contract.job.events import ProgressLine
from zeta_core.contract.job.status import STOP_ACTIONS, StopAction
from zeta_core.data.sequences import Sequences
from zeta_core.failures import InvalidData, NonFiniteLoss
from zeta_core.objective.document_losses import DocumentEvaluator
from zeta_core.objective.loss import STOP_CHECK_INTERVAL, LossFunction
from zeta_core.objective.sampling import SampleWriter
from zeta_core.parallel.processes import Engine
from zeta_core.plan import Plan
from zeta_core.report.reporter import Reporter

# --- Evaluating -------------------------------------------------------------------------------------------------------


def stopped_early(progress: TrainingProgress, plan: Plan) -> bool:
    """Whether the last `early_stopping_patience` evaluations did not improve on the best one."""
    patience = plan.early_stopping_patience
    return patience is not None and progress.evaluations_since_best >= patience


class Evaluator:
    """Evaluates a run every ``eval_steps`` and at its end, and tracks its best loss and the evaluations since then."""

    def __init__(
        self,
        plan: Plan,
        engine: Engine,
        loss_function: LossFunction,
        held_out: Sequences,
        samples: SampleWriter,
        report: Reporter,
        documents: DocumentEvaluator | None,
    ) -> None:
        """``documents`` evaluates each document at the end of the run."""
        assert plan.eval_steps is not None
        self._every, self._total_steps = plan.eval_steps, plan.total_steps
        self._engine, self._loss_function, self._report = engine, loss_function, report
        self._held_out, self._samples, self._documents = held_out, samples, documents
        self._plan = plan
        self.document_losses: DocumentLosses | None = None  # of the last step
        self._num_targets = held_out.num_targets(np.arange(len(held_out))) if len(held_out) else 0
        if not self._num_targets:
            raise InvalidData("The held-out data contains no document of at least two tokens; provide more text.")

    def is_due(self, progress: TrainingProgress) -> bool:
        """Whether an evaluation is due after this step and has not been done yet."""
        step = progress.step
        return step > progress.evaluated_step and (step % self._every == 0 or step >= self._total_steps)

    def evaluate(
        self,
        progress: TrainingProgress,
        micro_batch: int,
        requested_stop: Callable[[], StopAction | None],
        nonfinite_loss_error: Callable[[], NonFiniteLoss],
    ) -> StopAction | None:
        """Evaluate, store the result in ``progress``, and generate a few samples.

        If a stop was requested, returns the stop action and stores nothing; the evaluation is repeated when the
        run is resumed. If the loss is not finite, raises ``nonfinite_loss_error()`` on every rank.
        """
        step = progress.step
        self._report.write(ProgressLine(phase="evaluating", step=step, total_steps=self._total_steps))

        def agreed_stop() -> StopAction | None:
            return self._agreed_stop(requested_stop)

        every = np.arange(len(self._held_out))
        stop = self._loss_function.before_batch(self._engine, self._held_out, every, micro_batch, agreed_stop)
        if stop is not None:
            return stop
        with self._without_side_effects() as model:
            loss, stop = self._mean_loss(model, micro_batch, agreed_stop)
            sums = self._loss_function.take_sums()
            metrics = self._loss_function.metrics(None if sums is None else self._engine.processes.sum(sums))
            if stop is not None:
                return stop
            if not math.isfinite(loss):
                raise nonfinite_loss_error()
            lines = self._samples.write(model, step)
            if self._documents is not None and self._is_last(progress, loss):
                losses = self._documents.evaluate(model, step, agreed_stop)
                if not isinstance(losses, DocumentLosses):
                    return losses
                self.document_losses = losses
        best = progress.best_loss
        progress.evaluated_step, progress.eval_loss = step, loss
        if best is None or loss < best:
            progress.best_step, progress.best_loss, progress.evaluations_since_best = step, loss, 0
        else:
            progress.evaluations_since_best += 1
        self._report.write(
            ProgressLine(
                phase="evaluating",
                step=step,
                total_steps=self._total_steps,
                eval_loss=loss,
                perplexity=perplexity(loss) if self._loss_function.is_likelihood else None,
                eval_token_accuracy=metrics.token_accuracy,
                rewards=metrics.rewards,
            )
        )
        for line in lines:
            self._report.write(line)
        return None

    def _is_last(self, progress: TrainingProgress, loss: float) -> bool:
        """Whether this is the run's last evaluation, because no step is left or this loss stops the run early."""
        if progress.step >= self._total_steps:
            return True
        is_best = progress.best_loss is None or loss < progress.best_loss
        after = 0 if is_best else progress.evaluations_since_best + 1
        return stopped_early(replace(progress, evaluations_since_best=after), self._plan)

    @contextmanager
    def _without_side_effects(self) -> Generator[nn.Module]:
        random_state = get_random_state()
        try:
            with self._engine.evaluating() as model:
                yield model
        finally:
            restore_random_state(random_state)

    def _mean_loss(
        self, model: nn.Module, micro_batch: int, agreed_stop: Callable[[], StopAction | None]
    ) -> tuple[float, StopAction | None]:
        """The mean loss over all targets of all ranks. Every rank calls the model the same number of times."""
        processes, device = self._engine.processes, self._engine.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        parts = _shares(len(self._held_out), micro_batch, processes.world_size, processes.rank)
        for number, (rows, num_counting) in enumerate(parts):
            if number % STOP_CHECK_INTERVAL == 0 and (stop := agreed_stop()) is not None:
                return 0.0, stop
            batch = self._held_out.batch(rows, num_counting, isolate=self._loss_function.isolates).to(device)
            total += self._loss_function(model, batch)[0]
        return processes.sum(total.reshape(1))[0] / self._num_targets, None

    def _agreed_stop(self, requested_stop: Callable[[], StopAction | None]) -> StopAction | None:
        processes = self._engine.processes
        requested = requested_stop() if processes.is_first_of_node else None
        if processes.world_size == 1:
            return requested
        flags = torch.tensor([requested == action for action in STOP_ACTIONS], device=self._engine.device).double()
        sums = processes.sum(flags)
        by_action = dict(zip(STOP_ACTIONS, sums, strict=True))
        return next((action for action in reversed(STOP_ACTIONS) if by_action[action]), None)


def _shares(
    num_sequences: int, micro_batch: int, world_size: int, rank: int
) -> Iterator[tuple[NDArray[np.int64], int]]:
    """This rank's sequences of each micro-batch, and how many of them count.

    Each sequence belongs to one rank. A rank without a sequence in the last micro-batch gets one that does not count,
    because all ranks must call a sharded model together.
    """
    for start in range(0, num_sequences, micro_batch * world_size):
        rows = np.arange(start, min(start + micro_batch * world_size, num_sequences))
        own = rows[rank::world_size]
        yield (own, len(own)) if len(own) else (rows[:1], 0)
