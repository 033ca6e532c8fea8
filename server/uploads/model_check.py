"""Checks an uploaded model in a separate process with limits on time and memory.

Parsing a JSON file of 64 MB takes a second and hundreds of megabytes, which would block all other requests in the
server's process. Guaranteed: the process doesn't inherit the server's environment, and has exited when the check
returns.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from zeta_core import contract
from zeta_core.contract.errors import Unavailable
from zeta_core.system.model_files import InvalidModelFiles

CHECK_SECONDS = 60.0  # reading the headers of a model with hundreds of files takes one second
_COMMAND = (sys.executable, "-P", "-m", "zeta_core.system.model_files")
_slots = asyncio.Semaphore(2)


async def check_model(path: Path, filename: str) -> None:
    """Raise `InvalidModelFiles` for an archive that isn't safe to load, and `Unavailable` if the check failed."""
    environment = {"PYTHONPATH": str(Path(contract.__file__).parents[2])}
    async with _slots:
        process = await asyncio.create_subprocess_exec(
            *_COMMAND, str(path), filename, stdout=asyncio.subprocess.PIPE, cwd="/", env=environment
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
