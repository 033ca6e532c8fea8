"""The SHA-256 of a file, in hexadecimal digits."""

from __future__ import annotations

import hashlib
from io import BufferedReader
from pathlib import Path


def file_sha256(path: Path) -> str:
    """Raises `OSError`."""
    with path.open("rb") as file:
        return stream_sha256(file)


def stream_sha256(stream: BufferedReader) -> str:
    """The hash of the rest of a stream, which is read to its end. Raises `OSError`."""
    return hashlib.file_digest(stream, "sha256").hexdigest()
