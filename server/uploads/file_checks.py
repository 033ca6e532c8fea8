"""Checks uploaded files: data files by name and first bytes, and models in a separate process.

The run validates the rest of a data file. Models need their own process, because parsing a JSON file of 64 MB takes a
second and hundreds of megabytes, and would block all other requests. Guarantees: the process doesn't inherit the
server's environment, has limits on time and memory, and has exited when the check returns.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from zeta_core import contract
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
from zeta_core.contract.errors import InvalidRequest, Unavailable
from zeta_core.contract.job.responses import FilePurpose
from zeta_core.contract.spec.validation import shown
from zeta_core.system.model_files import InvalidModelFiles

SUFFIXES: dict[FilePurpose, tuple[str, ...]] = {
    "dataset": DATA_SUFFIXES,
    "model": MODEL_SUFFIXES,
    "batch": (".jsonl",),
}
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257
CHECK_SECONDS = 60.0  # reading the headers of a model with hundreds of files takes one second
_CHECK_COMMAND = (sys.executable, "-P", "-m", "zeta_core.system.model_files")
_check_slots = asyncio.Semaphore(2)


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
    fix = "remove use_pretokenized" if as_tokens else "set use_pretokenized"
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


async def check_model(path: Path, filename: str) -> None:
    """Raise `InvalidModelFiles` for an archive that isn't safe to load, and `Unavailable` if the check failed."""
    environment = {"PYTHONPATH": str(Path(contract.__file__).parents[2])}
    async with _check_slots:
        process = await asyncio.create_subprocess_exec(
            *_CHECK_COMMAND, str(path), filename, stdout=asyncio.subprocess.PIPE, cwd="/", env=environment
        )
        try:
            out, _ = await asyncio.wait_for(process.communicate(), CHECK_SECONDS)
        except TimeoutError:
            raise InvalidModelFiles(
                f"Checking {filename} took more than {CHECK_SECONDS:g} s; it does not look like a model.", param="file"
            ) from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    fault = out.decode("utf-8", "replace").strip()
    if fault:
        raise InvalidModelFiles(fault, param="file")
    if process.returncode != 0:
        raise Unavailable(f"The check of {filename} failed with exit code {process.returncode}; upload the file again.")
