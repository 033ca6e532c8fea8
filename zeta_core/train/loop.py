"""The training loop: from the first optimizer step to the last checkpoint, top to bottom.

A step is an optimizer step. Its gradient is that of the mean loss over all target tokens of its global batch, however
the batch is split into micro-batches and over processes. A run can be saved or stopped only between two steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from zeta_core.checkpoint.training_state import TrainingProgress
from zeta_core.contract.job.checkpoint import BEST_CHECKPOINT
from zeta_core.contract.job.status import STOP_ACTIONS, StopAction
from zeta_core.data.sequences import build_sampler
from zeta_core.objective.evaluation import Evaluator, stopped_early
from zeta_core.optim.schedule import rate
from zeta_core.parallel.processes import Engine
from zeta_core.plan import Plan
from zeta_core.report.reporter import Reporter
from zeta_core.train.accumulation import GradientAccumulator
from zeta_core.train.checkpointing import Checkpointer
from zeta_core.train.meter import Meter
from zeta_core.train.non_finite import NonFiniteDiagnosis


class TrainingLoop:
    """The loop over optimizer steps, with evaluations and checkpoints between them."""

    def __init__(
        self,
        accumulator: GradientAccumulator,
        progress: TrainingProgress,
        meter: Meter,
        checkpointer: Checkpointer,
        evaluator: Evaluator | None,
        diagnosis: NonFiniteDiagnosis,
        report: Reporter,
        requested_stop: Callable[[], StopAction | None],
    ) -> None:
        self.accumulator, self.progress, self.meter, self.report = accumulator, progress, meter, report
        self.checkpointer, self.evaluator, self.diagnosis = checkpointer, evaluator, diagnosis
        self.requested_stop = requested_stop
        self.sequences, self.loss_function = accumulator.sequences, accumulator.loss_function
        self.sampler = build_sampler(self.sequences, self.plan.seed)
        self.steps_trained = 0
        self.seconds_evaluating = 0.0

    def train(self) -> StopAction | None:
        """Run to the last step or until a stop is requested. Returns the stop action; None after the last step."""
        plan, engine, progress = self.plan, self.engine, self.progress  # only the plan's batch split can change
        engine.model.train()
        self.loss_function.take_sums()  # of calls before the training
        stop = self._evaluate_and_save(due=False, stop=None)  # a run that stopped before an evaluation does it first
        self.report.phase("training")
        begun = self.checkpointer.start_timing()
        self.seconds_evaluating = 0.0  # an evaluation before the first step is not in the time since `begun`
        seconds_before = progress.train_seconds
        while stop is None and not self.is_done:
            learning_rate = self._learning_rate(progress.step)
            with self.meter.data:
                window = self.sampler.sequences(
                    progress.consumed_sequences,
                    min(progress.consumed_sequences + plan.global_batch, plan.total_sequences),
                )
                num_targets = self.sequences.num_targets(window)
            own_loss_sum = self.accumulator.gradient(window, num_targets)
            self.meter.usage.record_peak()
            grad_norm = engine.clip(plan.max_grad_norm)
            requested = self.requested_stop() if engine.processes.is_first_of_node else None
            due = self.checkpointer.is_due(progress.step + 1, len(window))
            loss_sum, norm, stop, due = self._agree(own_loss_sum, grad_norm, requested, due)
            sums = self.loss_function.take_sums()
            if not math.isfinite(loss_sum):
                raise self.diagnosis.loss_error(begins_here=not own_loss_sum.isfinite().item())
            if not math.isfinite(norm):
                self.diagnosis.reduce_loss_scale(window, num_targets)
                stop = None  # the request is read again after the step has been repeated
                continue
            self.checkpointer.finish_copies()
            norm = engine.update(learning_rate) or norm
            if not math.isfinite(norm):  # DeepSpeed detects it during the update, which it then skips
                raise self.diagnosis.gradient_error(begins_here=True)

            progress.step += 1
            progress.consumed_sequences += len(window)
            progress.tokens += self.sequences.num_tokens(window)
            progress.loss_sum += loss_sum
            progress.num_targets += num_targets
            progress.train_seconds = seconds_before + time.monotonic() - begun - self.seconds_evaluating
            self.steps_trained += 1
            if self.steps_trained == 1:
                self.checkpointer.prepare()
                if plan.compile:
                    self.report.log(f"The first step, including compilation, took {time.monotonic() - begun:.1f} s.")
            loss = loss_sum / max(1, num_targets)
            self.diagnosis.monitor.record_step(progress.step, loss=loss, learning_rate=learning_rate, grad_norm=norm)
            self.meter.record_step(
                progress,
                loss_sum=loss_sum,
                num_targets=num_targets,
                grad_norm=norm,
                learning_rate=learning_rate,
                metric_sums=None if sums is None else engine.processes.sum(sums),
            )
            progress.memory = self.meter.memory
            stop = self._evaluate_and_save(due=due, stop=stop)
        self.meter.report_steps()
        return stop

    @property
    def plan(self) -> Plan:
        return self.accumulator.plan

    @property
    def engine(self) -> Engine:
        return self.accumulator.engine

    @property
    def step(self) -> int:
        """The current step, or the next one."""
        return self.progress.step + 1

    @property
    def activity(self) -> str:
        return f"step {self.step}"

    @property
    def is_done(self) -> bool:
        """Whether no step is left: the last one has been made, or evaluations stopped improving."""
        return self.progress.step >= self.plan.total_steps or stopped_early(self.progress, self.plan)

    def _evaluate_and_save(self, *, due: bool, stop: StopAction | None) -> StopAction | None:
        """Evaluate and save if that is due between two steps. Returns the stop action; None to continue."""
        progress, names = self.progress, list[str]()
        if stop is None and self.evaluator is not None and self.evaluator.is_due(progress):
            started = time.monotonic()
            micro_batch, not_finite = self.plan.batch_size, self.diagnosis.held_out_loss_error
            stop = self.evaluator.evaluate(progress, micro_batch, self.requested_stop, not_finite)
            self.checkpointer.document_losses = self.evaluator.document_losses
            self.seconds_evaluating += time.monotonic() - started
            self.meter.skip(time.monotonic() - started)
            if stop is None and progress.best_step == progress.step:
                names.append(BEST_CHECKPOINT)
            if stop is None and self.is_done and progress.step < self.plan.total_steps:
                self.report.log(f"Stopped early: the best evaluation was after step {progress.best_step}.")
        if (due or stop is not None) and stop != "cancel" and self.checkpointer.saved_step != progress.step:
            names.insert(0, f"step-{progress.step}")
        if names:
            self.checkpointer.save(*names)
        return stop

    def _agree(
        self, loss_sum: torch.Tensor, grad_norm: torch.Tensor, requested: StopAction | None, due: bool
    ) -> tuple[float, float, StopAction | None, bool]:
        """Sum the losses of all ranks, and combine their stop requests and due saves, in one exchange per step."""
        if self.engine.processes.world_size == 1:
            total, norm = torch.stack((loss_sum, grad_norm.to(loss_sum))).tolist()
            return total, norm, requested, due
        flags = [due, *(requested == action for action in STOP_ACTIONS)]
        own = torch.stack((loss_sum, grad_norm.to(loss_sum), *loss_sum.new_tensor(flags)))
        total, norm, save, *wanted = self.engine.processes.sum(own)
        requested_by_any = dict(zip(STOP_ACTIONS, wanted, strict=True))
        stop: StopAction | None = next((action for action in reversed(STOP_ACTIONS) if requested_by_any[action]), None)
        return total, norm / self.engine.processes.world_size, stop, bool(save)

    def _learning_rate(self, updates: int) -> float:
        plan = self.plan
        return rate(
            plan.lr_scheduler,
            updates,
            peak=plan.learning_rate,
            lowest=plan.lr_min,
            warmup=plan.warmup_steps,
            total_steps=plan.total_steps,
        )
