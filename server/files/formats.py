"""Validates uploaded files by name and first bytes; the training validates the rest of the content."""

from __future__ import annotations

from pathlib import PurePath

from zeta_core.contract.answers import FilePurpose
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.formats import DATA_SUFFIXES, MODEL_SUFFIXES, ROW_SUFFIXES, TEXT_SUFFIXES, TOKEN_SUFFIXES
from zeta_core.contract.validation import shown

SUFFIXES: dict[FilePurpose, tuple[str, ...]] = {"dataset": DATA_SUFFIXES, "model": MODEL_SUFFIXES}
FIRST_BYTES = 512  # enough for each check
_BEGINNINGS: dict[str, tuple[bytes, ...]] = {
    ".parquet": (b"PAR1",),
    ".npy": (b"\x93NUMPY",),
    ".arrow": (b"ARROW1", b"\xff\xff\xff\xff"),  # the file format, and the stream format of `datasets`
}
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257


def check_name(filename: str, purpose: FilePurpose) -> None:
    """Raise `InvalidRequest` if the name has no supported suffix."""
    suffix = PurePath(filename).suffix.lower()
    allowed = SUFFIXES[purpose]
    if suffix not in allowed:
        raise InvalidRequest(
            f"file is {shown(filename)}, which is not a supported {purpose} format; use {_either(allowed)}.",
            code="unknown_format",
            param="file",
        )


def unreadable(filename: str, *, as_tokens: bool) -> str | None:
    """The reason why a job that trains on text, or on token ids, can't read this data file; ``None`` if it can."""
    suffix = PurePath(filename).suffix.lower()
    allowed = (*ROW_SUFFIXES, *(TOKEN_SUFFIXES if as_tokens else TEXT_SUFFIXES))
    if suffix in allowed:
        return None
    cure = "leave out use_pretokenized" if as_tokens else "set use_pretokenized"
    what = "token ids" if as_tokens else "text"
    return f"is {shown(filename)}, and {what} come from {', '.join(allowed)} files; {cure}, or give another file."


def check_beginning(filename: str, beginning: bytes) -> None:
    """Raise `InvalidRequest` for an empty file, or one whose first bytes contradict its suffix."""
    suffix = PurePath(filename).suffix.lower()
    if not beginning:
        raise InvalidRequest(
            f"file is {shown(filename)}, which is empty; upload a file with content.",
            code="empty_file",
            param="file",
        )
    if suffix in _BEGINNINGS:
        fits = beginning.startswith(_BEGINNINGS[suffix])
    elif suffix == ".tar":
        fits = beginning[_TAR_MAGIC_AT:].startswith(_TAR_MAGIC)
    elif suffix == ".bin":
        fits = True
    else:
        fits = b"\0" not in beginning
    if not fits:
        what = "UTF-8 text" if suffix in (*TEXT_SUFFIXES, ".jsonl") else f"a {suffix} file"
        raise InvalidRequest(
            f"file is {shown(filename)}, whose content is not {what}; "
            "save it in that format, or rename it to match its content.",
            code="unknown_format",
            param="file",
        )


def _either(suffixes: tuple[str, ...]) -> str:
    return " or ".join(filter(None, (", ".join(suffixes[:-1]), suffixes[-1])))
