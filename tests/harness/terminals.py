"""A real terminal for tests: a command runs on a pseudo-terminal, and a screen interprets what it writes."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pexpect
import pyte

LINES = 50
COLOUR = re.compile(rb"\x1b\[(?:\d+;)*(?:3[0-8]|9[0-7])[;m]")


@dataclass(frozen=True)
class TerminalSession:
    """A command that has ended in a terminal: its exit status, the lines on the screen, and the bytes that it wrote."""

    status: int | None
    lines: list[str]
    written: bytes

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def is_coloured(self) -> bool:
        """Whether the command set a text colour."""
        return COLOUR.search(self.written) is not None


class Terminal:
    """A command in a terminal of ``columns``. Use it as a context manager, which ends the command."""

    def __init__(self, command: Sequence[str | Path], environment: dict[str, str], *, columns: int) -> None:
        self._columns = columns
        self._screen = pyte.HistoryScreen(columns, LINES, history=10_000, ratio=1.0)
        self._stream = pyte.ByteStream(self._screen)
        self._written = b""
        program, *arguments = (str(word) for word in command)
        variables = {"TERM": "xterm-256color", **environment}
        self._process = pexpect.spawn(program, arguments, env=variables, dimensions=(LINES, columns), timeout=None)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.close(force=True)

    def type(self, text: str) -> None:
        """Type text, such as ``\\x03`` for Ctrl-C."""
        self._process.send(text)

    def resize(self, columns: int) -> None:
        self._columns = columns
        self._screen.resize(LINES, columns)
        self._process.setwinsize(LINES, columns)

    def read_until(self, text: str, *, times: int = 1, timeout_seconds: float = 60.0) -> list[str]:
        """Read until ``text`` is on the screen this many times; return its lines."""
        deadline = time.monotonic() + timeout_seconds
        while "\n".join(self.lines()).count(text) < times:
            shown = "\n".join(self.lines())
            assert time.monotonic() < deadline, f"{text!r} is not on the screen:\n{shown}"
            assert self._read() or "\n".join(self.lines()).count(text) >= times, f"the command ended:\n{shown}"
        return self.lines()

    def finish(self, timeout_seconds: float = 240.0) -> TerminalSession:
        """Read until the command ends."""
        deadline = time.monotonic() + timeout_seconds
        while self._read():
            assert time.monotonic() < deadline, "the command does not end:\n" + "\n".join(self.lines())
        self._process.close()
        return TerminalSession(self._process.exitstatus, self.lines(), self._written)

    def lines(self) -> list[str]:
        """The lines that scrolled out of the screen and those on it, without trailing blanks."""
        columns = range(self._columns)
        above = ["".join(row[column].data for column in columns) for row in self._screen.history.top]
        return [line.rstrip() for line in (*above, *self._screen.display)]

    def _read(self) -> bool:
        """Read what the command has written, waiting half a second. Returns False when it has ended."""
        try:
            data = self._process.read_nonblocking(65536, timeout=0.5)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self._written += data
        self._stream.feed(data)
        return True


def run_in_terminal(
    command: Sequence[str | Path], environment: dict[str, str], *, columns: int, timeout_seconds: float = 240.0
) -> TerminalSession:
    """Run a command in a terminal to its end."""
    with Terminal(command, environment, columns=columns) as terminal:
        return terminal.finish(timeout_seconds)
