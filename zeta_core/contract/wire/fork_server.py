"""Messages between a worker and its fork server, a process that starts runs by forking itself.

Each is one packet of JSON on a Unix socket (``SOCK_SEQPACKET``), which is the fork server's standard input. A
`ForkRequest` is accompanied by two descriptors: the locked ``RUN_DIR/lock``, and ``RUN_DIR/train.log``. Requests are
answered in order, with `Forked` or `Refused`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

FORK_SERVER_ARGUMENT = "fork-server"
# The mark of a fork server: the identity of its worker's lock file. A run writes its own marks over it, because
# /proc/PID/environ of a forked process is memory that it has from its parent.
FORK_SERVER_VARIABLE = "ZETA_FORK_SERVER"
MARK_BYTES = 1024  # of the variable's value, filled up with `FILLER`: the space for the marks of a run
FILLER = "."
MAX_PACKET_BYTES = 64 * 1024  # a longer environment is refused, and the run is started cold


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ForkRequest(_Message):
    """Everything that a process inherits from the worker that starts it, apart from the two descriptors."""

    run_directory: str
    environment: dict[str, str]
    resource_limits: dict[int, tuple[int, int]]  # soft and hard limit by resource
    umask: int
    niceness: int
    cpus: list[int]  # which it may run on


class ForkServerReady(_Message):
    """The fork server has imported everything and takes requests."""

    type: Literal["ready"] = "ready"
    memory_bytes: int


class Forked(_Message):
    type: Literal["forked"] = "forked"
    pid: int


class Refused(_Message):
    """Nothing was started. ``is_stale``: this fork server no longer forks, because its code has changed."""

    type: Literal["refused"] = "refused"
    reason: str
    is_stale: bool = False


class Stale(_Message):
    """The code has changed since it was imported, so this fork server refuses all further requests."""

    type: Literal["stale"] = "stale"
    reason: str


class Exited(_Message):
    """A forked training has exited, with this status: negative for a signal."""

    type: Literal["exited"] = "exited"
    pid: int
    status: int


ForkServerMessage = Annotated[ForkServerReady | Forked | Refused | Stale | Exited, Field(discriminator="type")]
FORK_SERVER_MESSAGE: TypeAdapter[ForkServerMessage] = TypeAdapter(ForkServerMessage)
