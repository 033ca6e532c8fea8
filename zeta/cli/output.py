"""Printing results, as text with control characters escaped, or as the API's own JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel

from zeta_core.contract.job.advice import in_words, rerun_command
from zeta_core.contract.job.answers import Page
from zeta_core.contract.job.job import Job
from zeta_core.contract.printable import is_printable, printable


def say(text: str) -> None:
    """Print text that may contain untrusted names and messages. Only line ends are printed unescaped."""
    print(printable(text, keep="\n"), flush=True)


def print_json(value: BaseModel | dict[str, Any]) -> None:
    """Print one object on one line. Characters that could control the terminal are escaped, as JSON allows."""
    text = value.model_dump_json() if isinstance(value, BaseModel) else json.dumps(value)
    if not text.isprintable():  # only strings can contain unprintable characters
        text = "".join(sign if is_printable(sign) else json.dumps(sign)[1:-1] for sign in text)
    print(text, flush=True)


def notice(sentence: str, *, as_json: bool) -> None:
    """Print a notice to standard error. With ``--json`` it is omitted: standard error then carries only the error."""
    if not as_json:
        print(printable(sentence, keep="\n"), file=sys.stderr, flush=True)


def print_list(items: Sequence[BaseModel]) -> None:
    """Print a list as a page of the API."""
    data = [item.model_dump(mode="json") for item in items]
    ids = [str(item.get("id") or item.get("name") or "") for item in data]
    page = Page[dict[str, Any]](data=data, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None)
    print_json(page)


def print_fields(fields: Sequence[tuple[str, object]]) -> None:
    """Print one name and value per line, omitting fields that are ``None``."""
    shown = [(name, value) for name, value in fields if value is not None]
    width = max(len(name) for name, _ in shown)
    for name, value in shown:
        print(f"{name.ljust(width)}  {cell(value)}")


def cell(value: object) -> str:
    """A value formatted as a table cell or field."""
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return ago(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return printable(str(value))


def ago(moment: datetime) -> str:
    """A past time relative to now, such as ``5 min ago``."""
    seconds = max(0, int((datetime.now(UTC) - moment).total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds} s ago"


def duration(seconds: float) -> str:
    """A duration in its largest units, such as ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def size(number_of_bytes: int) -> str:
    """A number of bytes with a binary unit, such as ``1.5 MiB``."""
    amount = float(number_of_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def ending(job: Job) -> str:
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
        words += f": {in_words(job.error.message, job.error.hint, job.error.patch, job.id)}"
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
    rows: list[tuple[str, object]] = [(name, in_words(str(finding.get("message")), finding.get("hint"), None))]
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


def progress_cell(job: Job) -> str | None:
    """The job's current step, and the total if it is known."""
    progress = job.progress or {}
    step, total = progress.get("step"), progress.get("total_steps")
    if step is None:
        return None
    return f"{step}/{total}" if total is not None else str(step)
