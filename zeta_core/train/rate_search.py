"""``learning_rate: "find"``: a range test before the first step (Smith 2015, arXiv 1506.01186, section 3.3).

The rate rises from one update to the next, by the same factor each time, through what is usual for such a run; updates
are those of the run (its first global batches, its optimizer, its clipping). Chosen is the rate at which the loss fell
fastest: `steepest`.

Guaranteed: the search has a copy of the model, an engine of its own, and random states that are put back, so the run
that follows is bit for bit the one that would have been given this rate as a number. It leaves nothing behind: a
search that was killed is made again. Every rank takes part, and all decide alike, because they look at the same sums.

Of each batch the loss of the model as it was before the first update is taken off. Batches differ by more than a fine
tuning changes in a hundred updates, so that without it the steepest place is one where an easy batch follows a hard
one; with it, what is left is what the updates did. That costs another forward pass for each update.
"""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from zeta_core.checkpoint.random_state import get_random_state, restore_random_state, seed_everything
from zeta_core.contract.job.events import LogLine, ProgressLine
from zeta_core.contract.job.status import StopAction
from zeta_core.contract.spec.rate_search import FEWEST_UPDATES, LARGEST_SHARE, RateSearch, num_updates
from zeta_core.data.sequences import Sequences, sampler_of
from zeta_core.failures import CannotTrain, NonFiniteLoss
from zeta_core.model.activation import checkpointed, repeated_blocks
from zeta_core.objective.loss import LossOf
from zeta_core.objective.preference import DpoLoss, Pairs, reference_of
from zeta_core.optim.rates import UsualRates, rounded
from zeta_core.parallel.processes import Engine, Processes
from zeta_core.parallel.strategy import build_engine
from zeta_core.plan import Plan
from zeta_core.report.reporter import Reporter
from zeta_core.train.accumulation import Accumulation
from zeta_core.train.divergence import FAR_ABOVE
from zeta_core.train.meter import SECONDS_BETWEEN_LINES
from zeta_core.train.out_of_memory import Known

FAR_BELOW_TYPICAL = 30.0  # the test begins at the typical rate by this, or at the lowest usual one
LINE_SHARE = 5  # the line whose slope is looked at is a fifth of the test long


def find_learning_rate(
    model: nn.Module,
    plan: Plan,
    processes: Processes,
    *,
    loss_of: LossOf,
    sequences: Sequences,
    deepspeed: bool | int | dict[str, Any] | str | None,
    usual: UsualRates,
    report: Reporter,
    asked_to_stop: Callable[[], StopAction | None],
    may_split: bool,
    memory: Known,
) -> Plan | StopAction:
    """The plan with its learning rate, and with a split into micro-batches that fits; or why the run is to stop.

    ``model`` is as the first step would find it, and is not changed. Raises `CannotTrain` where the run is too short
    for a search, or the loss falls at no rate.
    """
    started = time.monotonic()
    typical = rounded(usual.typical)
    number = num_updates(plan.total_steps)
    if not number:
        raise CannotTrain(
            f"learning_rate is 'find', which takes {FEWEST_UPDATES} updates or more and at most {LARGEST_SHARE:.0%} of "
            f"a run's steps; this one has {plan.total_steps}.",
            hint=f"Train longer, or give a number: {typical:g} is usual.",
            patch={"learning_rate": typical},
            param="learning_rate",
        )
    report.phase("finding_learning_rate")
    low = max(usual.low, usual.typical / FAR_BELOW_TYPICAL)
    rates = [float(rate) for rate in np.geomspace(low, usual.high, number)]
    random_state = get_random_state()
    try:
        seen = _range_test(
            model,
            replace(plan, learning_rate=low, compile=False),
            processes,
            rates,
            loss_of=loss_of,
            sequences=sequences,
            deepspeed=deepspeed,
            report=report,
            asked_to_stop=asked_to_stop,
            may_split=may_split,
            memory=memory,
        )
    finally:
        restore_random_state(random_state)
        gc.collect()  # engines hold themselves in cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    memory.trains = None
    if not isinstance(seen, _Seen):
        return seen
    last = rates[len(seen.losses) - 1]
    found = steepest(rates, seen.excess[1:], length=_line_length(number))
    if found is None:
        raise CannotTrain(
            f"learning_rate is 'find', and the loss fell at none of the rates from {low:.2g} to {last:.2g}.",
            hint=f"Look at the data and the model's forward, or give a number: {typical:g} is usual.",
            patch={"learning_rate": typical},
            param="learning_rate",
        )
    rate = float(f"{found:.1e}")  # two digits, as a person would write it
    seconds, share = time.monotonic() - started, number / plan.total_steps
    early = " It ended early: at higher rates the loss rose." if seen.diverged else ""
    report.write(
        LogLine(
            message=f"Found the learning rate {rate:g}: there the loss fell fastest while the rate rose from {low:.2g} "
            f"to {last:.2g}. The test took {seconds:.1f} s, and at most {number} updates of a copy of the model, "
            f"{share:.0%} of the run's {plan.total_steps} steps.{early}",
            data=RateSearch(
                learning_rate=rate,
                rates=rates[: len(seen.losses) - 1],
                losses=seen.losses[1:],
                losses_at_start=seen.losses_at_start[1 : len(seen.losses)],
                diverged=seen.diverged,
                share=round(share, 4),
                seconds=round(seconds, 3),
            ),
        )
    )
    split = {"batch_size": seen.batch_size, "gradient_accumulate_every": seen.gradient_accumulate_every}
    return replace(plan, learning_rate=rate, **split)


