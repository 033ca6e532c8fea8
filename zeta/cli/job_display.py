"""A job as text: its status, model, data, progress, losses, warnings and outcome."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

from zeta.cli.output import duration
from zeta_core.contract.job.advice import advice_text, rerun_command

if TYPE_CHECKING:
    from zeta.client import Client
    from zeta_core.contract.job.job import Job

_OBVIOUS_REASONS = ("completed", "cancelled_by_user", "paused_by_user")  # they add nothing to the status


def status_cell(job: Job) -> str:
    """The status, with the code of the reason why the job waits, is paused or failed."""
    reason = job.waiting_reason.code if job.waiting_reason is not None else None
    if reason is None and job.status in ("failed", "paused"):
        reason = job.status_reason
    return (
        str(job.status) if reason is None or reason in (*_OBVIOUS_REASONS, job.status) else f"{job.status} ({reason})"
    )


def start_cell(job: Job) -> str | None:
    """Roughly when a waiting job starts, if that can be estimated."""
    seconds = None if job.waiting_reason is None else job.waiting_reason.seconds_to_start(datetime.now(UTC))
    return None if seconds is None else f"in about {duration(seconds)}"


def model_cell(job: Job, names: Mapping[str, str]) -> str | None:
    """The model in the job's spec; ``names`` maps the ids of uploaded files to their names."""
    model = job.spec.get("model")
    if not isinstance(model, dict):
        return None if model is None else str(model)
    source = cast("dict[str, Any]", model)
    if isinstance(config := source.get("config"), dict):
        return f"{cast('dict[str, Any]', config).get('model_type')} from scratch"
    if "job" in source:
        return f"{source['job']}/{source.get('checkpoint', 'final')}"
    return _file(source["file"], names) if "file" in source else str(source.get("builder"))


def data_cell(job: Job, names: Mapping[str, str]) -> str | None:
    """The data sources in the job's spec, separated by commas."""
    dataset = job.spec.get("dataset")
    sources = cast("list[Any]", dataset if isinstance(dataset, list) else [dataset])
    return ", ".join(_source(source, names) for source in sources if source is not None) or None


def _source(source: Any, names: Mapping[str, str]) -> str:
    if not isinstance(source, dict):
        return str(source)
    fields = cast("dict[str, Any]", source)
    files = fields.get("file")
    if files is not None:
        return ", ".join(
            _file(file, names) for file in cast("list[Any]", files if isinstance(files, list) else [files])
        )
    return next((str(fields[kind]) for kind in ("hub", "path", "builtin") if kind in fields), str(fields))


def _file(file_id: Any, names: Mapping[str, str]) -> str:
    return names.get(str(file_id), str(file_id))


def file_names(client: Client, jobs: Sequence[Job]) -> dict[str, str]:
    """The names of the uploaded files that the jobs use, by id. Deleted files are missing."""
    if not any('"file"' in job.model_dump_json(include={"spec"}) for job in jobs):
        return {}
    return {file.id: file.filename for file in client.files(limit=None)}


def outcome_text(job: Job) -> str:
    """A job's outcome in one or two sentences, with the next command."""
    if job.status == "succeeded":
        loss = job.result.train_loss if job.result is not None else None
        held_out = job.result.eval_loss if job.result is not None else None
        words = f"{job.id} succeeded"
        words += f", mean loss {loss:.4f}" if loss is not None else ""
        words += f", held-out loss {held_out:.4f}" if held_out is not None else ""
        words += f", ran for {time_cell(job)}" if job.attempts else ""
        return f"{words}. Download the checkpoint: zeta download {job.id}"
    reason = f" ({job.status_reason})" if job.status_reason is not None else ""
    words = f"{job.id} {job.status}{reason}"
    if job.error is not None:
        words += f": {advice_text(job.error.message, job.error.hint, job.error.patch, job.id)}"
    if job.status == "cancelled":
        return words
    space = "\n" if job.error is not None and job.error.patch else " "  # each command is on its own line
    return f"{words}{space}See the log: zeta logs {job.id}"


def time_cell(job: Job) -> str | None:
    """The running time of this job alone, over all of its attempts, and that of the last attempt if there are several.

    The time of the job that a rerun continues is not included.
    """
    if not job.attempts:
        return None
    now = datetime.now(UTC)
    seconds = [((attempt.finished_at or now) - attempt.started_at).total_seconds() for attempt in job.attempts]
    total = duration(sum(seconds))
    return total if len(seconds) == 1 else f"{total} in {len(seconds)} attempts (the last one {duration(seconds[-1])})"


def loss_cell(job: Job) -> str | None:
    """The mean loss over the last steps, a window of the same length for every job."""
    loss = (job.progress or {}).get("recent_loss")
    return f"{loss:.4f}" if _is_number(loss) else None


def eval_cell(job: Job) -> str | None:
    """The newest loss on held-out data."""
    loss = (job.progress or {}).get("eval_loss") if job.result is None else job.result.eval_loss
    return f"{loss:.4f}" if _is_number(loss) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def advice_rows(job: Job) -> list[tuple[str, object]]:
    """The job's warnings and error, each with the command that applies its advice."""
    rows: list[tuple[str, object]] = []
    for warning in job.warnings:
        rows += _advised("warning", job.id, warning)
    if job.error is not None:
        rows += _advised("error", job.id, job.error.model_dump())
    return rows


def _advised(name: str, job_id: str, finding: dict[str, Any]) -> list[tuple[str, object]]:
    patch = finding.get("patch")
    rows: list[tuple[str, object]] = [(name, advice_text(str(finding.get("message")), finding.get("hint"), None))]
    return [*rows, ("  to fix", rerun_command(job_id, patch))] if patch else rows


def attempt_cell(job: Job) -> str | None:
    """The number of the current attempt, and how the earlier attempts ended."""
    if not job.attempt:
        return None
    earlier = [
        f"{attempt.attempt}: {(attempt.reason or 'unknown').replace('_', ' ')}"
        for attempt in job.attempts
        if attempt.attempt < job.attempt
    ]
    return f"{job.attempt} ({'; '.join(earlier)})" if earlier else str(job.attempt)


def worker_cell(job: Job) -> str | None:
    """The worker that runs the job; with several nodes, that of each one and its state."""
    nodes = job.attempts[-1].nodes if job.worker is not None and job.attempts else []
    return ", ".join(f"{node.worker} ({node.state})" for node in nodes) or job.worker


def progress_cell(job: Job) -> str | None:
    """The job's current step, and the total if it is known."""
    progress = job.progress or {}
    step, total = progress.get("step"), progress.get("total_steps")
    if step is None:
        return None
    return f"{step}/{total}" if total is not None else str(step)
