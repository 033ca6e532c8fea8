"""Following a job live, with a progress bar in a terminal and plain lines elsewhere.

Ctrl-C stops following; the job continues.
"""

from __future__ import annotations

import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from zeta.cli.exit_status import ExitStatus, exit_status_of_job
from zeta.cli.job_display import outcome_text
from zeta.cli.output import duration, notice, print_json, print_text
from zeta.client import Client
from zeta_core.contract.errors import ZetaError
from zeta_core.contract.job.advice import advice_text
from zeta_core.contract.job.events import Event, describe_perplexity
from zeta_core.contract.job.job import Job
from zeta_core.contract.job.status import ENDED
from zeta_core.contract.printable import printable

MIN_WIDTH = 20  # a narrower terminal gets plain lines instead of a progress bar
SHOWN_PROMPT = 80  # a sample's prompt is shortened to this many characters, its last ones
# The interval between plain progress lines is a tenth of the time covered so far, by the events' timestamps, and is
# limited to this range.
FIRST_PLAIN_LINE_SECONDS = 5.0
MAX_PLAIN_LINE_SECONDS = 60.0


class Detached(ZetaError):
    """The user stopped following with Ctrl-C; the job continues."""

    type = "interrupted"
    code = "detached"


def follow(client: Client, job_id: str, *, as_json: bool = False, timeout_seconds: float | None = None) -> ExitStatus:
    """Show the job until it has ended, then its outcome, which the exit status reports as well."""
    # A shell that starts a command with `&` makes it ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        job = show(client, job_id, as_json=as_json, timeout_seconds=timeout_seconds)
    except KeyboardInterrupt:
        left = Detached(
            f"Stopped following; {job_id} continues. Follow it again with `zeta wait {job_id}`, or cancel it with "
            f"`zeta cancel {job_id}`."
        )
        print(left.body().model_dump_json() if as_json else f"\n{left.message}", file=sys.stderr)
        return ExitStatus.INTERRUPTED
    return exit_status_of_job(job)


def show(client: Client, job_id: str, *, as_json: bool = False, timeout_seconds: float | None = None) -> Job:
    """Show the job until it has ended, then its outcome. Raises `KeyboardInterrupt` on Ctrl-C."""
    with _view(as_json, job_id) as view:
        job = client.wait(
            job_id, timeout_seconds=timeout_seconds, on_event=view.show, on_interruption=interruption(as_json)
        )
    if as_json:
        print_json(job)
    else:
        print_text(outcome_text(job))
    return job


def wait_quietly(client: Client, job_id: str, timeout_seconds: float | None, *, as_json: bool) -> Job:
    """Wait without showing anything."""
    return client.wait(job_id, timeout_seconds=timeout_seconds, on_interruption=interruption(as_json))


class View(ABC):
    """Shows events as they arrive."""

    @abstractmethod
    def show(self, event: Event) -> None: ...


class JsonView(View):
    """Prints each event as JSON on its own line."""

    def show(self, event: Event) -> None:
        print_event(event)


class PlainView(View):
    """Prints one line per event, but progress only when the phase changes and every few seconds, later every minute."""

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        self._phase: str | None = None
        self._first_at: datetime | None = None
        self._shown_at: datetime | None = None
        self._held: str | None = None

    def show(self, event: Event) -> None:
        if event.type != "progress":
            if self._held is not None:
                print(self._held, flush=True)
                self._held = None
            line = None if _is_end(event) else event_text(event, self._job_id)
            if line is not None:
                print(line, flush=True)
            return
        fields = _fields(event)
        if fields.get("eval_loss") is not None:
            self._held = None
            print(progress_line(fields), flush=True)
            return
        is_new_phase = fields.get("phase") != self._phase
        is_due = self._is_due(event.created_at)
        line = progress_line(fields)
        if is_new_phase or is_due:
            self._phase, self._shown_at, self._held = fields.get("phase"), event.created_at, None
            print(line, flush=True)
        else:
            self._held = line  # printed before the next event of another type

    def _is_due(self, now: datetime) -> bool:
        self._first_at = self._first_at or now
        if self._shown_at is None:
            return True
        covered = (now - self._first_at).total_seconds()
        pause = min(max(FIRST_PLAIN_LINE_SECONDS, covered / 10), MAX_PLAIN_LINE_SECONDS)
        return (now - self._shown_at).total_seconds() >= pause


