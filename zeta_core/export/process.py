"""``python -m zeta_core export RUN_DIR``: export the checkpoint that the run file names.

The guarantees about the journal and the lost worker are those of `zeta_core.process.launch`. An export saves nothing
before its end, so any stop request ends it immediately.
"""

from __future__ import annotations

from pathlib import Path

from zeta_core.contract.job.events import StatusLine
from zeta_core.contract.job.status import JobStatus, StatusReason
from zeta_core.contract.spec.export_spec import ExportSpec
from zeta_core.contract.spec.validation import parse
from zeta_core.contract.wire.run_directory import RunFile
from zeta_core.report.reporter import Reporter
from zeta_core.system.stop_signal import StopSignal


def export_checkpoint(_run_dir: Path, file: RunFile, report: Reporter, stop: StopSignal) -> StatusLine:
    """Run the export, and return the last line of its journal. Raises `TrainingFailed`."""
    spec = parse(ExportSpec, file.spec)
    report.write(StatusLine(status=JobStatus.RUNNING))
    with stop.deferred():
        from zeta_core.data.sources import SourceLocations
        from zeta_core.export.execution import ExportTask, export

    output_dir = Path(file.output_dir).absolute()
    task = ExportTask(
        job_id=file.job_id,
        spec=spec,
        output_dir=output_dir,
        cache=file.cache,
        environments=file.cache if file.environments_dir is None else Path(file.environments_dir),
        locations=SourceLocations.of_run(file),
        held_out=file.resolved_spec.value("held_out"),
        gguf_python=None if file.gguf_python is None else Path(file.gguf_python),
    )
    export(task, report)
    return StatusLine(status=JobStatus.SUCCEEDED, reason=StatusReason.COMPLETED)
