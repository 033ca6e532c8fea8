"""Executing a run from its options to its outcome: everything around the training loop, in order.

Data is tokenized before a process group exists, so no rank waits in a collective for one that is still reading. The
first rank decides which files in ``output_dir`` to read and to move, and broadcasts this to the others.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import nn

from zeta_core.advice import RunAdvisor
from zeta_core.checkpoint import checkpoint_files
from zeta_core.checkpoint.staging import Tensors
from zeta_core.checkpoint.training_state import TrainingProgress
from zeta_core.checkpoint.weights import load_weights
from zeta_core.contract.job.checkpoint import BEST_CHECKPOINT
from zeta_core.contract.job.status import StopAction
from zeta_core.environment import ProcessRank, accelerate_variables, kernel_variables, library_environment
from zeta_core.memory.estimate import has_plenty_of_memory
from zeta_core.memory.limits import check_host_memory
from zeta_core.memory.micro_batch import gpu_memory_bytes
from zeta_core.objective.attention import attention_implementation
from zeta_core.parallel.exchange_check import check_exchange
from zeta_core.parallel.process_settings import deterministic_kernels, device_kind, restored_state, set_num_threads
from zeta_core.parallel.processes import Engine, Processes
from zeta_core.plan import Plan
from zeta_core.report.library_noise import without_progress_bars
from zeta_core.report.reporter import Reporter
from zeta_core.run.announce import announced, prepare_other_node, prepare_output_dir
from zeta_core.run.assembly import begin_or_resume, best_elsewhere, build_evaluator, prepared_engine, reference_for
from zeta_core.run.decision import (
    Decision,
    attention_problem,
    build_model,
    choose_attention,
    decide,
    probe_isolation,
)
from zeta_core.run.inputs import Inputs, ResumePoint, find_resume_point, read, require_equal_inputs
from zeta_core.run.learner import Learner, build_advisor, prepare
from zeta_core.run.request import Outcome, RunRequest
from zeta_core.system.allocator import giving_freed_memory_back, keeping_freed_memory
from zeta_core.train.accumulation import GradientAccumulator
from zeta_core.train.checkpointing import Checkpointer
from zeta_core.train.loop import TrainingLoop
from zeta_core.train.meter import Meter
from zeta_core.train.non_finite import NonFiniteDiagnosis
from zeta_core.train.out_of_memory import MemoryContext, explained_out_of_memory
from zeta_core.train.range_test import TestedRun, find_learning_rate
from zeta_core.train.saving import CheckpointSaver


@dataclass(frozen=True)
class _LoadedRun:
    """A run whose model and data are loaded and whose plan is decided."""

    request: RunRequest
    report: Reporter
    rank: ProcessRank
    processes: Processes
    inputs: Inputs
    resume_point: ResumePoint | None
    model: nn.Module
    decision: Decision

    @property
    def plan(self) -> Plan:
        return self.decision.plan


@without_progress_bars()
def execute(request: RunRequest, rank: ProcessRank, report: Reporter) -> Outcome:
    """Execute a run. Raises `TrainingFailed`, and any exception of a model or a library."""
    inputs = read(request, rank, report)
    with ExitStack() as stack:
        memory = stack.enter_context(explained_out_of_memory())
        run = _load(stack, request, rank, report, inputs)
        memory.plan = run.plan
        threads_set = set_num_threads(run.plan.threads)
        run.processes.gather(None)  # wait until every rank has read its files, because directories are moved next
        run_id = run.processes.from_main(lambda: prepare_output_dir(request, run.resume_point, run.plan, report))
        run.processes.on_other_nodes(lambda: prepare_other_node(request))

        learner = prepare(request, run.inputs, run.decision, run.model, run.resume_point, report)
        # Each rank has a GPU of its own. The hosts of a script under torchrun count as one node.
        check_host_memory(learner.model, run.plan, min(rank.ranks_per_node, max(1, torch.cuda.device_count())))
        if run.plan.deterministic:  # after the model was probed, because a probe may call it with any arguments
            stack.enter_context(deterministic_kernels())
        _choose_allocator(stack, run)
        advisor = build_advisor(request, run.inputs, run.decision, learner)
        if not run.plan.learning_rate:
            found = _find_learning_rate(run, learner, advisor, memory)
            if not isinstance(found, Plan):
                return Outcome(run_id, TrainingProgress(), 0, run.plan.total_steps, None, None, stopped=found)
            memory.plan = found
            run, advisor = replace(run, decision=replace(run.decision, plan=found)), replace(advisor, plan=found)
            if rank.is_main:
                checkpoint_files.write_plan(request.output_dir, run_id, found.stored())
        for advice in advisor.advice():
            report.advise(advice)
        return _train(stack, run, run_id, learner, advisor, memory, threads_set=threads_set)


def _load(stack: ExitStack, request: RunRequest, rank: ProcessRank, report: Reporter, inputs: Inputs) -> _LoadedRun:
    """Start the process group, load the model and decide the plan; all ranks get the same one.

    What must be undone when the run ends is registered with ``stack``.
    """
    options, cuda = request.options, torch.cuda.is_available()
    accelerate, kernels = accelerate_variables(), kernel_variables()
    stack.enter_context(library_environment(request.cache, deepspeed=bool(options.use_deepspeed), cuda=cuda))
    processes = Processes(rank, need_group=options.use_fsdp or bool(options.use_deepspeed))
    stack.callback(processes.close)
    if processes.num_nodes > 1:
        report.log(check_exchange(processes))
    stack.enter_context(restored_state())
    started_on = min(processes.gather(inputs.started_on))
    if started_on != inputs.started_on:  # the processes started around midnight
        inputs = read(replace(request, started_on=started_on), rank, report)

    report.phase("loading_model")
    resume_point = find_resume_point(request, processes, report)
    model = build_model(request, inputs, resume_point)
    # One process without the kernel decides for all, because every process must compute attention in the same way.
    problem = next((each for each in processes.gather(attention_problem(request, model)) if each is not None), None)
    attention = processes.from_main(lambda: choose_attention(request, inputs, model, resume_point, problem, report.log))
    stack.enter_context(attention_implementation(model, attention))
    kinds = {kind for kind in processes.gather(device_kind(kernels)) if kind is not None}
    isolation = processes.from_main(lambda: probe_isolation(request, inputs, model))
    kind = " + ".join(sorted(kinds)) or None
    gpu_bytes = min((size for size in processes.gather(gpu_memory_bytes()) if size is not None), default=None)
    decision = decide(request, inputs, model, isolation, resume_point, accelerate, rank, kind, attention, gpu_bytes)
    if processes.num_nodes > 1:
        own_plan = decision.plan
        require_equal_inputs(own_plan, processes)
        # Hosts may differ in what the choices depend on, such as their memory.
        decision = replace(decision, plan=processes.from_main(lambda: own_plan))
    return _LoadedRun(request, report, rank, processes, inputs, resume_point, model, decision)


def _choose_allocator(stack: ExitStack, run: _LoadedRun) -> None:
    """Give freed memory back or keep it, whichever suits the run. On a GPU, torch caches memory itself."""
    if torch.cuda.is_available():
        return
    decision = run.decision
    if run.plan.use_activation_checkpointing:
        stack.enter_context(giving_freed_memory_back())
    elif has_plenty_of_memory(
        run.model, run.plan, decision.sequences.mean_length, decision.plan_inputs.values_per_token
    ):
        stack.enter_context(keeping_freed_memory())


def _find_learning_rate(
    run: _LoadedRun, learner: Learner, advisor: RunAdvisor, memory: MemoryContext
) -> Plan | StopAction:
    """The plan with a learning rate found by a range test, or the request that stopped the test."""
    tested_run = TestedRun(
        learner.model,
        run.plan,
        run.processes,
        learner.loss_function,
        run.decision.sequences,
        run.request.options.use_deepspeed,
        run.report,
        run.request.stop,
        run.decision.may_split,
        memory,
        learner.weights,
    )
    return find_learning_rate(tested_run, advisor.usual_rates)


def _train(
    stack: ExitStack,
    run: _LoadedRun,
    run_id: str,
    learner: Learner,
    advisor: RunAdvisor,
    memory: MemoryContext,
    *,
    threads_set: bool,
) -> Outcome:
    """Build the engine and the training loop around it, and train to the end or to a stop request."""
    request, report, plan, decision, resume_point = run.request, run.report, run.plan, run.decision, run.resume_point
    # FSDP and DeepSpeed modify a module permanently, so they get a copy. The caller's module gets the weights at the
    # end.
    trains_copy = run.inputs.located.from_caller and plan.strategy != "replicated"
    trained = copy.deepcopy(run.model) if trains_copy else run.model
    engine = stack.enter_context(prepared_engine(trained, request, plan, run.processes, report, learner.weights))
    reference = reference_for(engine, learner.loss_function, decision, resume_point, report)
    progress = begin_or_resume(request, engine, resume_point, plan, run.rank)
    evaluator = build_evaluator(request, run.inputs, decision, engine, learner, report)
    stack.enter_context(
        announced(request, run_id, decision, learner, engine, progress, resume_point, report, threads_set=threads_set)
    )

    saver = _build_saver(run, run_id, learner, engine, progress, reference)
    stack.callback(saver.close)
    accumulator = GradientAccumulator(
        plan, engine, learner.loss_function, decision.sequences, report, may_split=decision.may_split
    )
    meter = Meter(report, plan, len(decision.sequences), engine, learner.loss_function, data=accumulator.reading)
    monitor = advisor.divergence_monitor(report.advise)
    diagnosis = NonFiniteDiagnosis(monitor, accumulator, progress, meter, report)
    checkpointer = Checkpointer(
        accumulator,
        progress,
        learner.saved,
        saver,
        meter,
        report,
        output_dir=request.output_dir,
        checkpointing_steps=request.options.checkpointing_steps,
        newest_request=request.newest_save_request,
    )
    if resume_point is not None:
        checkpointer.document_losses = resume_point.state.document_losses()
    loop = TrainingLoop(
        accumulator, progress, meter, checkpointer, evaluator, diagnosis, report, requested_stop=request.stop
    )
    memory.training = loop
    request.on_training_start()
    stopped = loop.train()
    newest = checkpointer.finish(stopped, steps_trained=loop.steps_trained)

    if trains_copy and newest is not None:
        load_weights(run.model, newest, learner.saved.names)
    best = request.output_dir / BEST_CHECKPOINT
    best = best if progress.best_step is not None and best.is_dir() else None
    return Outcome(run_id, progress, loop.steps_trained, plan.total_steps, newest, best, stopped)


def _build_saver(
    run: _LoadedRun,
    run_id: str,
    learner: Learner,
    engine: Engine,
    progress: TrainingProgress,
    constant_tensors: Tensors,
) -> CheckpointSaver:
    request, resume_point = run.request, run.resume_point
    saver = CheckpointSaver(
        request.output_dir,
        run_id,
        learner.export,
        learner.saved,
        engine,
        run.report,
        keep=request.options.save_total_limit,
    )
    saver.newest = None if resume_point is None else resume_point.checkpoint
    saver.best_elsewhere = best_elsewhere(request, resume_point, progress, run.processes, run.report)
    saver.constant_tensors = constant_tensors
    return saver
