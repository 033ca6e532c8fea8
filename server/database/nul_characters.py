"""NUL in texts of clients, which PostgreSQL rejects in every statement."""

from __future__ import annotations


def replace_nul(text: str) -> str:
    """``text`` for comparison with a column. It then equals no stored value if it contained NUL."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")
