"""When the checkpoints of a run are due, and what they contain."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from zeta_core.checkpoint import checkpoint_files
from zeta_core.checkpoint.random_state import get_random_state
from zeta_core.checkpoint.staging import Staging
from zeta_core.checkpoint.training_state import Snapshot, TrainingProgress
from zeta_core.checkpoint.weights import SavedWeights
from zeta_core.contract.job.checkpoint import FINAL_CHECKPOINT
from zeta_core.contract.job.comparison import DocumentLosses
from zeta_core.contract.job.events import ProgressLine
from zeta_core.contract.job.status import StopAction
from zeta_core.report.reporter import Reporter
from zeta_core.train.accumulation import GradientAccumulator
from zeta_core.train.meter import Meter
from zeta_core.train.saving import CheckpointSaver

FIRST_SAVE_SECONDS, USUAL_SAVE_SECONDS, MAX_SAVING_SHARE = 4.0, 600.0, 0.05


class Checkpointer:
    """Takes snapshots of a run between two steps and passes them to its saver.

    ``checkpointing_steps`` is a number of steps, ``"epoch"``, or None to save by time.
    """

    def __init__(
        self,
        accumulator: GradientAccumulator,
        progress: TrainingProgress,
        saved: SavedWeights,
        saver: CheckpointSaver,
        meter: Meter,
        report: Reporter,
        *,
        output_dir: Path,
        checkpointing_steps: int | Literal["epoch"] | None,
        newest_request: Callable[[], int],
    ) -> None:
        self._accumulator, self._engine = accumulator, accumulator.engine
        self._progress, self._saved, self._saver, self._meter, self._report = progress, saved, saver, meter, report
        self._output_dir, self._checkpointing_steps = output_dir, checkpointing_steps
        self._newest_request, self._fulfilled_request = newest_request, 0
        self.document_losses: DocumentLosses | None = None  # stored with the checkpoints of its step
        self._staging = Staging()
        self._newest_weights = saved.names  # the names of the weights in the newest checkpoint
        self.saved_step = progress.step if saver.newest is not None else -1
        self._seconds_saving = 0.0
        self._saved_at = time.monotonic()

    def start_timing(self) -> float:
        """Start the interval to the first save, and return the current monotonic time."""
        self._saved_at = time.monotonic()
        return self._saved_at

    def prepare(self) -> None:
        """Allocate the buffers for the first save, during training."""
        self._saver.prepare(self._staging)

    def is_due(self, step: int, num_sequences: int) -> bool:
        """Whether to save after ``step``, which trains on ``num_sequences``.

        Saves by time come early at first, and then about every ten minutes. A requested save is due in the first
        process.
        """
        if self._engine.processes.is_main and self._newest_request() > self._fulfilled_request:
            return True
        every, epoch = self._checkpointing_steps, len(self._accumulator.sequences)
        if every == "epoch":
            consumed = self._progress.consumed_sequences
            return (consumed + num_sequences) // epoch > consumed // epoch
        if isinstance(every, int):
            return step % every == 0
        if not self._engine.processes.is_main or self._saver.busy or step == self._accumulator.plan.total_steps:
            return False
        trained = self._progress.train_seconds
        pause = min(max(trained, FIRST_SAVE_SECONDS), USUAL_SAVE_SECONDS)
        affordable = self._seconds_saving <= MAX_SAVING_SHARE * max(trained, FIRST_SAVE_SECONDS)
        return affordable and time.monotonic() - self._saved_at >= pause

    def finish_copies(self) -> None:
        """Finish the copies of the previous save before an update changes their sources."""
        with self._meter.saving:
            self._staging.finish()

    def save(self, *names: str) -> None:
        """Copy the run's state to memory, and write it under each name while training continues."""
        started, plan = time.monotonic(), self._accumulator.plan
        self._meter.report_steps()
        self._report.write(ProgressLine(phase="saving", step=self._progress.step, total_steps=plan.total_steps))
        with self._meter.saving:
            self._saver.wait_for_buffers()
        metrics = self._progress.metrics
        if not self._accumulator.loss_function.is_likelihood:
            metrics.pop("perplexity", None)
        with self._meter.saving:
            self._saver.save(names, self._snapshot(names), metrics, plan.stored(), request=self._next_request())
        self.saved_step = self._progress.step
        self._saved_at = time.monotonic()
        self._seconds_saving += self._saved_at - started

    def _next_request(self) -> int | None:
        """The number of the newest request if no earlier save fulfils it."""
        newest = self._newest_request()
        if newest <= self._fulfilled_request:
            return None
        self._fulfilled_request = newest
        return newest

    def _snapshot(self, names: Sequence[str]) -> Snapshot:
        engine, saved = self._engine, self._saved
        self._newest_weights = saved.of(names)
        base = {name: tensor for name, tensor in saved.base_weights.items() if name in self._newest_weights}
        weights = engine.stage_weights(self._staging, self._newest_weights - base.keys())
        rows = engine.staged_rows(weights)
        tensors, values = engine.stage_optimizer(self._staging)
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        random_states = engine.processes.gather(get_random_state())
        progress = replace(self._progress)
        losses = self.document_losses
        return Snapshot(
            {**weights, **base},
            saved.aliases,
            tensors,
            values,
            random_states,
            progress,
            self._staging.finish,
            document_losses=losses if losses is not None and losses.step == progress.step else None,
            rows=rows,
        )

    def finish(self, stopped: StopAction | None, *, steps_trained: int) -> Path | None:
        """Save the final state, and wait for it. Returns the newest checkpoint.

        A run that trained no step does not change its final checkpoint.
        """
        processes, newest = self._engine.processes, self._saver.newest
        unchanged = (
            not steps_trained
            and newest is not None
            and newest.directory.name == FINAL_CHECKPOINT
            and newest.directory.parent.resolve() == self._output_dir.resolve()
        )
        if stopped is None and not unchanged:
            if self.saved_step != self._progress.step or self._newest_weights != self._saved.of([FINAL_CHECKPOINT]):
                self.save(FINAL_CHECKPOINT)
            else:
                self._saver.save_copy(FINAL_CHECKPOINT)
        newest = self._saver.wait()
        if processes.is_main and stopped is None:
            checkpoint_files.strip_old_states(self._output_dir)
        directory = None if newest is None else newest.directory
        return processes.from_main(lambda: directory)
