"""``learning_rate: "find"``: a range test before the first step (Smith 2015, arXiv 1506.01186, section 3.3).

The rate rises by the same factor from one update to the next, through the usual range for this kind of run. The updates
are those of the run: its first global batches, its optimizer, its clipping. The test chooses the rate at which the loss
falls fastest (`steepest`).

Guarantees: the test uses a copy of the model and its own engine, and restores the random states. The run that follows
is bit-identical to one with this rate as a number. A killed test leaves nothing behind and is repeated. All ranks
take part and make the same decision, because they use the same sums.

The initial model's loss on the same batch is subtracted from each loss. Batches differ by more than fine-tuning changes
in a hundred updates, so the loss would otherwise fall fastest wherever an easy batch follows a hard one. The difference
shows only the effect of the updates. It costs another forward pass per update.
"""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from zeta_core.checkpoint.random_state import get_random_state, restore_random_state, seed_everything
from zeta_core.contract.job.events import LogLine, ProgressLine
from zeta_core.contract.job.status import STOP_ACTIONS, StopAction
from zeta_core.contract.spec.range_test import MAX_SHARE, MIN_UPDATES, RangeTest, num_updates
from zeta_core.data.sequences import Sequences, build_sampler
from zeta_core.failures import CannotTrain, NonFiniteLoss
from zeta_core.model.activation_checkpointing import recomputed_activations, repeated_blocks
from zeta_core.objective.loss import LossFunction
from zeta_core.objective.preference import AnswerSequences, PreferenceLoss, compute_references
from zeta_core.optim.rates import UsualRates, rounded
from zeta_core.parallel.deferred_weights import DeferredWeights
from zeta_core.parallel.processes import Engine, Processes
from zeta_core.parallel.strategy import build_engine
from zeta_core.plan import Plan
from zeta_core.report.reporter import Reporter
from zeta_core.train.accumulation import GradientAccumulator
from zeta_core.train.divergence import FAR_ABOVE
from zeta_core.train.meter import SECONDS_BETWEEN_LINES
from zeta_core.train.out_of_memory import MemoryContext

FAR_BELOW_TYPICAL = 30.0  # the test starts at the typical rate divided by this, or at the lowest usual rate
SLOPE_WINDOWS = 5  # slopes are measured over a fifth of the test


@dataclass(frozen=True)
class TestedRun:
    """The run that a range test imitates. ``model`` is ready for the first step, and is not changed."""

    model: nn.Module
    plan: Plan
    processes: Processes
    loss_function: LossFunction
    sequences: Sequences
    deepspeed: bool | int | dict[str, Any] | str | None
    report: Reporter
    requested_stop: Callable[[], StopAction | None]
    may_split: bool
    memory: MemoryContext
    weights: DeferredWeights | None  # the deferred weights of the model


def find_learning_rate(run: TestedRun, usual: UsualRates) -> Plan | StopAction:
    """The plan with its learning rate and a batch split that fits into memory, or the requested stop action.

    Raises `CannotTrain` if the run is too short for a test, or if the loss falls at no rate.
    """
    started = time.monotonic()
    typical = rounded(usual.typical)
    total_steps = run.plan.total_steps
    number = num_updates(total_steps)
    if not number:
        raise _no_rate(
            f"this run has only {total_steps} steps: the range test needs at least {MIN_UPDATES} updates, and may use "
            f"at most {MAX_SHARE:.0%} of the steps.",
            "Train longer",
            typical,
        )
    run.report.phase("finding_learning_rate")
    low = max(usual.low, usual.typical / FAR_BELOW_TYPICAL)
    rates = [float(rate) for rate in np.geomspace(low, usual.high, number)]
    random_state = get_random_state()
    try:
        result = _range_test(replace(run, plan=replace(run.plan, learning_rate=low, compile=False)), rates)
    finally:
        restore_random_state(random_state)
        gc.collect()  # engines are part of reference cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    run.memory.training = None
    if not isinstance(result, _TestResult):
        return result
    tested = rates[: len(result.losses) - 1]
    found = steepest(rates, result.excess[1:], length=_slope_window(number))
    if found is None:
        raise _no_rate(
            f"the loss did not fall at any rate from {low:.2g} to {rates[len(tested)]:.2g}.",
            "Check the data and the model's forward",
            typical,
        )
    rate = float(f"{found:.1e}")  # two significant digits
    seconds, share = time.monotonic() - started, number / total_steps
    early = " It ended early, because the loss rose at higher rates." if result.diverged else ""
    run.report.write(
        LogLine(
            message=f"Found learning_rate {rate:g}: the loss fell fastest there, of all rates from {low:.2g} to "
            f"{rates[len(tested)]:.2g}. The range test took {seconds:.1f} s and at most {number} updates of a copy of "
            f"the model ({share:.0%} of the run's {total_steps} steps).{early}",
            data=RangeTest(
                learning_rate=rate,
                rates=tested,
                losses=result.losses[1:],
                losses_at_start=result.losses_at_start[1 : len(result.losses)],
                diverged=result.diverged,
                share=round(share, 4),
                seconds=round(seconds, 3),
            ),
        )
    )
    split = {"batch_size": result.batch_size, "gradient_accumulate_every": result.gradient_accumulate_every}
    return replace(run.plan, learning_rate=rate, **split)


