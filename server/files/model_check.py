"""Check an uploaded model in a process of its own, within limits of time and memory.

Parsing a JSON file of 64 MB takes a second and hundreds of megabytes: in the server's own process every other request
would wait for it. Guaranteed: the process has none of the server's environment, and has ended when the check returns.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from zeta_core import contract
from zeta_core.contract.errors import Unavailable
from zeta_core.contract.model_files import InvalidModelFiles

CHECK_SECONDS = 60.0  # the headers of a model with hundreds of files take one
_COMMAND = (sys.executable, "-P", "-m", "zeta_core.contract.model_files")
_at_once = asyncio.Semaphore(2)


async def check_model(path: Path, filename: str) -> None:
    """Raise `InvalidModelFiles` for an archive that is not safe to load, and `Unavailable` if that is not known."""
    environment = {"PYTHONPATH": str(Path(contract.__file__).parents[2])}
    async with _at_once:
        process = await asyncio.create_subprocess_exec(
            *_COMMAND, str(path), filename, stdout=asyncio.subprocess.PIPE, cwd="/", env=environment
        )
        try:
            out, _ = await asyncio.wait_for(process.communicate(), CHECK_SECONDS)
        except TimeoutError:
            raise InvalidModelFiles(
                f"{filename} takes more than {CHECK_SECONDS:g} s to check; it does not look like a model.", param="file"
            ) from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    fault = out.decode("utf-8", "replace").strip()
    if fault:
        raise InvalidModelFiles(fault, param="file")
    if process.returncode != 0:
        raise Unavailable(f"The check of {filename} ended with exit code {process.returncode}; send it again.")
