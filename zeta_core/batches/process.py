"""``python -m zeta_core batch RUN_DIR``: answer the requests of one run directory.

The guarantees about the journal, stop requests and the lost worker are those of `zeta_core.process.launch`.
"""

from __future__ import annotations

from pathlib import Path

from zeta_core.checkpoint.checkpoint_files import read_checkpoint
from zeta_core.contract.job.checkpoint import FINAL_CHECKPOINT
from zeta_core.contract.job.events import StatusLine
from zeta_core.contract.job.job import JobResult
from zeta_core.contract.job.status import STOP_ENDS, JobStatus, StatusReason
from zeta_core.contract.openai.batch_files import read_input
from zeta_core.contract.spec.batch_spec import BatchSpec
from zeta_core.contract.spec.validation import error_from_details, parse
from zeta_core.contract.wire.answers import ServedWeights, ServeFile
from zeta_core.contract.wire.run_directory import RunFile, file_key
from zeta_core.report.library_noise import without_progress_bars
from zeta_core.report.reporter import Reporter
from zeta_core.system.stop_signal import StopSignal


def answer_batch(run_dir: Path, file: RunFile, report: Reporter, stop: StopSignal) -> StatusLine:
    """Run the batch, and return the last line of its journal. Raises `TrainingFailed`, and any exception of a model."""
    spec = parse(BatchSpec, file.spec)
    earlier = None if file.resume_from is None else Path(file.resume_from)
    if earlier is not None and earlier.name == FINAL_CHECKPOINT:  # only the last line of its journal was lost
        return _completed(_result_of(earlier))
    report.write(StatusLine(status=JobStatus.RUNNING))
    report.phase("loading_data")
    with (Path(file.artifacts_root) / file_key(spec.input.file)).open("rb") as lines:
        read = read_input(lines, spec.endpoint)
    if read.faults:
        raise error_from_details(read.faults)

    report.phase("loading_model")
    from zeta_core.batches.run import BatchRun  # takes seconds
    from zeta_core.serve.loading import load

    with without_progress_bars():
        loaded = load(_serve_file(spec, file))
    stop.on_training_start()
    run = BatchRun(
        spec,
        read.requests,
        loaded,
        report,
        job_id=file.job_id,
        run_dir=run_dir,
        output_dir=Path(file.output_dir).absolute(),
    )
    action = run.answer(earlier, stop)
    if action is None:
        return _completed(run.result)
    status, reason = STOP_ENDS[action]
    return StatusLine(status=status, reason=reason, result=run.result)


def _completed(result: JobResult) -> StatusLine:
    return StatusLine(status=JobStatus.SUCCEEDED, reason=StatusReason.COMPLETED, result=result)


def _result_of(checkpoint: Path) -> JobResult:
    """The counts in the manifest of a complete batch."""
    read = read_checkpoint(checkpoint)
    assert read is not None, "the worker has fetched it completely"
    return JobResult.model_validate({name: int(value) for name, value in read.manifest.metrics.items()})


def _serve_file(spec: BatchSpec, file: RunFile) -> ServeFile:
    """The weights of the spec, as a serving process loads them."""
    weights = ServedWeights(
        name=spec.model_name,
        project="",
        model=file.spec["model"],
        fingerprint=spec.fingerprint,
        has_manifest=spec.has_manifest,
        quantize=spec.quantize,
        files=file.resolved_spec.files,
        bases=file.bases,
    )
    return ServeFile(
        weights=weights,
        artifacts_root=file.artifacts_root,
        cache_dir=str(file.cache),
        data_root=file.data_root,
        hub=file.hub,
    )
