"""``python -m zeta_core evaluate RUN_DIR``: evaluate a checkpoint, and its base model if requested, on a file.

The guarantees about the journal, stop requests and the lost worker are those of `zeta_core.process.launch`. An
evaluation stores nothing before its end, so an attempt that was killed or paused starts again from the beginning.
"""

from __future__ import annotations

from pathlib import Path

from zeta_core.contract.job.comparison import MIN_DOCUMENTS
from zeta_core.contract.job.evaluation import RESULT_FILE, EvaluationResult
from zeta_core.contract.job.events import LogLine, StatusLine
from zeta_core.contract.job.job import JobResult
from zeta_core.contract.job.status import STOP_ENDS, JobStatus, StatusReason
from zeta_core.contract.spec.evaluation_spec import EvaluationSpec
from zeta_core.contract.spec.validation import parse
from zeta_core.contract.wire.run_directory import RunFile
from zeta_core.report.library_noise import without_progress_bars
from zeta_core.report.reporter import Reporter
from zeta_core.system.stop_signal import StopSignal


def evaluate(_run_dir: Path, file: RunFile, report: Reporter, stop: StopSignal) -> StatusLine:
    """Run the evaluation, and return the last line of its journal. Raises `TrainingFailed`, and errors of a model."""
    spec = parse(EvaluationSpec, file.spec)
    if file.resume_from is not None and (Path(file.resume_from) / RESULT_FILE).is_file():  # only its last line was lost
        stored = (Path(file.resume_from) / RESULT_FILE).read_bytes()
        return _completed(EvaluationResult.model_validate_json(stored))
    report.write(StatusLine(status=JobStatus.RUNNING))

    from zeta_core.evaluations.results import save, summarize  # these take seconds
    from zeta_core.evaluations.run import EvaluationRun

    run = EvaluationRun(spec, file, report, stop)
    with without_progress_bars():
        measured = run.measure()
    if not isinstance(measured, list):
        status, reason = STOP_ENDS[measured]
        return StatusLine(status=status, reason=reason)
    result = summarize(measured)
    if result.base is not None and result.comparison is None:
        report.write(
            LogLine(
                level="warning",
                message=f"The file has fewer than {MIN_DOCUMENTS} documents, too few to tell a difference from noise.",
            )
        )
    stop.on_training_start()  # from here on, the run ends by itself
    save(result, measured, run.locations, report, job_id=file.job_id, output_dir=Path(file.output_dir).absolute())
    return _completed(result)


def _completed(result: EvaluationResult) -> StatusLine:
    return StatusLine(
        status=JobStatus.SUCCEEDED,
        reason=StatusReason.COMPLETED,
        result=JobResult(eval_loss=result.checkpoint.loss, tokens=result.num_tokens, evaluation=result),
    )