def steepest(rates: Sequence[float], excess: Sequence[float], *, length: int) -> float | None:
    """The rate in the middle of those ``length`` updates in a row over which the loss fell fastest.

    ``excess`` is the loss after the update with each rate; the speed is the slope of the least-squares line, and the
    middle is the geometric mean of the first and the last rate. None where the loss falls nowhere, or where there are
    not so many updates.
    """
    places = np.arange(length) - (length - 1) / 2
    slopes = [float(places @ np.array(excess[at : at + length])) for at in range(len(excess) - length + 1)]
    if not slopes or min(slopes) >= 0:
        return None
    at = slopes.index(min(slopes))
    return math.sqrt(rates[at] * rates[at + length - 1])


def _line_length(number: int) -> int:
    return number // LINE_SHARE


@dataclass(frozen=True)
class _Seen:
    """What a range test saw: the mean loss of each global batch, and that by the model as it was at the start."""

    losses: list[float]
    losses_at_start: list[float]
    diverged: bool
    batch_size: int
    gradient_accumulate_every: int

    @property
    def excess(self) -> list[float]:
        return [now - then for now, then in zip(self.losses, self.losses_at_start, strict=False)]


def _range_test(
    model: nn.Module,
    plan: Plan,
    processes: Processes,
    rates: Sequence[float],
    *,
    loss_of: LossOf,
    sequences: Sequences,
    deepspeed: bool | int | dict[str, Any] | str | None,
    report: Reporter,
    asked_to_stop: Callable[[], StopAction | None],
    may_split: bool,
    memory: Known,
) -> _Seen | StopAction:
    """The test on a copy of the model, under an engine that is closed at the end."""
    with ExitStack() as stack:
        # Weights that are not trained can be shared, but where an engine takes them apart.
        shares = plan.strategy == "replicated"
        copied = copy.deepcopy(model, {id(p): p for p in model.parameters() if shares and not p.requires_grad})
        blocks = repeated_blocks(copied)
        if plan.use_activation_checkpointing:
            stack.enter_context(checkpointed(blocks))
        engine = build_engine(copied, plan, processes, blocks=blocks, deepspeed=deepspeed)
        stack.callback(engine.close)
        seed_everything(plan.seed, processes.rank)
        test = _RangeTest(plan, engine, loss_of, sequences, report, asked_to_stop, may_split=may_split)
        memory.trains = test
        return test.run(rates)


