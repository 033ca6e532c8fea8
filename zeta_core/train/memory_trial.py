"""Trying whether a micro-batch fits into the memory of every rank, before the ranks compute it together.

A rank that runs out of memory in the middle of a step leaves the other ranks waiting in a collective, so it can't ask
them to use smaller micro-batches. Therefore, each rank first computes its largest micro-batch alone (`Engine.alone`),
with all buffers of a step but without exchanging anything, and then all ranks compare their results. A trial takes
place before the first step, before the second one (when the optimizer's state exists), and before each step with a
larger micro-batch than in any earlier one. It leaves no trace in gradients, buffers or random numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from zeta_core.checkpoint.random_state import get_random_state, restore_random_state
from zeta_core.data.sequences import Sequences, largest_micro_batch, micro_batches
from zeta_core.objective.loss import LossFunction
from zeta_core.parallel.processes import Engine
from zeta_core.plan import Plan

_MicroBatch = tuple[NDArray[np.int64], int]  # the rows, and the number of them that count


class MemoryTrial:
    """The trials of one run. Every rank must call the methods with the same arguments."""

    def __init__(self, engine: Engine, loss_function: LossFunction, sequences: Sequences) -> None:
        self._engine, self._loss_function, self._sequences = engine, loss_function, sequences
        self._largest = 0  # positions of the largest micro-batch that fits on every rank
        self._had_state = False  # whether the optimizer's state existed in the last trial

    def is_due(self, plan: Plan, window: NDArray[np.int64]) -> bool:
        """Whether the global batch ``window`` may need more memory than all earlier ones."""
        return self._size(plan, window) > self._largest or (self._has_state and not self._had_state)

    def run(self, plan: Plan, window: NDArray[np.int64]) -> dict[int, str]:
        """Compute this rank's largest micro-batch. Returns the error of each rank whose memory ran out."""
        own = max(self._micro_batches(plan, window), key=self._size_of)
        errors = self._engine.processes.gather(self._error_of(own, repeat=plan.gradient_accumulate_every > 1))
        failed = {rank: error for rank, error in enumerate(errors) if error is not None}
        if not failed:
            self._largest = max(self._largest, self._size(plan, window))
            self._had_state = self._has_state
        return failed

    @property
    def _has_state(self) -> bool:
        return bool(self._engine.optimizer.state)

    def _size(self, plan: Plan, window: NDArray[np.int64]) -> int:
        """The positions of the largest micro-batch of any rank, padding included."""
        world_size = self._engine.processes.world_size
        return largest_micro_batch(self._sequences.widths(window), micro_batch=plan.batch_size, world_size=world_size)

    def _size_of(self, micro: _MicroBatch) -> int:
        return len(micro[0]) * int(self._sequences.widths(micro[0]).max())

    def _micro_batches(self, plan: Plan, window: NDArray[np.int64]) -> Iterator[_MicroBatch]:
        processes = self._engine.processes
        return micro_batches(window, micro_batch=plan.batch_size, world_size=processes.world_size, rank=processes.rank)

    def _error_of(self, micro: _MicroBatch, *, repeat: bool) -> str | None:
        """The message of the allocation that failed. With ``repeat``, the gradients of a first pass exist as well."""
        engine, loss_function = self._engine, self._loss_function
        random_state = get_random_state()
        buffers = [(buffer, buffer.clone()) for buffer in engine.module.buffers()]
        had_gradients = any(parameter.grad is not None for parameter in engine.module.parameters())
        error: str | None = None
        try:
            with engine.alone() as model:
                for _ in range(1 + repeat):
                    batch = self._sequences.batch(*micro, isolate=loss_function.isolates).to(engine.device)
                    loss, auxiliary = loss_function(model, batch)
                    engine.backward(loss if auxiliary is None else loss + auxiliary)
        except torch.OutOfMemoryError as failure:
            error = str(failure)
        engine.drop_gradients(keep_storage=had_gradients)
        loss_function.take_sums()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        restore_random_state(random_state)
        return error
