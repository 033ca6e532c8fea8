"""A job's log, made safe to print. Guaranteed: nothing but graphic characters, line ends, tabs and colours remain.

Progress bars and libraries write escape sequences, and anything that a job prints gets into its log. Colours
(``ESC [ ... m``) are kept for a terminal; other sequences are removed; a carriage return that overwrites a line ends it
instead; other control characters are escaped.
"""

from __future__ import annotations

import re

from zeta_core.contract.printable import printable

# ECMA-48: control sequences; strings that ST (or for OSC also BEL) ends; two-character sequences.
_SEQUENCE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[PX^_][^\x1b]*\x1b\\|[ -/]*[0-OQ-WYZ\\`-~])"
)
_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
_RESET = "\x1b[0m"
_LONGEST_SEQUENCE = 4096  # what begins like a sequence and is longer is not one


class LogText:
    """Cleans a log that arrives in pieces; a sequence may be split between two of them."""

    def __init__(self, *, keep_colours: bool) -> None:
        self._keep_colours = keep_colours
        self._held = ""
        self._is_coloured = False

    def feed(self, piece: str) -> str:
        """The printable text of the next piece."""
        text = self._held + piece
        complete = _length_of_complete(text)
        self._held = text[complete:]
        return self._clean(text[:complete])

    def end(self) -> str:
        """What was held back, and the end of a colour."""
        rest, self._held = self._clean(self._held), ""
        return rest + (_RESET if self._is_coloured else "")

    def _clean(self, text: str) -> str:
        parts: list[str] = []
        at = 0
        for found in _SEQUENCE.finditer(text):
            parts.append(_escaped(text[at : found.start()]))
            if self._keep_colours and _COLOUR.fullmatch(found[0]):
                parts.append(found[0])
                self._is_coloured = True
            at = found.end()
        return "".join((*parts, _escaped(text[at:])))


def _escaped(text: str) -> str:
    return printable(text.replace("\r\n", "\n").replace("\r", "\n"), keep="\n\t")


def _length_of_complete(text: str) -> int:
    """How much of the text can be cleaned now: all, or what comes before a sequence or line end that goes on."""
    start = max(0, len(text) - _LONGEST_SEQUENCE)
    for found in re.finditer("\x1b", text[start:]):
        at = start + found.start()
        if not _SEQUENCE.match(text, at):
            return at
    return len(text) - 1 if text.endswith("\r") else len(text)