def _no_rate(why: str, fix: str, typical: float) -> CannotTrain:
    return CannotTrain(
        f"learning_rate is 'find', but {why}",
        hint=f"{fix}, or set a number; {typical:g} is typical.",
        patch={"learning_rate": typical},
        param="learning_rate",
    )


def steepest(rates: Sequence[float], excess: Sequence[float], *, length: int) -> float | None:
    """The rate in the middle of the ``length`` consecutive updates over which the loss fell fastest.

    ``excess`` is the loss after the update with each rate. The speed is the slope of the least-squares line. The middle
    is the geometric mean of the first and the last rate. None if the loss never falls, or if there are fewer updates.
    """
    offsets = np.arange(length) - (length - 1) / 2
    slopes = [float(offsets @ np.array(excess[at : at + length])) for at in range(len(excess) - length + 1)]
    if not slopes or min(slopes) >= 0:
        return None
    at = slopes.index(min(slopes))
    return math.sqrt(rates[at] * rates[at + length - 1])


def _slope_window(num_updates: int) -> int:
    return num_updates // SLOPE_WINDOWS


@dataclass(frozen=True)
class _TestResult:
    """The mean loss of each global batch, and that of the initial model on the same batch."""

    losses: list[float]
    losses_at_start: list[float]
    diverged: bool
    batch_size: int
    gradient_accumulate_every: int

    @property
    def excess(self) -> list[float]:
        return [now - then for now, then in zip(self.losses, self.losses_at_start, strict=False)]


def _range_test(run: TestedRun, rates: Sequence[float]) -> _TestResult | StopAction:
    """Run the test on a copy of the model, with an engine that is closed at the end."""
    model, plan = run.model, run.plan
    with ExitStack() as stack:
        # The copy shares frozen weights, unless an engine shards them.
        shares = plan.strategy == "replicated"
        copied = copy.deepcopy(model, {id(p): p for p in model.parameters() if shares and not p.requires_grad})
        blocks = repeated_blocks(copied)
        stack.enter_context(recomputed_activations(blocks, plan.use_activation_checkpointing))
        weights = None if run.weights is None else dict(run.weights)  # the engine removes those that it has read
        engine = build_engine(copied, plan, run.processes, blocks=blocks, deepspeed=run.deepspeed, weights=weights)
        stack.callback(engine.close)
        seed_everything(plan.seed, run.processes.rank)
        run.memory.training = test = _RangeTest(run, engine)
        return test.run(rates)


