"""Forward and backward over one global batch, in as many micro-batches as memory asks for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import NDArray

from zeta_core.checkpoint.random_state import get_random_state, restore_random_state
from zeta_core.data.sequences import Sequences, micro_batches
from zeta_core.objective.loss import LossOf
from zeta_core.parallel.processes import Engine
from zeta_core.plan import Plan
from zeta_core.report.reporter import Reporter


class Accumulation:
    """Of the ``plan`` only the split into micro-batches can change; reading a batch happens in ``reading``."""

    def __init__(
        self,
        plan: Plan,
        engine: Engine,
        loss_of: LossOf,
        sequences: Sequences,
        report: Reporter,
        reading: AbstractContextManager[None],
        *,
        may_split: bool,
    ) -> None:
        self.plan = plan
        self._engine, self._loss_of, self._sequences = engine, loss_of, sequences
        self._report, self._reading, self._may_split = report, reading, may_split

    def gradient(self, window: NDArray[np.int64], num_targets: int) -> torch.Tensor:
        """Leave the gradient of the mean loss of a global batch; returns the sum of this rank's losses, on the device.

        The mean is that over the targets of all micro-batches of all ranks, whatever the split.
        """
        return self._within_memory(lambda: self._accumulate(window, num_targets))

    def loss(self, window: NDArray[np.int64]) -> torch.Tensor:
        """The sum of this rank's losses alone: without dropout, and without a gradient."""
        return self._within_memory(lambda: self._evaluate(window))

    def _within_memory(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Halve the micro-batch and double the accumulation while memory runs out; the global batch stays.

        Only where the user left both to the Trainer, and in one process: ranks cannot agree on it within a collective.
        What did not fit is computed again from its own random state, and the split that fits is stored with the run.
        """
        random_state = get_random_state() if self._may_split else {}
        while True:
            try:
                return compute()
            except torch.OutOfMemoryError:
                if not self._may_split or self.plan.batch_size == 1:
                    raise
            self._engine.forget_gradients()
            self._loss_of.take_measures()
            restore_random_state(random_state)
            self.plan = self.plan.with_half_the_micro_batch()
            split = self.plan.batch_size, self.plan.gradient_accumulate_every
            self._report.warn(
                "micro_batch_halved",
                f"Memory ran out: batch_size is {split[0]} and gradient_accumulate_every {split[1]} from here on, "
                "with the same global batch.",
                hint="Nothing needs to be done; a later run that is given this split does not have to find it.",
                patch={"batch_size": split[0], "gradient_accumulate_every": split[1]},
            )

    def _accumulate(self, window: NDArray[np.int64], num_targets: int) -> torch.Tensor:
        engine = self._engine
        micro = self._micro_batches(window)
        total = torch.zeros((), device=engine.device)
        for number, (rows, num_counting) in enumerate(micro, 1):
            with self._reading:
                batch = self._sequences.batch(rows, num_counting, isolate=self._loss_of.isolates).to(engine.device)
            with engine.micro_step(last=number == len(micro)):
                loss, auxiliary = self._loss_of(engine.model, batch)
                share = loss / max(1, num_targets)
                if auxiliary is not None:
                    share = share + auxiliary / (len(micro) * engine.processes.world_size)
                engine.backward(share)
            total += loss.detach()
        return total

    def _evaluate(self, window: NDArray[np.int64]) -> torch.Tensor:
        engine = self._engine
        total = torch.zeros((), device=engine.device)
        with engine.evaluating() as model:
            for rows, num_counting in self._micro_batches(window):
                batch = self._sequences.batch(rows, num_counting, isolate=self._loss_of.isolates).to(engine.device)
                total += self._loss_of(model, batch)[0]
        self._loss_of.take_measures()
        return total

    def _micro_batches(self, window: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], int]]:
        """This rank's part of a global batch, and how much of it counts."""
        processes, micro_batch = self._engine.processes, self.plan.batch_size
        rows = micro_batches(window, micro_batch=micro_batch, world_size=processes.world_size, rank=processes.rank)
        return list(rows)
