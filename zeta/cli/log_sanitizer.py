"""Making a job's log safe to print: only graphic characters, line ends, tabs and colours remain.

A log contains whatever the job prints, including the escape sequences of progress bars and libraries. Colours
(``ESC [ ... m``) are kept for a terminal, and all other sequences are removed. A carriage return that overwrites a
line becomes a line end. Other control characters are escaped.
"""

from __future__ import annotations

import re

from zeta_core.contract.printable import printable

# ECMA-48: control sequences; strings terminated by ST (OSC also by BEL); two-character sequences.
_SEQUENCE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[PX^_][^\x1b]*\x1b\\|[ -/]*[0-OQ-WYZ\\`-~])"
)
_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
_RESET = "\x1b[0m"
_LONGEST_SEQUENCE = 4096  # anything longer is not treated as a sequence


class LogSanitizer:
    """Cleans a log that arrives in pieces. A sequence may be split across two pieces."""

    def __init__(self, *, keep_colours: bool) -> None:
        self._keep_colours = keep_colours
        self._held = ""
        self._is_coloured = False

    def feed(self, piece: str) -> str:
        """Return the printable text of the next piece."""
        text = self._held + piece
        complete = _length_of_complete(text)
        self._held = text[complete:]
        return self._clean(text[:complete])

    def end(self) -> str:
        """Return the text that was held back, and reset the colour if one is active."""
        rest, self._held = self._clean(self._held), ""
        return rest + (_RESET if self._is_coloured else "")

    def _clean(self, text: str) -> str:
        parts: list[str] = []
        at = 0
        for match in _SEQUENCE.finditer(text):
            parts.append(_escaped(text[at : match.start()]))
            if self._keep_colours and _COLOUR.fullmatch(match[0]):
                parts.append(match[0])
                self._is_coloured = True
            at = match.end()
        return "".join((*parts, _escaped(text[at:])))


def _escaped(text: str) -> str:
    return printable(text.replace("\r\n", "\n").replace("\r", "\n"), keep="\n\t")


def _length_of_complete(text: str) -> int:
    """The length of the text that can be cleaned now: everything before an incomplete sequence or line end."""
    start = max(0, len(text) - _LONGEST_SEQUENCE)
    for match in re.finditer("\x1b", text[start:]):
        at = start + match.start()
        if not _SEQUENCE.match(text, at):
            return at
    return len(text) - 1 if text.endswith("\r") else len(text)
