"""How the events of a followed job are shown: as JSON, as plain lines, or with a progress line in a terminal."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING

from zeta.cli.event_text import event_text, is_end, print_event, progress_line, safe_fields
from zeta.cli.progress_display import ProgressDisplay
from zeta.cli.wrapping import wrapped
from zeta_core.contract.job.events import Event

if TYPE_CHECKING:
    from rich.live import Live

MIN_WIDTH = 20  # a narrower terminal gets plain lines instead of a progress line
REFRESH_SECONDS = 0.2  # at least this between two updates of the progress line
# The interval between plain progress lines is a tenth of the time covered so far, by the events' timestamps, and is
# limited to this range.
FIRST_PLAIN_LINE_SECONDS = 5.0
MAX_PLAIN_LINE_SECONDS = 60.0


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
            line = None if is_end(event) else event_text(event, self._job_id)
            if line is not None:
                print(line, flush=True)
            return
        fields = safe_fields(event)
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
    """Shows the newest progress in one line that is updated in place, and all other events above it."""

    def __init__(self, live: Live, job_id: str) -> None:
        self._live, self._job_id = live, job_id
        self._display = ProgressDisplay()
        self._phase: str | None = None
        self._refreshed_at = time.monotonic()
        live.update(self._display, refresh=True)

    def show(self, event: Event) -> None:
        if event.type != "progress":
            line = None if is_end(event) else event_text(event, self._job_id)
            if line is not None:
                self._print(line)
            return
        fields = safe_fields(event)
        if fields.get("eval_loss") is not None:
            self._print(progress_line(fields))
            return
        self._display.update(fields)
        is_new_phase, self._phase = fields.get("phase") != self._phase, fields.get("phase")
        if is_new_phase or time.monotonic() - self._refreshed_at >= REFRESH_SECONDS:
            self._refreshed_at = time.monotonic()
            self._live.refresh()

    def _print(self, line: str) -> None:
        console = self._live.console
        text = wrapped(line, console.width, indent=4)  # lines of the job's own text are indented in the same way
        console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


@contextmanager
def open_view(as_json: bool, job_id: str) -> Generator[View]:
    """The view for standard output. A terminal is left with a complete last line, whatever happens."""
    if as_json:
        yield JsonView()
        return
    if not sys.stdout.isatty():
        yield PlainView(job_id)
        return
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if console.is_dumb_terminal or console.width < MIN_WIDTH:  # TERM=dumb (Emacs), COLUMNS=0
        yield PlainView(job_id)
        return
    # A thread that refreshes the line could draw it again while this thread prints an event above it.
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        yield TerminalView(live, job_id)
