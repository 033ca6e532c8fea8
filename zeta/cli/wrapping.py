"""Breaking text into lines at the width of a terminal. Commands are never broken, so they can be copied."""

from __future__ import annotations

import re

MIN_WIDTH = 24  # a narrower column of text is harder to read than lines that the terminal breaks

# A part that stays on one line: `code` with its punctuation, a command at the end of a line, or a word.
_PART = re.compile(r"`[^`]*`\S*|(?:^|(?<=: ))zeta [a-z].*$|\S+")


def wrapped(text: str, width: int, *, indent: int = 0, column: int = 0) -> str:
    """Break ``text`` between words. New lines start with ``indent`` blanks, or as many as the broken line.

    ``column`` is the position at which the first line starts. The terminal breaks a part that is longer than a line.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        margin = " " * (len(line) - len(line.lstrip(" ")))
        current, used, is_empty = margin, cell_len(margin) + (0 if lines else column), True
        end = 0
        for part in _PART.finditer(line):
            gap = "" if is_empty else line[end : part.start()]
            if not is_empty and used + cell_len(gap) + cell_len(part[0]) > width:
                lines.append(current)
                current = margin.ljust(indent)
                used, gap = len(current), ""
            current += gap + part[0]
            used += cell_len(gap) + cell_len(part[0])
            is_empty, end = False, part.end()
        lines.append(current)
    return "\n".join(lines)


def longest_part(text: str) -> int:
    """The width of the longest word or command of ``text`` in terminal cells."""
    return max((cell_len(part) for part in _PART.findall(text)), default=0)


def cut_end(text: str, width: int) -> str:
    """``text`` in at most ``width`` terminal cells, with an ellipsis in place of its end.

    Without space for a character, the ellipsis remains.
    """
    if cell_len(text) <= width:
        return text
    while text and cell_len(text) >= width:
        text = text[:-1]
    return f"{text}…"


def cell_len(text: str) -> int:
    """The width of ``text`` in terminal cells."""
    if text.isascii():
        return len(text)
    from rich import cells  # imported only where it is needed, because that takes 15 ms

    return cells.cell_len(text)
