"""Making the standard streams robust: always open, able to print any text, with clear errors.

A character that the locale cannot encode is printed as a JSON escape (``\\u00e9``), so JSON stays valid. A failed write
to standard output (for example, on a full disk) raises `OutputError`; one to standard error is ignored, because it
cannot be reported anywhere. A stream that the caller closed (``zeta jobs >&-``) is replaced by the null device.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from typing import TextIO

ESCAPES = "zeta-escapes"


class OutputError(Exception):
    """Standard output cannot be written."""


class _Output(io.TextIOWrapper):
    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _output_error(error) from error

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _output_error(error) from error


class _Errors(io.TextIOWrapper):
    def write(self, text: str, /) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def prepare() -> None:
    """Replace the standard streams of this process."""
    _open_missing_descriptors()
    codecs.register_error(ESCAPES, _escape)
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - open as long as the process
    sys.stdout = _replaced(sys.stdout, 1, _Output)
    sys.stderr = _replaced(sys.stderr, 2, _Errors)


def discard_output() -> None:
    """Redirect standard output to the null device. Otherwise flushing its buffer at exit would fail again."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def _open_missing_descriptors() -> None:
    """Open closed descriptors. Otherwise the next file or socket would reuse the number, and receive the output."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # returns the lowest free descriptor


def _replaced(stream: TextIO | None, descriptor: int, kind: type[_Output] | type[_Errors]) -> TextIO:
    if isinstance(stream, io.TextIOWrapper):
        encoding, is_line_buffered = stream.encoding, stream.line_buffering
        buffer = stream.detach()
    else:
        encoding, is_line_buffered = "utf-8", False
        buffer = open(descriptor, "wb", closefd=False)  # noqa: SIM115 - open as long as the process
    return kind(buffer, encoding=encoding, errors=ESCAPES, line_buffering=is_line_buffered)


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4)), error.end


def _output_error(error: OSError) -> OutputError:
    return OutputError(f"Standard output cannot be written: {error.strerror or error}.")