class TerminalView(View):
    """Shows a progress bar, and all other events above it."""

    def __init__(self, progress: Any, job_id: str) -> None:
        self._progress, self._job_id = progress, job_id
        self._figures = ""
        self._task = progress.add_task("waiting", total=None, figures="")

    def show(self, event: Event) -> None:
        if event.type != "progress":
            line = None if _is_end(event) else event_text(event, self._job_id)
            if line is not None:
                self._progress.console.print(line, markup=False, highlight=False, emoji=False)
            return
        fields = _fields(event)
        if fields.get("eval_loss") is not None:
            self._progress.console.print(progress_line(fields), markup=False, highlight=False, emoji=False)
            return
        self._figures = _figures(fields) or self._figures  # a phase without measurements keeps the previous ones
        self._progress.update(
            self._task,
            description=str(fields.get("phase", "")).replace("_", " "),
            completed=fields.get("step") or 0,
            total=fields.get("total_steps"),
            figures=self._figures,
        )


def print_event(event: Event) -> None:
    """Print an event as JSON, with the fields that the server sent."""
    fields = event.model_dump(mode="json", exclude_unset=True)
    print_json({name: fields[name] for name in ("seq", "attempt", "type", "created_at")} | fields)


def event_text(event: Event, job_id: str) -> str | None:
    """An event as text, with the command that applies its advice; ``None`` if there is nothing to show."""
    fields = _fields(event)
    if event.type == "progress":
        return progress_line(fields)
    if event.type == "status":
        status, reason, message = fields.get("status"), fields.get("reason"), fields.get("message")
        return f"{status}" + (f" ({reason})" if reason else "") + (f": {message}" if message else "")
    if event.type == "checkpoint":
        return f"stored checkpoint {fields.get('name')} (step {fields.get('step')})"
    if event.type == "sample":
        prompt = str(fields.get("prompt"))
        prompt = prompt if len(prompt) <= SHOWN_PROMPT else f"…{prompt[-SHOWN_PROMPT:]}"
        return f"sample at step {fields.get('step')}: {prompt!r} -> {fields.get('text')!r}"
    if event.type in ("warning", "error"):
        words = advice_text(str(fields.get("message")), fields.get("hint"), fields.get("patch"), job_id)
        return f"{event.type}: {_safe(words)}"
    return str(fields.get("message", ""))


def progress_line(fields: dict[str, Any]) -> str:
    step, total = fields.get("step"), fields.get("total_steps")
    words = [str(fields.get("phase", "")).replace("_", " ")]
    if step is not None:
        words.append(f"step {step}/{total}" if total is not None else f"step {step}")
    figures = _figures(fields)
    return "  ".join(word for word in (*words, figures) if word)


def _figures(fields: dict[str, Any]) -> str:
    words: list[str] = []
    if fields.get("share") is not None:  # progress of work without steps: reading data, finding a learning rate
        words.append(f"{fields['share']:.0%}")
    if fields.get("eval_loss") is not None:
        words.append(f"held-out loss {fields['eval_loss']:.4f}")
    if fields.get("perplexity") is not None:
        words.append(f"perplexity {describe_perplexity(fields['perplexity'])}")
    if fields.get("loss") is not None:
        words.append(f"loss {fields['loss']:.4f}")
    if fields.get("tokens_per_second") is not None:
        words.append(f"{fields['tokens_per_second']:,.0f} tokens/s")
    if fields.get("eta_seconds") is not None:
        words.append(f"{duration(fields['eta_seconds'])} left")
    return "  ".join(words)


def _is_end(event: Event) -> bool:
    """Whether this event ends the job. `outcome_text` reports that once, with the next command."""
    return event.type == "status" and _fields(event).get("status") in ENDED


def _fields(event: Event) -> dict[str, Any]:
    """The event's fields, safe to print: text from the job cannot imitate a line of this program."""
    fields = event.model_dump(mode="json", exclude={"seq", "attempt", "type", "created_at"}, exclude_unset=True)
    return {name: _safe(value) if isinstance(value, str) else value for name, value in fields.items()}


def _safe(text: str) -> str:
    return printable(text, keep="\n").replace("\n", "\n    ")


def interruption(as_json: bool) -> Callable[[ZetaError], None]:
    """A callback that reports a lost connection to the user."""
    return lambda error: notice(f"{error.message} Reconnecting.", as_json=as_json)


@contextmanager
def _view(as_json: bool, job_id: str) -> Generator[View]:
    if as_json:
        yield JsonView()
        return
    if not sys.stdout.isatty():
        yield PlainView(job_id)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console()
    if console.is_dumb_terminal or console.width < MIN_WIDTH:  # TERM=dumb (Emacs), COLUMNS=0
        yield PlainView(job_id)
        return
    columns = (
        TextColumn("{task.description:<13}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
    )
    with Progress(*columns, console=console) as progress:
        yield TerminalView(progress, job_id)
