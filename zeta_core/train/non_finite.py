"""Diagnosing a loss or gradient that is not finite: where it began, and whether a smaller loss scale helps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from zeta_core.checkpoint.training_state import TrainingProgress
from zeta_core.failures import NonFiniteLoss
from zeta_core.report.reporter import Reporter
from zeta_core.train.accumulation import GradientAccumulator
from zeta_core.train.divergence import DivergenceMonitor, find_non_finite
from zeta_core.train.meter import Meter


class NonFiniteDiagnosis:
    """Creates the error that all ranks raise together. ``begins_here`` refers to this rank."""

    def __init__(
        self,
        monitor: DivergenceMonitor,
        accumulator: GradientAccumulator,
        progress: TrainingProgress,
        meter: Meter,
        report: Reporter,
    ) -> None:
        self.monitor = monitor
        self._accumulator, self._progress, self._meter, self._report = accumulator, progress, meter, report

    def reduce_loss_scale(self, window: NDArray[np.int64], num_targets: int) -> None:
        """Drop the gradient and reduce the loss scale of fp16; raise `NonFiniteLoss` if that cannot help.

        Clipping has turned the whole gradient into NaN, so it is computed again to find where the NaN first occurred.
        """
        engine = self._accumulator.engine
        if (scale := engine.back_off()) is not None:
            step = self._progress.step + 1
            self._report.log(f"The gradient of step {step} overflowed fp16; repeating it with loss scale {scale:,g}.")
            return
        engine.drop_gradients()
        self._accumulator.gradient(window, num_targets)
        raise self.gradient_error(begins_here=bool(find_non_finite(engine.module.named_parameters())))

    def loss_error(self, *, begins_here: bool) -> NonFiniteLoss:
        # The gradients follow from the loss, so only the weights can be its cause.
        self._accumulator.engine.drop_gradients()
        return self._error("loss", begins_here=begins_here)

    def gradient_error(self, *, begins_here: bool) -> NonFiniteLoss:
        return self._error("gradient", begins_here=begins_here)

    def held_out_loss_error(self) -> NonFiniteLoss:
        """The error for an evaluation. Its loss is summed over all ranks, so each rank examines its own weights."""
        engine = self._accumulator.engine
        by_rank = engine.processes.gather(find_non_finite(engine.module.named_parameters()))
        tensors = next((names for names in by_rank if names), [])
        return self.monitor.eval_non_finite_error(self._progress.step, tensors=tensors)

    def _error(self, quantity: str, *, begins_here: bool) -> NonFiniteLoss:
        engine = self._accumulator.engine
        self._meter.report_steps()
        by_rank = engine.processes.gather((begins_here, find_non_finite(engine.module.named_parameters())))
        ranks = [rank for rank, (begins, _) in enumerate(by_rank) if begins]
        tensors = next((names for begins, names in by_rank if begins and names), [])
        return self.monitor.non_finite_error(self._progress.step + 1, quantity=quantity, ranks=ranks, tensors=tensors)