class _RangeTest:
    """One rising rate over the first global batches of the run.

    The loss of a batch is computed with its gradient, before the update that it makes: it shows what the rates before
    it did.
    """

    step = 0  # of the run: none of its own is made

    def __init__(
        self,
        plan: Plan,
        engine: Engine,
        loss_of: LossOf,
        sequences: Sequences,
        report: Reporter,
        asked_to_stop: Callable[[], StopAction | None],
        *,
        may_split: bool,
    ) -> None:
        self.engine = engine
        self._accumulation = Accumulation(plan, engine, loss_of, sequences, report, nullcontext(), may_split=may_split)
        self._loss_of, self._sequences = loss_of, sequences
        self._report, self._asked_to_stop = report, asked_to_stop
        self._told_at = time.monotonic()
        self._losses: list[float] = []
        self._losses_at_start: list[float] = []

    @property
    def plan(self) -> Plan:
        return self._accumulation.plan

    @property
    def doing(self) -> str:
        return f"update {len(self._losses) + 1} of the search for a learning rate"

    def run(self, rates: Sequence[float]) -> _Seen | StopAction:
        """Look at the loss while the rate rises; or why the run is to stop.

        Raises `NonFiniteLoss` where the model answers so before any update.
        """
        engine, size = self.engine, self.plan.global_batch
        sampler = sampler_of(self._sequences, self.plan.seed)
        windows = [sampler.sequences(at * size, (at + 1) * size) for at in range(len(rates))]
        if isinstance(self._sequences, Pairs) and isinstance(self._loss_of, DpoLoss):
            which = np.unique(np.concatenate(windows))
            pairs, micro_batch = self._sequences, self.plan.batch_size
            pairs.reference_2P = reference_of(engine, self._loss_of, pairs, micro_batch, which=which)
        for at, window in enumerate(windows):
            if (stop := self._look(at / (2 * len(rates)))) is not None:
                return stop
            own_sum = self._accumulation.loss(window)
            self._losses_at_start.append(engine.processes.sum(own_sum.reshape(1))[0] / self._num_targets(window))
        engine.model.train()
        diverged = False
        for at, (window, rate) in enumerate(zip(windows, rates, strict=True)):
            if (stop := self._look((at + len(rates)) / (2 * len(rates)), rate)) is not None:
                return stop
            loss = self._gradient(window)
            if loss is not None:
                self._losses.append(loss)
            elif not self._losses:
                raise NonFiniteLoss(
                    "The loss or the gradient of the first global batch is not finite, before any update.",
                    hint="Look at the model's forward and at the data; with learning_rate as a number the run says "
                    "which tensors are to blame.",
                )
            diverged = loss is None or self._is_worse_than_at_the_start(_line_length(len(rates)))
            if diverged:
                break
            engine.update(rate)
        plan = self.plan
        return _Seen(self._losses, self._losses_at_start, diverged, plan.batch_size, plan.gradient_accumulate_every)

    def _gradient(self, window: NDArray[np.int64]) -> float | None:
        """Leave the clipped gradient of a global batch; returns its mean loss, None where either is not finite."""
        engine, num_targets = self.engine, self._num_targets(window)
        while True:
            own_sum = self._accumulation.gradient(window, num_targets)
            norm = engine.clip(self.plan.max_grad_norm).to(own_sum)
            self._loss_of.take_measures()
            total, norms = engine.processes.sum(torch.stack((own_sum, norm)))
            if math.isfinite(total) and math.isfinite(norms):
                return total / num_targets
            if not math.isfinite(total) or engine.back_off() is None:
                return None

    def _is_worse_than_at_the_start(self, length: int) -> bool:
        """Whether the last losses are, in the mean, above those at the start by `FAR_ABOVE`."""
        pairs = list(zip(self._losses, self._losses_at_start, strict=False))
        recent = [now - then for now, then in pairs[-length:]]
        dropout = pairs[0][0] - pairs[0][1]  # what it costs a model that has not learned
        return sum(recent) / len(recent) > FAR_ABOVE + max(0.0, dropout)

    def _num_targets(self, window: NDArray[np.int64]) -> int:
        return max(1, self._sequences.num_targets(window))

    def _look(self, share: float, rate: float | None = None) -> StopAction | None:
        """Say where the search is, about once a second; returns why the run is to stop."""
        now = time.monotonic()
        if now - self._told_at >= SECONDS_BETWEEN_LINES:
            self._told_at = now
            loss = self._losses[-1] if self._losses else None
            line = ProgressLine(phase="finding_learning_rate", share=round(share, 3), loss=loss, learning_rate=rate)
            self._report.write(line)
        return self.engine.processes.from_main(self._asked_to_stop)
