"""Validates uploaded files by name and first bytes; the training validates the rest of the content."""

from __future__ import annotations

from zeta_core.contract.data_files.file_types import (
    DATA_SUFFIXES,
    MODEL_SUFFIXES,
    ROW_SUFFIXES,
    TEXT_SUFFIXES,
    TOKEN_SUFFIXES,
    file_type,
    listed,
)
from zeta_core.contract.data_files.signatures import fault_in_first_bytes
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.job.responses import FilePurpose
from zeta_core.contract.spec.validation import shown

SUFFIXES: dict[FilePurpose, tuple[str, ...]] = {"dataset": DATA_SUFFIXES, "model": MODEL_SUFFIXES}
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257


def check_name(filename: str, purpose: FilePurpose) -> None:
    """Raise `InvalidRequest` if the name has no supported suffix."""
    allowed = SUFFIXES[purpose]
    if file_type(filename).suffix not in allowed:
        raise InvalidRequest(
            f"file is {shown(filename)}, which is not a supported {purpose} format; use {listed(allowed)}.",
            code="unknown_format",
            param="file",
        )


def unreadable(filename: str, *, as_tokens: bool) -> str | None:
    """The reason why a job that trains on text, or on token ids, can't read this data file; ``None`` if it can."""
    allowed = (*ROW_SUFFIXES, *(TOKEN_SUFFIXES if as_tokens else TEXT_SUFFIXES))
    if file_type(filename).suffix in allowed:
        return None
    fix = "leave out use_pretokenized" if as_tokens else "set use_pretokenized"
    content = "token ids are" if as_tokens else "text is"
    return f"is {shown(filename)}, but {content} read from {listed(allowed)} files; {fix}, or use another file."


def check_beginning(filename: str, beginning: bytes) -> None:
    """Raise `InvalidRequest` for an empty file, or one whose first bytes contradict its suffix."""
    if not beginning:
        raise InvalidRequest(
            f"file is {shown(filename)}, which is empty; upload a file with content.",
            code="empty_file",
            param="file",
        )
    if file_type(filename).suffix in MODEL_SUFFIXES:
        fits = beginning[_TAR_MAGIC_AT:].startswith(_TAR_MAGIC)
        fault = None if fits else "is not a .tar archive; save it in that format, or rename it to match its content."
    else:
        fault = fault_in_first_bytes(filename, beginning)
    if fault is not None:
        raise InvalidRequest(f"The content of {shown(filename)} {fault}", code="unknown_format", param="file")