class _RangeTest:
    """A rising rate over the first global batches of the run.

    The loss of a batch is computed before its update, so it shows the effect of the previous rates.
    """

    step = 0  # the test makes no step of the run

    def __init__(self, run: TestedRun, engine: Engine) -> None:
        self.engine = engine
        self._accumulator = GradientAccumulator(
            run.plan, engine, run.loss_function, run.sequences, run.report, may_split=run.may_split
        )
        self._loss_function, self._sequences = run.loss_function, run.sequences
        self._report, self._requested_stop = run.report, run.requested_stop
        self._reported_at = time.monotonic()
        self._losses: list[float] = []
        self._losses_at_start: list[float] = []

    @property
    def plan(self) -> Plan:
        return self._accumulator.plan

    @property
    def activity(self) -> str:
        return f"update {len(self._losses) + 1} of the range test"

    def run(self, rates: Sequence[float]) -> _TestResult | StopAction:
        """Run the test. Returns its result, or the requested stop action.

        Raises `NonFiniteLoss` if the loss is not finite before any update.
        """
        engine, size = self.engine, self.plan.global_batch
        sampler = build_sampler(self._sequences, self.plan.seed)
        windows = [sampler.sequences(at * size, (at + 1) * size) for at in range(len(rates))]
        answers, loss_function = self._sequences, self._loss_function
        if (
            isinstance(answers, AnswerSequences)
            and isinstance(loss_function, PreferenceLoss)
            and loss_function.has_reference
        ):
            compute_references(engine, loss_function, answers, self.plan.batch_size, np.unique(np.concatenate(windows)))
        for index, window in enumerate(windows):
            if (stop := self._report_and_check_stop(index / (2 * len(rates)))) is not None:
                return stop
            own_sum = self._accumulator.loss(window)
            self._losses_at_start.append(engine.processes.sum(own_sum.reshape(1))[0] / self._num_targets(window))
        engine.model.train()
        diverged = False
        for index, (window, rate) in enumerate(zip(windows, rates, strict=True)):
            if (stop := self._report_and_check_stop((index + len(rates)) / (2 * len(rates)), rate)) is not None:
                return stop
            loss = self._gradient(window)
            if loss is not None:
                self._losses.append(loss)
            elif not self._losses:
                raise NonFiniteLoss(
                    "The loss or the gradient of the first global batch is not finite, before any update.",
                    hint="Check the model's forward and the data; with a number as learning_rate, the error names the "
                    "affected tensors.",
                )
            diverged = loss is None or self._is_worse_than_at_the_start(_slope_window(len(rates)))
            if diverged:
                break
            engine.update(rate)
        plan = self.plan
        return _TestResult(
            self._losses, self._losses_at_start, diverged, plan.batch_size, plan.gradient_accumulate_every
        )

    def _gradient(self, window: NDArray[np.int64]) -> float | None:
        """Compute the clipped gradient of a global batch. Returns its mean loss; None if either is not finite."""
        engine, num_targets = self.engine, self._num_targets(window)
        while True:
            own_sum = self._accumulator.gradient(window, num_targets)
            norm = engine.clip(self.plan.max_grad_norm).to(own_sum)
            self._loss_function.take_sums()
            total, norms = engine.processes.sum(torch.stack((own_sum, norm)))
            if math.isfinite(total) and math.isfinite(norms):
                return total / num_targets
            if not math.isfinite(total) or engine.back_off() is None:
                return None

    def _is_worse_than_at_the_start(self, length: int) -> bool:
        """Whether the mean of the last losses exceeds that of the initial model by `FAR_ABOVE`."""
        pairs = list(zip(self._losses, self._losses_at_start, strict=False))
        recent = [now - then for now, then in pairs[-length:]]
        dropout = pairs[0][0] - pairs[0][1]  # the effect of dropout on the initial model
        return sum(recent) / len(recent) > FAR_ABOVE + max(0.0, dropout)

    def _num_targets(self, window: NDArray[np.int64]) -> int:
        return max(1, self._sequences.num_targets(window))

    def _report_and_check_stop(self, share: float, rate: float | None = None) -> StopAction | None:
        """Report the progress about once per second. Returns the most urgent stop action that any node requests."""
        now = time.monotonic()
        if now - self._reported_at >= SECONDS_BETWEEN_LINES:
            self._reported_at = now
            loss = self._losses[-1] if self._losses else None
            line = ProgressLine(phase="finding_learning_rate", share=round(share, 3), loss=loss, learning_rate=rate)
            self._report.write(line)
        processes = self.engine.processes
        requested = processes.gather(self._requested_stop() if processes.is_first_of_node else None)
        return next((action for action in reversed(STOP_ACTIONS) if action in requested), None)
