"""Forward and backward passes over a global batch, split into micro-batches that fit into memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from zeta_core.checkpoint.random_state import get_random_state, restore_random_state
from zeta_core.data.sequences import Sequences, micro_batches
from zeta_core.objective.loss import LossFunction
from zeta_core.parallel.processes import Engine
from zeta_core.plan import Plan
from zeta_core.report.reporter import Reporter
from zeta_core.train.memory_trial import MemoryTrial
from zeta_core.train.meter import Stopwatch


class GradientAccumulator:
    """Computes losses and gradients of global batches. Only the batch split of ``plan`` can change.

    A ``window`` contains the indices of the sequences of a global batch. ``reading`` is the time spent reading batches.
    """

    def __init__(
        self,
        plan: Plan,
        engine: Engine,
        loss_function: LossFunction,
        sequences: Sequences,
        report: Reporter,
        *,
        may_split: bool,
    ) -> None:
        self.plan = plan
        self.engine, self.loss_function, self.sequences = engine, loss_function, sequences
        self.reading = Stopwatch()
        self._report, self._may_split = report, may_split
        self._trial = MemoryTrial(engine, loss_function, sequences)

    def gradient(self, window: NDArray[np.int64], num_targets: int) -> torch.Tensor:
        """Compute the gradient of a global batch's mean loss. Returns the sum of this rank's losses, on the device.

        The mean is taken over the targets of all micro-batches of all ranks, so it does not depend on the split.
        """
        if self._may_split and self.engine.processes.world_size > 1:
            self._agree_on_a_split(window)
        return self._retry_with_smaller_batches(lambda: self._accumulate(window, num_targets))

    def loss(self, window: NDArray[np.int64]) -> torch.Tensor:
        """The sum of this rank's losses, without dropout and without a gradient."""
        return self._retry_with_smaller_batches(lambda: self._evaluate(window))

    def _retry_with_smaller_batches(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Call ``compute``; whenever memory runs out, halve the micro-batch, double the accumulation, and retry.

        This happens only in a single process, because the other ranks would wait in a collective; several ranks agree
        on a split beforehand (`_agree_on_a_split`). Each retry starts from the same random state.
        """
        may_retry = self._may_split and self.engine.processes.world_size == 1
        random_state = get_random_state() if may_retry else {}
        while True:
            try:
                return compute()
            except torch.OutOfMemoryError:
                if not may_retry or self.plan.batch_size == 1:
                    raise
            self.engine.drop_gradients()
            self.loss_function.take_sums()
            restore_random_state(random_state)
            self._halve_the_micro_batch("Memory ran out")

    def _agree_on_a_split(self, window: NDArray[np.int64]) -> None:
        """Halve the micro-batches of all ranks until those of ``window`` fit into the memory of each of them.

        Raises `torch.OutOfMemoryError` on all ranks if a single sequence does not fit on one of them.
        """
        while self._trial.is_due(self.plan, window):
            failed = self._trial.run(self.plan, window)
            if not failed:
                return
            rank, error = next(iter(failed.items()))
            if self.plan.batch_size == 1:
                raise torch.OutOfMemoryError(f"Rank {rank}: {error}")
            self._halve_the_micro_batch(f"Memory ran out on rank {rank}")

    def _halve_the_micro_batch(self, reason: str) -> None:
        """Use half the micro-batch from now on, with the same global batch. The final split is stored with the run."""
        self.plan = self.plan.with_half_the_micro_batch()
        split = self.plan.batch_size, self.plan.gradient_accumulate_every
        self._report.warn(
            "micro_batch_halved",
            f"{reason}: batch_size is {split[0]} and gradient_accumulate_every {split[1]} from now on; the global "
            "batch is the same.",
            hint="No action is needed; a later run with these settings starts without the failed attempt.",
            patch={"batch_size": split[0], "gradient_accumulate_every": split[1]},
        )

    def _accumulate(self, window: NDArray[np.int64], num_targets: int) -> torch.Tensor:
        engine = self.engine
        self.loss_function.before_batch(engine, self.sequences, window, self.plan.batch_size)
        micro = self._micro_batches(window)
        total = torch.zeros((), device=engine.device)
        for number, (rows, num_counting) in enumerate(micro, 1):
            with self.reading:
                batch = self.sequences.batch(rows, num_counting, isolate=self.loss_function.isolates).to(engine.device)
            with engine.micro_step(last=number == len(micro)):
                loss, auxiliary = self.loss_function(engine.model, batch)
                scaled_loss = loss / max(1, num_targets)
                if auxiliary is not None:
                    scaled_loss = scaled_loss + auxiliary / (len(micro) * engine.processes.world_size)
                engine.backward(scaled_loss)
            total += loss.detach()
        return total

    def _evaluate(self, window: NDArray[np.int64]) -> torch.Tensor:
        engine = self.engine
        self.loss_function.before_batch(engine, self.sequences, window, self.plan.batch_size)
        total = torch.zeros((), device=engine.device)
        with engine.evaluating() as model:
            for rows, num_counting in self._micro_batches(window):
                batch = self.sequences.batch(rows, num_counting, isolate=self.loss_function.isolates).to(engine.device)
                total += self.loss_function(model, batch)[0]
        self.loss_function.take_sums()
        return total

    def _micro_batches(self, window: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], int]]:
        """This rank's rows of each micro-batch, and the number of rows that count."""
        processes, micro_batch = self.engine.processes, self.plan.batch_size
        rows = micro_batches(window, micro_batch=micro_batch, world_size=processes.world_size, rank=processes.rank)
        return list(rows)
