"""Signs the run files of a worker, so that it adopts none that a run has changed.

A run may write to the files in its run directory. After a restart of its worker, a run that was taken over could let
it store another job's files as a checkpoint, because the run file names the output directory. The key lies in the
worker's folder, which runs can't read. They can't remove the signature either, so only older workers leave none.
"""

from __future__ import annotations

import hmac
import os
import secrets
from contextlib import suppress
from pathlib import Path

from zeta_core.contract.wire.run_directory import RUN_FILE
from zeta_core.system.durable_files import private_part_file, write_atomically

SIGNATURE_FILE = "run.json.signature"
KEY_FILE = "run-files.key"  # in the worker's own folder
KEY_BYTES = 32


def write_signed(directory: Path, content: bytes) -> None:
    """Write the run file of this run directory, ``ROOT/runs/JOB/attempt-N``, after its signature. Raises `OSError`."""
    write_atomically(directory / SIGNATURE_FILE, _sign(directory, content, _key(directory)))
    write_atomically(directory / RUN_FILE, content)


def read_signed(directory: Path) -> bytes:
    """The run file. Raises `OSError`, and `ValueError` if it was changed."""
    content = (directory / RUN_FILE).read_bytes()
    try:
        signature = (directory / SIGNATURE_FILE).read_bytes()
    except FileNotFoundError:
        return content
    if not hmac.compare_digest(signature, _sign(directory, content, _key(directory))):
        raise ValueError(f"{RUN_FILE} was changed after the run had been started")
    return content


def _sign(directory: Path, content: bytes, key: bytes) -> bytes:
    name = f"{directory.parent.name}/{directory.name}\n".encode()
    return hmac.digest(key, name + content, "sha256").hex().encode()


def _key(directory: Path) -> bytes:
    """The key of the worker's folder, which is created at its first use."""
    path = directory.parents[2] / KEY_FILE
    if not path.exists():
        # It is complete before it has its name, because several attempts may be prepared at once. The first link wins.
        with private_part_file(path, secrets.token_hex(KEY_BYTES)) as part, suppress(FileExistsError):
            os.link(part, path)
    return path.read_bytes()
