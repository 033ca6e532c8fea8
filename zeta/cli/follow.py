"""A job followed live: a progress bar in a terminal, plain lines elsewhere. Ctrl-C detaches; the job goes on."""

from __future__ import annotations

import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from zeta.cli.exits import Exit, exit_of_job
from zeta.cli.output import duration, ending, notice, print_json, say
from zeta.client import Client
from zeta_core.contract.advice import in_words
from zeta_core.contract.errors import ZetaError
from zeta_core.contract.events import Event
from zeta_core.contract.job import ENDED, Job
from zeta_core.contract.printable import printable

SMALLEST_WIDTH = 20  # of a terminal that has room for a progress bar
SHOWN_PROMPT = 80  # characters of what a sample continues, its last ones
# Between two progress lines where there is no terminal, by the events' own clock: a tenth of what they cover so far.
FIRST_PLAIN_LINE_SECONDS = 5.0
LONGEST_PLAIN_LINE_SECONDS = 60.0


class Detached(ZetaError):
    """Ctrl-C: the job goes on without its reader."""

    type = "interrupted"
    code = "detached"


def follow(client: Client, job_id: str, *, as_json: bool = False, timeout_seconds: float | None = None) -> Exit:
    """Show the job until it has ended, then how it ended; the exit status says the same to programs."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # heard even where a shell started us with `&`
    try:
        job = show(client, job_id, as_json=as_json, timeout_seconds=timeout_seconds)
    except KeyboardInterrupt:
        left = Detached(
            f"Detached: {job_id} goes on. Come back with `zeta wait {job_id}`, end it with `zeta cancel {job_id}`."
        )
        print(left.body().model_dump_json() if as_json else f"\n{left.message}", file=sys.stderr)
        return Exit.INTERRUPTED
    return exit_of_job(job)


def show(client: Client, job_id: str, *, as_json: bool = False, timeout_seconds: float | None = None) -> Job:
    """Show the job until it has ended, then how it ended; a Ctrl-C is the caller's."""
    with _view(as_json, job_id) as view:
        job = client.wait(
            job_id, timeout_seconds=timeout_seconds, on_event=view.show, on_interruption=interruption(as_json)
        )
    if as_json:
        print_json(job)
    else:
        say(ending(job))
    return job


def wait_quietly(client: Client, job_id: str, timeout_seconds: float | None, *, as_json: bool) -> Job:
    """Wait without showing anything."""
    return client.wait(job_id, timeout_seconds=timeout_seconds, on_interruption=interruption(as_json))


class View(ABC):
    """Shows events as they come."""

    @abstractmethod
    def show(self, event: Event) -> None: ...


class JsonView(View):
    """One event in a line."""

    def show(self, event: Event) -> None:
        print_json(event)


class PlainView(View):
    """One sentence per line; progress at each change of phase and every few seconds, later every minute."""

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
            line = None if _is_end(event) else sentence(event, self._job_id)
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
            self._held = line  # the last one before something else happens is shown too

    def _is_due(self, now: datetime) -> bool:
        self._first_at = self._first_at or now
        if self._shown_at is None:
            return True
        covered = (now - self._first_at).total_seconds()
        pause = min(max(FIRST_PLAIN_LINE_SECONDS, covered / 10), LONGEST_PLAIN_LINE_SECONDS)
        return (now - self._shown_at).total_seconds() >= pause


class TerminalView(View):
    """A progress bar, with everything else scrolling by above it."""

    def __init__(self, progress: Any, job_id: str) -> None:
        self._progress, self._job_id = progress, job_id
        self._figures = ""
        self._task = progress.add_task("waiting", total=None, figures="")

    def show(self, event: Event) -> None:
        if event.type != "progress":
            line = None if _is_end(event) else sentence(event, self._job_id)
            if line is not None:
                self._progress.console.print(line, markup=False, highlight=False, emoji=False)
            return
        fields = _fields(event)
        if fields.get("eval_loss") is not None:
            self._progress.console.print(progress_line(fields), markup=False, highlight=False, emoji=False)
            return
        self._figures = _figures(fields) or self._figures  # a phase that measures nothing keeps the last ones
        self._progress.update(
            self._task,
            description=str(fields.get("phase", "")).replace("_", " "),
            completed=fields.get("step") or 0,
            total=fields.get("total_steps"),
            figures=self._figures,
        )


def sentence(event: Event, job_id: str) -> str | None:
    """An event in one line, with the command that applies its advice; ``None`` where it says nothing to people."""
    fields = _fields(event)
    if event.type == "progress":
        return progress_line(fields)
    if event.type == "status":
        status, reason, message = fields.get("status"), fields.get("reason"), fields.get("message")
        return f"{status}" + (f" ({reason})" if reason else "") + (f": {message}" if message else "")
    if event.type == "checkpoint":
        return f"checkpoint {fields.get('name')} is stored (step {fields.get('step')})"
    if event.type == "sample":
        prompt = str(fields.get("prompt"))
        prompt = prompt if len(prompt) <= SHOWN_PROMPT else f"…{prompt[-SHOWN_PROMPT:]}"
        return f"sample at step {fields.get('step')}: {prompt!r} -> {fields.get('text')!r}"
    if event.type in ("warning", "error"):
        words = in_words(str(fields.get("message")), fields.get("hint"), fields.get("patch"), job_id)
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
    if fields.get("share") is not None:  # of what is no step: data that is read, a learning rate that is looked for
        words.append(f"{fields['share']:.0%}")
    if fields.get("eval_loss") is not None:
        words.append(f"held-out loss {fields['eval_loss']:.4f}")
    if fields.get("perplexity") is not None:
        words.append(f"perplexity {fields['perplexity']:.4g}")
    if fields.get("loss") is not None:
        words.append(f"loss {fields['loss']:.4f}")
    if fields.get("tokens_per_second") is not None:
        words.append(f"{fields['tokens_per_second']:,.0f} tokens/s")
    if fields.get("eta_seconds") is not None:
        words.append(f"{duration(fields['eta_seconds'])} left")
    return "  ".join(words)


def _is_end(event: Event) -> bool:
    """Whether the job ends with it; `ending` says that once, with what to do next."""
    return event.type == "status" and _fields(event).get("status") in ENDED


def _fields(event: Event) -> dict[str, Any]:
    """What the event says, safe to print: a line of text from elsewhere never looks like one of ours."""
    fields = event.model_extra or {}
    return {name: _safe(value) if isinstance(value, str) else value for name, value in fields.items()}


def _safe(text: str) -> str:
    return printable(text, keep="\n").replace("\n", "\n    ")


def interruption(as_json: bool) -> Callable[[ZetaError], None]:
    """Reports to people that the connection is lost for a while."""
    return lambda error: notice(f"{error.message} Trying again.", as_json=as_json)


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
    if console.is_dumb_terminal or console.width < SMALLEST_WIDTH:  # TERM=dumb (Emacs), COLUMNS=0
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
