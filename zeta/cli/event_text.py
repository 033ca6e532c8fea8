"""A job's events as text for people, or as JSON for programs. Text of the job is made safe for the terminal."""

from __future__ import annotations

import sys
from typing import Any

from zeta.cli.output import duration, print_json, terminal_size
from zeta.cli.wrapping import wrapped
from zeta_core.contract.job.advice import advice_text
from zeta_core.contract.job.events import Event, describe_perplexity
from zeta_core.contract.job.status import ENDED
from zeta_core.contract.printable import printable

MIN_TEXT_WIDTH = 40  # of an event beside its time and type; in a narrower terminal, its text continues below them
SHOWN_PROMPT = 80  # a sample's prompt is shortened to this many characters, its last ones


def print_event(event: Event) -> None:
    """Print an event as JSON, with the fields that the server sent."""
    fields = event.model_dump(mode="json", exclude_unset=True)
    print_json({name: fields[name] for name in ("seq", "attempt", "type", "created_at")} | fields)


def print_event_line(event: Event, job_id: str) -> None:
    """Print an event with its number, time and type, wrapped in a terminal."""
    start = f"{event.seq:>6}  {event.created_at:%H:%M:%S}  {event.type:<10}  "
    line = start + (event_text(event, job_id) or "")
    if sys.stdout.isatty():
        columns = terminal_size().columns
        line = wrapped(line, columns, indent=len(start) if columns - len(start) >= MIN_TEXT_WIDTH else len("      "))
    print(line, flush=True)


def event_text(event: Event, job_id: str) -> str | None:
    """An event as text, with the command that applies its advice; ``None`` if there is nothing to show."""
    fields = safe_fields(event)
    if event.type == "progress":
        return progress_line(fields)
    if event.type == "status":
        return _status_text(fields)
    if event.type == "checkpoint":
        return f"stored checkpoint {fields.get('name')} (step {fields.get('step')})"
    if event.type == "sample":
        texts = event.model_dump(mode="json", include={"prompt", "text"})
        prompt = str(texts.get("prompt"))
        prompt = prompt if len(prompt) <= SHOWN_PROMPT else f"…{prompt[-SHOWN_PROMPT:]}"
        return printable(f"sample at step {fields.get('step')}: {prompt!r} -> {str(texts.get('text'))!r}")
    if event.type in ("warning", "error"):
        words = advice_text(str(fields.get("message")), fields.get("hint"), fields.get("patch"), job_id)
        return f"{event.type}: {_safe(words)}"
    return str(fields.get("message", ""))


def _status_text(fields: dict[str, Any]) -> str:
    if fields.get("resolved_spec") is not None:  # the run reports this once it has read its data and model
        return "resolved all settings"
    status, reason, message, worker = (fields.get(name) for name in ("status", "reason", "message", "worker"))
    place = f" on {worker}" if worker else ""
    return f"{status}{place}" + (f" ({reason})" if reason else "") + (f": {message}" if message else "")


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


def is_end(event: Event) -> bool:
    """Whether this event ends the job. `outcome_text` reports that once, with the next command."""
    return event.type == "status" and safe_fields(event).get("status") in ENDED


def safe_fields(event: Event) -> dict[str, Any]:
    """The event's fields, safe to print: text from the job cannot imitate a line of this program."""
    fields = event.model_dump(mode="json", exclude={"seq", "attempt", "type", "created_at"}, exclude_unset=True)
    return {name: _safe(value) if isinstance(value, str) else value for name, value in fields.items()}


def _safe(text: str) -> str:
    return printable(text, keep="\n").replace("\n", "\n    ")
