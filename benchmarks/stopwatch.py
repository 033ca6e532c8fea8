"""Splitting the time of a step into the computation that every loop needs, and the overhead of the loop around it.

The computation consists of forward (with the loss), backward, clipping, and the optimizer (its step and zeroing the
gradients). It is timed by wrapping torch's functions, in the same way for every loop. A step is the time between the
ends of two optimizer steps. The CPU time of the training thread is measured as well, because it varies less than
wall time on a shared machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import nn

from benchmarks.contestants import wait_for_turn
from zeta_core.objective import loss


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step."""

    wall: float
    outside_wall: float  # outside the computation
    outside_cpu: float  # CPU time of the training thread outside the computation


@dataclass
class Stopwatch:
    """Measures steps while `running`. ``steps`` does not contain the first ``skip`` steps."""

    skip: int
    steps: list[Step] = field(default_factory=list[Step])
    _ends: int = 0
    _depth: int = 0
    _inside: tuple[float, float] = (0.0, 0.0)
    _since: tuple[float, float] = (0.0, 0.0)

    @contextmanager
    def running(self, model: nn.Module) -> Generator[None]:
        """Time the computation of ``model``. Its optimizer and trainer must be created within the context as well."""
        patched: list[tuple[Any, str, Any]] = [
            # In other libraries, the loss is part of forward; here it is a function. Both shift the labels.
            (loss, "cross_entropy_sum", self._timed(loss.cross_entropy_sum)),
            (torch.Tensor, "backward", self._timed(torch.Tensor.backward)),
            (torch.nn.utils, "clip_grad_norm_", self._timed(torch.nn.utils.clip_grad_norm_)),
            (torch.optim.Optimizer, "zero_grad", self._timed(torch.optim.Optimizer.zero_grad)),
            (nn.Module, "zero_grad", self._timed(nn.Module.zero_grad)),
            (torch.optim.AdamW, "step", self._timed(torch.optim.AdamW.step, ends_step=True)),
        ]
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in patched]
        forward = model.forward
        for owner, name, timed in patched:
            setattr(owner, name, timed)
        model.forward = self._timed(forward)
        try:
            yield
        finally:
            del model.forward
            for owner, name, original in before:
                setattr(owner, name, original)

    def _timed(self, function: Callable[..., Any], *, ends_step: bool = False) -> Callable[..., Any]:
        @wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            if self._depth:
                return function(*arguments, **named)
            self._depth = 1
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                self._depth = 0
                now = time.perf_counter(), time.thread_time()
                self._inside = self._inside[0] + now[0] - wall, self._inside[1] + now[1] - cpu
                if ends_step:
                    self._end_step(*now)

        return timed

    def _end_step(self, wall: float, cpu: float) -> None:
        """Record the step, and let the other contestants run. The next step starts when it is this one's turn again."""
        self._ends += 1
        if self._ends > self.skip:
            period = wall - self._since[0]
            self.steps.append(Step(period, period - self._inside[0], cpu - self._since[1] - self._inside[1]))
        self._inside = 0.0, 0.0
        wait_for_turn()
        self._since = time.perf_counter(), time.thread_time()

    @property
    def seconds_per_step(self) -> float:
        return statistics.median(step.wall for step in self.steps)

    @property
    def outside_wall(self) -> float:
        return statistics.median(step.outside_wall for step in self.steps)

    @property
    def outside_cpu(self) -> float:
        return statistics.median(step.outside_cpu for step in self.steps)
