"""Progress lines: about one per second, each covering all steps since the previous line, with their timing.

During the first steps of a run, lines also contain the figures of each step. A line is written before each checkpoint,
so a resumed run has reported every step before its checkpoint.
"""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType

from zeta_core.checkpoint.training_state import TrainingProgress
from zeta_core.contract.job.events import LOSS_WINDOW_STEPS, NUM_DETAILED_STEPS, ProgressLine, StepFigures
from zeta_core.memory.usage import MemoryUsage, peak_memory
from zeta_core.objective.loss import LossFunction
from zeta_core.parallel.processes import Engine
from zeta_core.plan import Plan
from zeta_core.report.reporter import Reporter
from zeta_core.train.flops import flops_per_token, peak_flops

SECONDS_BETWEEN_LINES = 1.0


class Stopwatch:
    """A context manager that sums up the seconds spent within it."""

    seconds = 0.0

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.seconds += time.perf_counter() - self._since

    def share_and_reset(self, seconds: float) -> float | None:
        """Return the measured time as a share of ``seconds``, from 0 to 1, and reset the stopwatch."""
        spent, self.seconds = self.seconds, 0.0
        return round(min(1.0, spent / seconds), 5) if seconds > 0 else None


class Meter:
    """Measures steps and reports them. ``data`` and ``saving`` measure the time in which no step is computed.

    MFU is the share of the devices' peak FLOP/s that the model's arithmetic uses (Chowdhery et al. 2022, PaLM, appendix
    B): tokens/s x `flops_per_token` / (`peak_flops` x processes). ``data`` is the accumulator's stopwatch, which runs
    while it reads batches.
    """

    def __init__(
        self,
        report: Reporter,
        plan: Plan,
        num_sequences: int,
        engine: Engine,
        loss_function: LossFunction,
        *,
        data: Stopwatch,
    ) -> None:
        self.data, self.saving, self.usage = data, Stopwatch(), MemoryUsage()
        self._report = report
        self._plan = plan
        self._num_sequences = num_sequences
        self._engine = engine
        self._loss_function = loss_function
        peak = peak_flops(engine.device, plan.mixed_precision)
        flops = flops_per_token(engine.module, plan.seq_len)
        self._tokens_per_second_at_peak = None if peak is None else peak * plan.world_size / flops
        self._at = self._begun = time.monotonic()
        self._newest: StepFigures | None = None  # the last step, until it is reported
        self._each: list[StepFigures] = []  # steps since the last line that are reported individually
        self._steps = 0
        self._loss_sum = 0.0
        self._num_targets = 0
        self._recent: deque[tuple[float, int]] = deque(maxlen=LOSS_WINDOW_STEPS)  # loss sum and targets of each step
        self._tokens_before: int | None = None
        self._first = True
        self.memory: dict[str, int] | None = None  # bytes by part, measured at the first step
        self._metric_sums: list[float] | None = None
        self._paced_from: tuple[float, int] | None = None  # time and step of the first line; the first step is slower

    def record_step(
        self,
        progress: TrainingProgress,
        *,
        loss_sum: float,
        num_targets: int,
        grad_norm: float,
        learning_rate: float,
        metric_sums: list[float] | None = None,
    ) -> None:
        """Record one applied update; report after the first and the last one, and about once per second.

        ``learning_rate`` is the rate of this update, and ``metric_sums`` are those of `LossFunction.take_sums`.
        """
        if metric_sums is not None:
            before = self._metric_sums or [0.0] * len(metric_sums)
            self._metric_sums = [sum(both) for both in zip(before, metric_sums, strict=True)]
        metrics = self._loss_function.metrics(metric_sums)
        self._loss_sum += loss_sum
        self._num_targets += num_targets
        self._recent.append((loss_sum, num_targets))
        self._steps += 1
        self._newest = StepFigures(
            step=progress.step,
            epoch=round(progress.consumed_sequences / self._num_sequences, 4),
            tokens=progress.tokens,
            loss=loss_sum / max(1, num_targets),
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            token_accuracy=metrics.token_accuracy,
            rewards=metrics.rewards,
        )
        if progress.step <= NUM_DETAILED_STEPS:
            self._each.append(self._newest)
        last = progress.step >= self._plan.total_steps
        if self._first or last or time.monotonic() - self._at >= SECONDS_BETWEEN_LINES:
            self.report_steps()

    def report_steps(self) -> None:
        """Write one line about the steps since the previous line, if there are any."""
        newest = self._newest
        if newest is None:
            return
        now = time.monotonic()
        seconds = now - self._at
        speed = None if newest.tokens is None else self._speed(newest.tokens, seconds)
        at_peak = self._tokens_per_second_at_peak
        data_wait, checkpoint_blocked = self.data.share_and_reset(seconds), self.saving.share_and_reset(seconds)
        metrics = self._loss_function.metrics(self._metric_sums)
        if self._first:
            self.memory = self._memory_parts()
        self._report.write(
            ProgressLine(
                phase="training",
                step=newest.step,
                total_steps=self._plan.total_steps,
                epoch=newest.epoch,
                tokens=newest.tokens,
                loss=self._loss_sum / max(1, self._num_targets),
                recent_loss=sum(loss for loss, _ in self._recent) / max(1, sum(num for _, num in self._recent)),
                learning_rate=newest.learning_rate,
                grad_norm=newest.grad_norm,
                tokens_per_second=None if speed is None else round(speed, 1),
                mfu=None if speed is None or at_peak is None else round(speed / at_peak, 4),
                data_wait_share=data_wait,
                checkpoint_blocked_share=checkpoint_blocked,
                eta_seconds=round((self._plan.total_steps - newest.step) * self._seconds_per_step(now, newest.step), 1),
                memory=peak_memory(),
                token_accuracy=metrics.token_accuracy,
                rewards=metrics.rewards,
                memory_parts=self.memory if self._first else None,
                steps=None if self._each in ([], [newest]) else self._each,
            )
        )
        self._first = False
        self._newest, self._each = None, []
        self._metric_sums = None
        self._paced_from = self._paced_from or (now, newest.step)
        self._at = now
        self._tokens_before = newest.tokens
        self._steps = 0
        self._loss_sum = 0.0
        self._num_targets = 0

    def skip(self, seconds: float) -> None:
        """Exclude the last ``seconds``, such as those of an evaluation, from the measured speed."""
        self._at += seconds
        if self._paced_from is not None:
            self._paced_from = (self._paced_from[0] + seconds, self._paced_from[1])

    def _speed(self, tokens: int, seconds: float) -> float | None:
        """Tokens per second since the previous line; None for the first steps, which include set-up."""
        if self._tokens_before is None or seconds <= 0:
            return None
        return (tokens - self._tokens_before) / seconds

    def _memory_parts(self) -> dict[str, int] | None:
        if self._plan.strategy == "zero":  # DeepSpeed manages these tensors itself
            return None
        return self.usage.parts(self._engine.module, self._engine.optimizer).model_dump(exclude_none=True)

    def _seconds_per_step(self, now: float, step: int) -> float:
        """The mean since the first step, because single steps vary several-fold on a busy machine."""
        if self._paced_from is None:
            return (now - self._at) / self._steps
        since, first = self._paced_from
        return (now - since) / max(1, step - first)
