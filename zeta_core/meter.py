"""Progress lines: about one a second, each over all steps since the one before it."""

from __future__ import annotations

import resource
import sys
import time

import torch

from zeta_core.contract.events import ProgressLine
from zeta_core.plan import Plan
from zeta_core.report import Report
from zeta_core.state import Progress

SECONDS_BETWEEN_LINES = 1.0


class Meter:
    def __init__(self, report: Report, plan: Plan, num_sequences: int) -> None:
        self._report = report
        self._plan = plan
        self._num_sequences = num_sequences
        self._at = self._begun = time.monotonic()
        self._steps = 0
        self._loss_sum = 0.0
        self._num_targets = self._tokens = 0
        self._tokens_before: int | None = None
        self._first = True
        self._paced_from: tuple[float, int] | None = None  # when the first step was told: it is slower than the others

    def step(
        self, progress: Progress, *, loss_sum: float, num_targets: int, grad_norm: float, learning_rate: float
    ) -> None:
        """Count one applied update; say so when it is time: the first, the last, and about once a second.

        ``learning_rate`` is the schedule's after that many updates: it is 0 after the last one of a cosine.
        """
        self._loss_sum += loss_sum
        self._num_targets += num_targets
        self._steps += 1
        now = time.monotonic()
        last = progress.step >= self._plan.total_steps
        if not (self._first or last or now - self._at >= SECONDS_BETWEEN_LINES):
            return
        seconds = now - self._at
        tokens = progress.tokens - (self._tokens_before or 0) if self._tokens_before is not None else None
        self._report.write(
            ProgressLine(
                phase="training",
                step=progress.step,
                total_steps=self._plan.total_steps,
                epoch=round(progress.consumed_sequences / self._num_sequences, 4),
                tokens=progress.tokens,
                loss=self._loss_sum / max(1, self._num_targets),
                learning_rate=learning_rate,
                grad_norm=grad_norm,
                tokens_per_second=None if tokens is None or seconds <= 0 else round(tokens / seconds, 1),
                eta_seconds=round((self._plan.total_steps - progress.step) * self._seconds_per_step(now, progress), 1),
                memory=peak_memory(),
            )
        )
        self._first = False
        self._paced_from = self._paced_from or (now, progress.step)
        self._at = now
        self._tokens_before = progress.tokens
        self._steps = 0
        self._loss_sum = 0.0
        self._num_targets = 0

    def skip(self, seconds: float) -> None:
        """These last seconds were no training (an evaluation), and slow nothing down."""
        self._at += seconds
        if self._paced_from is not None:
            self._paced_from = (self._paced_from[0] + seconds, self._paced_from[1])

    def _seconds_per_step(self, now: float, progress: Progress) -> float:
        """The pace since the first step: steps vary several-fold on a busy machine, their mean does not."""
        if self._paced_from is None:
            return (now - self._at) / self._steps
        since, step = self._paced_from
        return (now - since) / max(1, progress.step - step)


def peak_memory() -> dict[str, int]:
    """The most bytes used so far: by tensors on a GPU, by the whole process on a CPU."""
    if torch.cuda.is_available():
        device = torch.cuda.current_device()
        return {f"cuda:{device}": torch.cuda.max_memory_allocated(device)}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
