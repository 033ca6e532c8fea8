"""Which files can be uploaded, as far as their name and first bytes tell; the rest is the training's to find out."""

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
    """Raise `InvalidRequest` where the name has no known ending."""
    suffix = PurePath(filename).suffix.lower()
    allowed = SUFFIXES[purpose]
    if suffix not in allowed:
        raise InvalidRequest(
            f"file is {shown(filename)}, which is no known {purpose} format; use {_either(allowed)}.",
            code="unknown_format",
            param="file",
        )


def unreadable(filename: str, *, as_tokens: bool) -> str | None:
    """Why a job that trains on text, or on token ids, cannot read a data file of this name; ``None`` if it can."""
    suffix = PurePath(filename).suffix.lower()
    allowed = (*ROW_SUFFIXES, *(TOKEN_SUFFIXES if as_tokens else TEXT_SUFFIXES))
    if suffix in allowed:
        return None
    cure = "leave out use_pretokenized" if as_tokens else "set use_pretokenized"
    what = "token ids" if as_tokens else "text"
    return f"is {shown(filename)}, and {what} come from {', '.join(allowed)} files; {cure}, or give another file."


def check_beginning(filename: str, beginning: bytes) -> None:
    """Raise `InvalidRequest` for an empty file, or one whose first bytes are not what its name says."""
    suffix = PurePath(filename).suffix.lower()
    if not beginning:
        raise InvalidRequest(
            f"file is {shown(filename)}, which is empty; send one that holds something.",
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
            f"file is {shown(filename)}, whose first bytes are not those of {what}; "
            "save it as such, or give it the ending of what it is.",
            code="unknown_format",
            param="file",
        )


def _either(suffixes: tuple[str, ...]) -> str:
    return " or ".join(filter(None, (", ".join(suffixes[:-1]), suffixes[-1])))
