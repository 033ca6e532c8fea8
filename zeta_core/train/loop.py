"""The training loop: from the first optimizer step to the last checkpoint, top to bottom.

A step is an optimizer step. Its gradient is that of the mean loss over all target tokens of its global batch, however
that is split into micro-batches and over processes. Between two steps, and only there, the run can be saved or stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from zeta_core.checkpoint import checkpoint_files
from zeta_core.checkpoint.random_state import get_random_state
from zeta_core.checkpoint.staging import Staging
from zeta_core.checkpoint.training_state import Snapshot, TrainingProgress
from zeta_core.checkpoint.weights import SavedWeights
from zeta_core.contract.job.events import ProgressLine
from zeta_core.contract.job.status import STOP_ACTIONS, StopAction
from zeta_core.data.sequences import Sequences, sampler_of
from zeta_core.failures import NonFiniteLoss
from zeta_core.objective.evaluation import Evaluator, stopped_early
from zeta_core.objective.loss import LossOf
from zeta_core.optim.schedule import factor
from zeta_core.parallel.processes import Engine
from zeta_core.plan import Plan
from zeta_core.report.reporter import Reporter
from zeta_core.train.accumulation import Accumulation
from zeta_core.train.divergence import DivergenceMonitor, not_finite_in
from zeta_core.train.meter import Meter
from zeta_core.train.saving import Saver

FIRST_SAVE_SECONDS, USUAL_SAVE_SECONDS, MOST_TIME_SAVING = 4.0, 600.0, 0.05


class Course:
    """The loop over optimizer steps, and what happens between two of them."""

    def __init__(
        self,
        *,
        plan: Plan,
        engine: Engine,
        loss_of: LossOf,
        sequences: Sequences,
        progress: TrainingProgress,
        saved: SavedWeights,
        saver: Saver,
        evaluator: Evaluator | None,
        report: Reporter,
        output_dir: Path,
        checkpointing_steps: int | Literal["epoch"] | None,
        asked_to_stop: Callable[[], StopAction | None],
        watch: DivergenceMonitor,
        may_split: bool,
    ) -> None:
        self.watch, self.engine, self.loss_of = watch, engine, loss_of
        self.output_dir, self.checkpointing_steps, self.asked_to_stop = output_dir, checkpointing_steps, asked_to_stop
        self.sequences, self.progress, self.saver, self.report = sequences, progress, saver, report
        self.saved, self.evaluator = saved, evaluator
        self.saved_weights = saved.names  # of the newest checkpoint
        self.sampler = sampler_of(sequences, plan.seed)
        self.staging = Staging()
        self.steps_trained = 0
        self.meter = Meter(report, plan, len(sequences), engine)
        reading = self.meter.data
        self.accumulation = Accumulation(plan, engine, loss_of, sequences, report, reading, may_split=may_split)
        self.saved_step = progress.step if saver.newest is not None else -1
        self.saved_at = time.monotonic()
        self.seconds_saving = self.seconds_evaluating = 0.0

    def train(self) -> StopAction | None:
        """Run to the last step, or until it is asked to stop; returns why it stopped, None at the end."""
        plan, engine, progress = self.plan, self.engine, self.progress  # of the plan, only the split can change
        engine.model.train()
        stop = self._evaluate_and_save(due=False, stop=None)  # a stop may have come before an evaluation
        self.report.phase("training")
        self.saved_at = time.monotonic()
        begun, before = self.saved_at - self.seconds_evaluating, progress.train_seconds
        while stop is None and not self.is_done:
            learning_rate = self._learning_rate(progress.step)
            with self.meter.data:
                window = self.sampler.sequences(
                    progress.consumed_sequences,
                    min(progress.consumed_sequences + plan.global_batch, plan.total_sequences),
                )
                num_targets = self.sequences.num_targets(window)
            own_loss_sum = self.accumulation.gradient(window, num_targets)
            self.meter.usage.computed()
            grad_norm = engine.clip(plan.max_grad_norm)
            asked = self.asked_to_stop() if engine.processes.is_main else None
            due = self._save_is_due(progress.step + 1, len(window))
            loss_sum, norm, stop, due = self._agree(own_loss_sum, grad_norm, asked, due)
            measures = self.loss_of.take_measures()
            if not math.isfinite(loss_sum):
                raise self._not_finite("loss", begins_here=not own_loss_sum.isfinite().item())
            if not math.isfinite(norm):
                self._compute_again(window, num_targets)
                stop = None  # asked again, and answered with a checkpoint, when the step is done
                continue
            with self.meter.saving:
                self.staging.finish()  # what the save before this step still copies, the update changes
            norm = engine.update(learning_rate) or norm
            if not math.isfinite(norm):  # DeepSpeed knows it only now, and has not updated
                raise self._not_finite("gradient", begins_here=True)

            progress.step += 1
            progress.consumed_sequences += len(window)
            progress.tokens += self.sequences.num_tokens(window)
            progress.loss_sum += loss_sum
            progress.num_targets += num_targets
            progress.train_seconds = before + time.monotonic() - begun - self.seconds_evaluating
            self.steps_trained += 1
            if self.steps_trained == 1 and plan.compile:
                self.report.log(f"Compiled: the first step took {time.monotonic() - begun:.1f} s with it.")
            if self.steps_trained == 1:
                self.saver.prepare(self.staging)
            self.watch.step(
                progress.step, loss=loss_sum / max(1, num_targets), learning_rate=learning_rate, grad_norm=norm
            )
            self.meter.step(
                progress,
                loss_sum=loss_sum,
                num_targets=num_targets,
                grad_norm=norm,
                learning_rate=learning_rate,
                measures=None if measures is None else engine.processes.sum(measures),
            )
            progress.memory = self.meter.memory
            stop = self._evaluate_and_save(due=due, stop=stop)
        self.meter.tell()
        return stop

    @property
    def plan(self) -> Plan:
        return self.accumulation.plan  # of which the split can have changed

    @property
    def step(self) -> int:
        """The one that is under way, or the next."""
        return self.progress.step + 1

    @property
    def doing(self) -> str:
        return f"step {self.step}"

    @property
    def is_done(self) -> bool:
        """Whether no step is left to be trained: the last one is reached, or evaluations stopped getting better."""
        return self.progress.step >= self.plan.total_steps or stopped_early(self.progress, self.plan)

    def _evaluate_and_save(self, *, due: bool, stop: StopAction | None) -> StopAction | None:
        """What happens between two steps; returns why the run is to stop, None to go on."""
        progress, names = self.progress, list[str]()
        if stop is None and self.evaluator is not None and self.evaluator.is_due(progress):
            started = time.monotonic()
            micro_batch, not_finite = self.plan.batch_size, self._held_out_not_finite
            stop = self.evaluator.evaluate(progress, micro_batch, self.asked_to_stop, not_finite)
            self.seconds_evaluating += time.monotonic() - started
            self.meter.skip(time.monotonic() - started)
            if stop is None and progress.best_step == progress.step:
                names.append("best")
            if stop is None and self.is_done and progress.step < self.plan.total_steps:
                self.report.log(f"Stopped early: the best evaluation was that after step {progress.best_step}.")
        if (due or stop is not None) and stop != "cancel" and self.saved_step != progress.step:
            names.insert(0, f"step-{progress.step}")
        if names:
            self.save(*names)
        return stop

    def _agree(
        self, loss_sum: torch.Tensor, grad_norm: torch.Tensor, asked: StopAction | None, due: bool
    ) -> tuple[float, float, StopAction | None, bool]:
        """One exchange per step: the loss of all ranks, and what any one of them wants to happen next."""
        if self.engine.processes.world_size == 1:
            total, norm = torch.stack((loss_sum, grad_norm.to(loss_sum))).tolist()
            return total, norm, asked, due
        flags = [due, *(asked == action for action in STOP_ACTIONS)]
        own = torch.stack((loss_sum, grad_norm.to(loss_sum), *loss_sum.new_tensor(flags)))
        total, norm, save, *wanted = self.engine.processes.sum(own)
        asked_by_any = dict(zip(STOP_ACTIONS, wanted, strict=True))
        stop: StopAction | None = next((action for action in reversed(STOP_ACTIONS) if asked_by_any[action]), None)
        return total, norm / self.engine.processes.world_size, stop, bool(save)

    def _compute_again(self, window: NDArray[np.int64], num_targets: int) -> None:
        """The gradient is not finite: forget it where the loss scale may be why, else raise `NonFiniteLoss`.

        To tell where it begins it is computed once more, because clipping has made all of it not a number.
        """
        engine = self.engine
        if (scale := engine.back_off()) is not None:
            step = self.progress.step + 1
            self.report.log(f"The gradient of step {step} overflowed fp16; again with a loss scale of {scale:,g}.")
            return
        engine.forget_gradients()
        self.accumulation.gradient(window, num_targets)
        raise self._not_finite("gradient", begins_here=bool(not_finite_in(engine.module.named_parameters())))

    def _not_finite(self, what: str, *, begins_here: bool) -> NonFiniteLoss:
        """What every rank raises together; ``begins_here``: on this one."""
        engine = self.engine
        self.meter.tell()
        if what == "loss":
            engine.forget_gradients()  # they follow from the loss; of the weights, one may be the cause
        everywhere = engine.processes.gather((begins_here, not_finite_in(engine.module.named_parameters())))
        ranks = [rank for rank, (begins, _) in enumerate(everywhere) if begins]
        tensors = next((names for begins, names in everywhere if begins and names), [])
        return self.watch.not_finite(self.progress.step + 1, what=what, ranks=ranks, tensors=tensors)

    def _held_out_not_finite(self) -> NonFiniteLoss:
        """The same for an evaluation, whose loss is that of all ranks: each looks at its own weights."""
        everywhere = self.engine.processes.gather(not_finite_in(self.engine.module.named_parameters()))
        tensors = next((names for names in everywhere if names), [])
        return self.watch.held_out_not_finite(self.progress.step, tensors=tensors)

    def _learning_rate(self, updates: int) -> float:
        plan = self.plan
        share = factor(plan.lr_scheduler, updates, warmup=plan.warmup_steps, total_steps=plan.total_steps)
        return plan.learning_rate * share

    def _save_is_due(self, step: int, window: int) -> bool:
        """By number of steps or by epochs as asked; else by time: early at first, then about every ten minutes."""
        every = self.checkpointing_steps
        if every == "epoch":
            consumed = self.progress.consumed_sequences
            return (consumed + window) // len(self.sequences) > consumed // len(self.sequences)
        if isinstance(every, int):
            return step % every == 0
        if not self.engine.processes.is_main or self.saver.busy or step == self.plan.total_steps:
            return False
        trained = self.progress.train_seconds
        pause = min(max(trained, FIRST_SAVE_SECONDS), USUAL_SAVE_SECONDS)
        affordable = self.seconds_saving <= MOST_TIME_SAVING * max(trained, FIRST_SAVE_SECONDS)
        return affordable and time.monotonic() - self.saved_at >= pause

    def save(self, *names: str) -> None:
        """Copy the run's state to memory and let it be written, under each name, while training goes on."""
        started = time.monotonic()
        self.meter.tell()
        self.report.write(ProgressLine(phase="saving", step=self.progress.step, total_steps=self.plan.total_steps))
        with self.meter.saving:
            self.saver.wait_for_room()
        metrics = self.progress.metrics
        if not self.loss_of.is_likelihood:
            metrics.pop("perplexity", None)
        self.saver.plan = self.plan.stored()
        with self.meter.saving:
            self.saver.save(names, self._snapshot(names), metrics)
        self.saved_step = self.progress.step
        self.saved_at = time.monotonic()
        self.seconds_saving += self.saved_at - started

    def _snapshot(self, names: Sequence[str]) -> Snapshot:
        engine = self.engine
        self.saved_weights = self.saved.of(names)
        kept = {name: tensor for name, tensor in self.saved.kept.items() if name in self.saved_weights}
        weights = {**engine.stage_weights(self.staging, self.saved_weights - kept.keys()), **kept}
        tensors, values = engine.stage_optimizer(self.staging)
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        random_states = engine.processes.gather(get_random_state())
        progress = replace(self.progress)
        return Snapshot(weights, self.saved.aliases, tensors, values, random_states, progress, self.staging.finish)

    def finish(self, stopped: StopAction | None) -> Path | None:
        """Save the end and wait for it; returns the newest checkpoint. A run that trained no step changes nothing."""
        processes, newest = self.engine.processes, self.saver.newest
        unchanged = (
            not self.steps_trained
            and newest is not None
            and newest.directory.name == "final"
            and newest.directory.parent.resolve() == self.output_dir.resolve()
        )
        if stopped is None and not unchanged:
            if self.saved_step != self.progress.step or self.saved_weights != self.saved.of(["final"]):
                self.save("final")
            else:
                self.saver.save_copy("final")
        newest = self.saver.wait()
        if processes.is_main and stopped is None:
            checkpoint_files.strip_old_states(self.output_dir)
        directory = None if newest is None else newest.directory
        return processes.from_main(lambda: directory)
