"""Which files can be uploaded, as far as their name and first bytes tell; the rest is the training's to find out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePath

from zeta_core.contract.answers import FilePurpose
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.formats import DATA_SUFFIXES, MODEL_SUFFIXES, ROW_SUFFIXES, TEXT_SUFFIXES, TOKEN_SUFFIXES
from zeta_core.contract.rows import RowFormat, fault_in, format_of

SUFFIXES: dict[FilePurpose, tuple[str, ...]] = {"dataset": DATA_SUFFIXES, "model": MODEL_SUFFIXES}
FIRST_BYTES = 512  # enough for each check of an upload
FIRST_ROWS_BYTES = 64 * 1024  # of a file that a job names: its first rows are looked at
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
            f"file is {filename[:100]!r}, which is no known {purpose} format; use {' or '.join(allowed)}.",
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
    return f"is {filename[:100]!r}, and {what} come from {', '.join(allowed)} files; {cure}, or give another file."


def fault_in_first_rows(
    filename: str, beginning: bytes, row_format: RowFormat | None, columns: Mapping[str, str], method: str
) -> str | None:
    """What is wrong with a row that lies whole in the ``beginning`` of a JSON-lines file, with its line; else ``None``.

    ``row_format`` ``None`` means what the first row tells. The training says the same of any other row.
    """
    if PurePath(filename).suffix.lower() != ".jsonl":
        return None
    lines = beginning.split(b"\n")
    if len(beginning) >= FIRST_ROWS_BYTES:
        lines.pop()  # it may go on
    for number, raw in enumerate(lines, 1):
        place = f"{filename[:100]}, line {number}"
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            row = json.loads(text) if text else None
        except UnicodeDecodeError as error:
            return f"{place}: is not UTF-8 text (byte {raw[error.start]:#04x}); save it as UTF-8."
        except (ValueError, RecursionError) as error:
            return f"{place}: is not JSON ({error})."
        if not text:
            continue
        if row_format is None:
            row_format = (format_of(row, columns) if isinstance(row, Mapping) else None) or "text"
            if (row_format == "preference") != (method == "dpo"):
                return f"{place}: is a {row_format} row, which method {method!r} does not train on."
        if fault := fault_in(row, row_format, columns):
            return f"{place}: {fault}"
    return None


def check_beginning(filename: str, beginning: bytes) -> None:
    """Raise `InvalidRequest` for an empty file, or one whose first bytes are not what its name says."""
    suffix = PurePath(filename).suffix.lower()
    if not beginning:
        raise InvalidRequest(f"file is {filename[:100]!r}, which is empty.", code="empty_file", param="file")
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
            f"file is {filename[:100]!r}, whose first bytes are not those of {what}.",
            code="unknown_format",
            param="file",
        )
