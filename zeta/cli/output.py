"""Printing results, as text with control characters escaped, or as the API's own JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, TextIO

from pydantic import BaseModel

from zeta.cli.wrapping import MIN_WIDTH, cell_len, longest_part, wrapped
from zeta_core.contract.job.responses import Page
from zeta_core.contract.printable import is_printable, printable
from zeta_core.system.settings import process_environment

DEFAULT_WIDTH, DEFAULT_HEIGHT = 80, 24  # where there is no terminal, and COLUMNS and LINES are not set


def print_text(text: str) -> None:
    """Print text that may contain untrusted names and messages. Only line ends are printed unescaped."""
    print(for_terminal(printable(text, keep="\n"), sys.stdout), flush=True)


def for_terminal(text: str, stream: TextIO, indent: int = 2) -> str:
    """Text for standard output or standard error, wrapped if that is a terminal.

    New lines are indented, so that untrusted text in them can't imitate a line of this program.
    """
    return wrapped(text, terminal_size(stream).columns, indent=indent) if stream.isatty() else text


def print_json(value: BaseModel | dict[str, Any]) -> None:
    """Print one object on one line. Characters that could control the terminal are escaped, as JSON allows."""
    text = value.model_dump_json() if isinstance(value, BaseModel) else json.dumps(value)
    if not text.isprintable():  # only strings can contain unprintable characters
        text = "".join(sign if is_printable(sign) else json.dumps(sign)[1:-1] for sign in text)
    print(text, flush=True)


def notice(sentence: str, *, as_json: bool) -> None:
    """Print a notice to standard error. With ``--json`` it is omitted: standard error then carries only the error."""
    if not as_json:
        print(for_terminal(printable(sentence, keep="\n"), sys.stderr), file=sys.stderr, flush=True)


def print_list(items: Sequence[BaseModel]) -> None:
    """Print a list as a page of the API."""
    data = [item.model_dump(mode="json") for item in items]
    ids = [str(item.get("id") or item.get("name") or "") for item in data]
    page = Page[dict[str, Any]](data=data, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None)
    print_json(page)


def print_fields(fields: Sequence[tuple[str, object]]) -> None:
    """Print one name and value per line, omitting fields that are ``None``.

    In a terminal, long values are wrapped beside the names; what does not fit there is below its name.
    """
    shown = [(name, cell(value)) for name, value in fields if value is not None]
    start = max(len(name) for name, _ in shown) + len("  ")
    columns = terminal_size().columns if sys.stdout.isatty() else None
    for name, value in shown:
        if columns is None or start + cell_len(value) <= columns:
            print(f"{name.ljust(start)}{value}")
        elif columns - start >= max(MIN_WIDTH, longest_part(value)):
            print(f"{name.ljust(start)}{wrapped(value, columns, indent=start, column=start)}")
        else:
            print(f"{name}\n  {wrapped(value, columns, indent=2, column=2)}")


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


def terminal_size(stream: TextIO | None = None) -> os.terminal_size:
    """The columns and lines of a stream, by default standard output; COLUMNS and LINES take precedence.

    `shutil.get_terminal_size` asks the original standard output, which `standard_streams` has replaced.
    """
    variables = process_environment()
    try:
        width, height = os.get_terminal_size((stream or sys.stdout).fileno())
    except (OSError, ValueError):
        width = height = 0
    given = [int(text) if (text := variables.get(name, "")).isdecimal() else 0 for name in ("COLUMNS", "LINES")]
    return os.terminal_size((given[0] or width or DEFAULT_WIDTH, given[1] or height or DEFAULT_HEIGHT))
