"""Preparing ``output_dir`` for a run, and reporting the run before its first step."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, nullcontext

from zeta_core.checkpoint import checkpoint_files
from zeta_core.checkpoint.training_state import TrainingProgress
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.job.events import StatusLine
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.spec.resolved_spec import ResolvedSpec
from zeta_core.data.data_report import describe_data, report_data, report_held_out, report_overlap
from zeta_core.failures import CannotTrain, is_disk_full
from zeta_core.parallel.processes import Engine
from zeta_core.plan import Plan
from zeta_core.report.reporter import Reporter
from zeta_core.report.trackers import TrackedRun, Trackers, openers
from zeta_core.run.decision import Decision
from zeta_core.run.inputs import ResumePoint
from zeta_core.run.learner import Learner
from zeta_core.run.request import RunRequest
from zeta_core.run.resolved_spec import describe_defaults, report_resume, resolved_spec, warn_of_device_change
from zeta_core.system.distribution import installed_versions


def prepare_output_dir(request: RunRequest, resume_point: ResumePoint | None, plan: Plan, report: Reporter) -> str:
    """Clean ``output_dir``, move other runs' checkpoints aside, and return the run's id. Only for the first node."""
    manifest = None if resume_point is None else resume_point.checkpoint.manifest
    run_id = new_id("run") if manifest is None else manifest.run_id
    after = None if manifest is None else manifest.step
    try:
        request.output_dir.mkdir(parents=True, exist_ok=True)
        checkpoint_files.remove_partial_files(request.output_dir)
        moved = checkpoint_files.set_checkpoints_aside(request.output_dir, after_step=after, run_id=run_id)
        checkpoint_files.write_plan(request.output_dir, run_id, plan.stored())
    except OSError as error:
        if is_disk_full(error):
            raise
        raise CannotTrain(
            f"output_dir is {str(request.output_dir)!r}, which cannot be written ({error.strerror}); use a writable "
            "directory.",
            param="output_dir",
        ) from error
    if moved is not None:
        report.log(f"Moved the checkpoints of an earlier run from {request.output_dir} to {moved}.")
    return run_id


def prepare_other_node(request: RunRequest) -> None:
    """Clean ``output_dir`` of a node that has no checkpoints, because it sends its parts of them to the first node."""
    request.output_dir.mkdir(parents=True, exist_ok=True)
    checkpoint_files.remove_partial_files(request.output_dir)


@contextmanager
def announced(
    request: RunRequest,
    run_id: str,
    decision: Decision,
    learner: Learner,
    engine: Engine,
    progress: TrainingProgress,
    resume_point: ResumePoint | None,
    report: Reporter,
    *,
    threads_set: bool,
) -> Generator[None]:
    """Report the resolved spec and a summary of the run. Within the context, lines also go to the trackers."""
    options, plan = request.options, decision.plan
    data = describe_data(decision.training_data.tokens, decision.sequences, plan)
    held_out = None if decision.held_out is None else decision.held_out.tokens
    resolved = resolved_spec(options, plan, held_out, data).updated(
        ResolvedSpec(
            device=str(engine.device),
            num_parameters=learner.num_parameters,
            num_trained_parameters=learner.num_trained,
            run_id=run_id,
            data_fingerprint=plan.data,
            base_fingerprint=plan.base,
            versions=installed_versions(),
        )
    )
    report.write(StatusLine(status=JobStatus.RUNNING, resolved_spec=resolved))
    name = options.entity_name or run_id
    tracked = nullcontext()
    if options.report_to and engine.processes.is_main:
        trackers = Trackers(report.warn)
        run_of = TrackedRun(name, run_id, request.output_dir, progress.step, resolved.as_json(), wandb=options.wandb)
        trackers.start(openers(options.report_to, run_of), required=resume_point is None)
        tracked = report.also_to(trackers)
    with tracked:
        details = "" if learner.num_trained == learner.num_parameters else f", {learner.num_trained:,} of them trained"
        details += " and the base in 4 bits" if request.quantizes else ""
        report.log(
            f"{name}: {learner.num_parameters:,} parameters{details}, {plan.total_steps} steps of {plan.global_batch} "
            f"sequences of {plan.seq_len} tokens, on {plan.world_size} x {engine.device.type}."
        )
        report.log(engine.optimizer_groups)
        if engine.caution is not None:
            report.log(engine.caution)
        if resume_point is None and (chosen := describe_defaults(options, plan, decision.plan_inputs)):
            report.log(chosen)
        report_data(data, decision.training_data.tokens, decision.sequences, report)
        if decision.held_out is not None:
            report_held_out(decision.held_out.tokens, decision.held_out.sequences, report)
            report_overlap(decision.overlap, decision.held_out.tokens, plan.eval_split, report)
        if resume_point is not None:
            report_resume(report, progress, plan, resume_point.plan, threads_set=threads_set)
        before = request.device_kind if resume_point is None else resume_point.plan.get("device_kind")
        warn_of_device_change(report, before, plan.device_kind)
        yield
