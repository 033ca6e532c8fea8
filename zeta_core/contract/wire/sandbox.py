"""``sandbox.json`` beside a run file: what the process that reads the run file may access, and nothing else.

The worker writes it before it starts the process, which applies it to itself before it reads anything else
(`zeta_core.system.sandbox`). Without this file, a process is not restricted.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

SANDBOX_FILE = "sandbox.json"


class SandboxFile(BaseModel):
    """Absolute paths; those that don't exist are ignored. A folder stands for everything in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    readable: list[str] = []  # read and execute
    listable: list[str] = []  # only list the names in them
    writable: list[str] = []  # read, and create, change and remove files, folders and symbolic links
    outputs: list[str] = []  # the same without symbolic links and named pipes, because the worker reads these folders
    run_directory: str | None = None  # like ``outputs``, but nothing can be removed or renamed directly in it
    devices: list[str] = []  # read, write and control (ioctl)
    lock: str | None = None  # a file that all processes keep open and locked (shared) until they exit
    namespaces: bool = False  # whether it gets shared memory of its own; needed to take the network away
    network: bool = True  # otherwise only the loopback interface of a network of its own
    unix_sockets: bool = False  # whether Unix sockets may be created; pairs of connected ones always may
    max_tasks: int | None = None  # processes and threads; with more, all are killed. With 1, no more can be created
    limit_file: str | None = None  # a file that is created then; contains ``max_tasks``
    max_file_bytes: int | None = None  # the largest size of a file; writing beyond it fails with EFBIG
    variables: dict[str, str] = {}  # environment variables to set
